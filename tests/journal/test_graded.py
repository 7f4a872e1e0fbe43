"""The graded record: one definition of the penalty, and what is not such a record."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from opd.errors import DataError
from opd.journal.graded import by_domain, by_position, check, members, penalty, worst


def record(student: bool = True) -> Any:
    """Two answers of three tokens and one of none, two teachers, and the student if asked."""
    readers = [*(["student"] if student else []), "a", "b"]

    def answer(id: str, domain: str, own: list, theirs: list) -> dict[str, Any]:
        n = len(own)
        logprobs = {"student": own, "a": theirs, "b": own}
        made = {
            "id": id,
            "prompt_id": f"p{id}",
            "domain": domain,
            "turn": 0,
            "prompt": "?",
            "finish_reason": "stop",
            "score": None,
            "ids": list(range(n)),
            "pieces": [f"t{i}" for i in range(n)],
            "mask": [1] * n,
            "logprobs": {name: logprobs[name] for name in readers},
            "entropy": {name: [0.5] * n for name in readers},
            "top": {name: [[[0, -0.1], [1, -2.0]] for _ in range(n)] for name in readers},
        }
        if student:
            made["reverse_kl"] = {name: [0.25] * n for name in ("a", "b")}
        return made

    return {
        "schema_version": 1,
        "format": "opd-graded",
        "title": "made by hand",
        "step": None,
        "student": "student" if student else None,
        "teachers": ["a", "b"],
        "readers": {name: {"model": f"models/{name}", "fingerprint": f"f-{name}"} for name in readers},
        "texts": {"0": "zero", "1": " one"},
        "answers": [
            answer("x", "maths", [-1.0, -2.0, -0.5], [-1.5, -9.0, -0.25]),
            answer("y", "code", [-1.0, -0.1, -0.1], [-4.0, None, -0.2]),
            answer("z", "none", [], []),
        ],
    }


def test_the_penalty_is_a_log_ratio_beside_a_student_and_excess_surprise_without() -> None:
    made = record()
    first, second, empty = made["answers"]
    assert penalty(first, "a", "student") == [-0.5, -7.0, 0.25]
    assert penalty(first, "a", None) == [-1.0, -8.5, 0.25]
    second["mask"][2] = 0
    assert penalty(second, "a", "student") == [-3.0, None, None]
    second["entropy"]["b"][0] = None
    assert penalty(second, "b", None) == [None, pytest.approx(0.4), None]
    assert penalty(empty, "a", "student") == []


def test_the_mean_penalty_of_a_models_own_words_is_zero() -> None:
    q = [0.7, 0.2, 0.1]
    entropy = -sum(p * math.log(p) for p in q)
    answer = record()["answers"][0]
    answer["logprobs"]["a"], answer["entropy"]["a"] = [math.log(p) for p in q], [entropy] * 3
    values = penalty(answer, "a", None)
    assert sum(p * value for p, value in zip(q, values, strict=True) if value is not None) == pytest.approx(0)


def test_worst_tokens_and_means_by_position_and_domain() -> None:
    made = check(record())
    assert worst(made, 2, "a") == [(0, 1, -7.0), (1, 0, -3.0)]
    assert len(worst(made, 99, "a")) == 5, "the token without a number is left out"
    assert by_domain(made, "a") == {
        "code": {"mean": pytest.approx(-1.55), "count": 2},
        "maths": {"mean": pytest.approx(-7.25 / 3), "count": 3},
    }
    assert by_position(made, "a", bins=2) == [
        {"start": 0, "end": 2, "mean": pytest.approx(-3.5), "count": 3},
        {"start": 2, "end": 3, "mean": pytest.approx(0.075), "count": 2},
    ]
    assert [(step["start"], step["end"]) for step in by_position(made, "a")] == [(0, 1), (1, 2), (2, 3)]
    alone = check(record(student=False))
    assert worst(alone, 1, "a") == [(0, 1, -8.5)], "without a student the entropy counts"
    with pytest.raises(DataError, match=r"a, b.*student"):
        worst(made, 1, "student")


def crossed(student: bool = True) -> Any:
    """The same, where teacher b has another tokenizer: it reads t0 and t1 as one token, and nothing at t2."""
    made = record(student)
    made["readers"]["b"]["crossed"] = {"coverage": 0.5, "same": 0.0, "span_tokens": 2.0, "span_own_tokens": None}
    made["own_texts"] = {"b": {"7": "seven"}}
    for answer in made["answers"]:
        n = len(answer["ids"])
        answer["spans"] = {"b": [0, 0, -1][:n]}
        answer["own"] = {"b": [[[9, "t0t1", -4.0]]][:n]}
        answer["own_top"] = {"b": [[[7, -0.5]]][:n]}
        answer["logprobs"]["b"] = [-2.0, -2.0, None][:n]
        answer["entropy"]["b"] = [1.0, 0.5, None][:n]
        answer["top"]["b"] = [[]] * n
        if student:
            answer["reverse_kl"]["b"] = [None] * n
    return made


def test_a_span_has_one_penalty_in_equal_shares_and_is_counted_once() -> None:
    made = check(crossed())
    first, second, _ = made["answers"]
    assert members(first, "b") == [[0, 1]] and members(first, "a") == []
    assert penalty(first, "b", "student") == [-0.5, -0.5, None], "-4 of the span, -3 of the student's two tokens"
    assert penalty(second, "b", "student") == pytest.approx([-1.45, -1.45, None])
    assert worst(made, 9, "b") == [(1, 0, pytest.approx(-1.45)), (0, 0, -0.5)]
    assert by_domain(made, "b")["maths"] == {"mean": -0.5, "count": 2}
    first["mask"][1] = 0
    assert penalty(first, "b", "student") == [None, None, None], "a span counts as a whole"
    alone = check(crossed(student=False))
    assert penalty(alone["answers"][0], "b", None) == [-1.25, -1.25, None]
    assert penalty(alone["answers"][0], "a", None) == penalty(record(student=False)["answers"][0], "a", None)


def test_without_what_came_later_the_rest_is_a_record_of_schema_1() -> None:
    made = crossed()
    assert made["schema_version"] == 1 and check(json.loads(json.dumps(made))) == made
    made.pop("own_texts")
    made["readers"]["b"].pop("crossed")
    for answer in made["answers"]:
        for key in ("spans", "own", "own_top"):
            answer.pop(key)
    assert penalty(check(made)["answers"][0], "b", "student") == [-1.0, 0.0, None], "shares, token by token"


CROSSED = {
    "crossed facts that are missing": (lambda r: r["readers"]["b"]["crossed"].pop("same"), "crossed.same is missing"),
    "facts in words": (lambda r: r["readers"]["b"]["crossed"].update(same="most"), "crossed.same must be a number"),
    "a crossed student": (lambda r: r["readers"]["student"].update(crossed={}), "the student reads its own tokens"),
    "nobody's spans": (lambda r: r["answers"][0].pop("spans"), "spans must be about exactly b"),
    "spans of another": (lambda r: r["answers"][0]["spans"].update(a=[0, 0, 0]), "spans must be about exactly b"),
    "too few spans": (lambda r: r["answers"][0]["spans"]["b"].pop(), r"spans\.b .* 3: 2"),
    "a gap": (lambda r: r["answers"][0]["spans"].update(b=[0, 2, -1]), "runs numbered from 0"),
    "a span in two parts": (lambda r: r["answers"][0]["spans"].update(b=[0, 1, 0]), "runs numbered from 0"),
    "own tokens of no span": (lambda r: r["answers"][0]["own"]["b"].append([[9, "x", 0.0]]), r"own\.b .*spans, 1: 2"),
    "a span without tokens": (lambda r: r["answers"][0]["own"].update(b=[[]]), r"own\.b\.0"),
    "own tokens without text": (lambda r: r["answers"][0]["own"].update(b=[[[9, 1, 0.0]]]), r"own\.b\.0"),
    "tops of no span": (lambda r: r["answers"][0]["own_top"].update(b=[]), r"own_top\.b .*spans, 1: 0"),
    "own texts without a token": (lambda r: r["own_texts"]["b"].pop("7"), "own_texts has no token: 7"),
    "own texts of no token": (lambda r: r["own_texts"]["b"].update(x="y"), r"keys of own_texts\.b"),
}


@pytest.mark.parametrize("name", CROSSED)
def test_what_a_reader_with_another_tokenizer_says_agrees_with_itself(name: str) -> None:
    spoil, message = CROSSED[name]
    made = crossed()
    spoil(made)
    with pytest.raises(DataError, match=message):
        check(made)


def test_a_record_survives_json() -> None:
    for student in (True, False):
        made = record(student)
        assert check(json.loads(json.dumps(made))) == made


BROKEN = {
    "another format": (lambda r: r.update(format="x"), "format must be 'opd-graded': x"),
    "a newer opd": (lambda r: r.update(schema_version=2), "up to schema 1.*2"),
    "no title": (lambda r: r.pop("title"), "title is missing"),
    "step": (lambda r: r.update(step="3"), "step must be"),
    "an unknown teacher": (lambda r: r.update(teachers=["a", "c"]), "student, a, b.*: c"),
    "no teacher": (lambda r: r.update(teachers=[]), "at least one"),
    "a teacher twice": (lambda r: r.update(teachers=["a", "a"]), "twice"),
    "an unknown student": (lambda r: r.update(student="me"), "not among them: me"),
    "a student that teaches": (lambda r: r.update(student="a"), "cannot be one of the teachers"),
    "a reader without model": (lambda r: r["readers"]["a"].pop("model"), r"readers\.a\.model is missing"),
    "texts without a token": (lambda r: r["texts"].pop("1"), r"texts has no token: 1"),
    "texts of no token": (lambda r: r["texts"].update(x="y"), "token ids: x"),
    "pieces too short": (lambda r: r["answers"][1]["pieces"].pop(), r"answers\.1\.pieces .* 3: 2"),
    "a mask of other numbers": (lambda r: r["answers"][0]["mask"].__setitem__(1, 2), r"mask\.1: .*0 and 1: 2"),
    "one number too many": (lambda r: r["answers"][0]["entropy"]["a"].append(0.0), r"entropy\.a .* 3: 4"),
    "NaN": (lambda r: r["answers"][0]["logprobs"]["a"].__setitem__(0, math.nan), r"logprobs\.a\.0.*nan"),
    "numbers of nobody": (lambda r: r["answers"][0]["logprobs"].update(c=[0.0] * 3), "student, a, b, but.*c"),
    "a reader without numbers": (lambda r: r["answers"][0]["top"].pop("b"), "exactly student, a, b"),
    "no divergence": (lambda r: r["answers"][0].pop("reverse_kl"), "reverse_kl is missing"),
    "a divergence of the student": (lambda r: r["answers"][0]["reverse_kl"].update(student=[0.0] * 3), "exactly a, b"),
    "top of another shape": (lambda r: r["answers"][0]["top"]["a"].__setitem__(0, [[0]]), r"top\.a\.0"),
    "a finish nobody knows": (lambda r: r["answers"][0].update(finish_reason="cut"), "finish_reason.*cut"),
    "a score in words": (lambda r: r["answers"][0].update(score="good"), "score.*good"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_agree_with_itself_is_refused_and_named(name: str) -> None:
    spoil, message = BROKEN[name]
    made = copy.deepcopy(record())
    spoil(made)
    with pytest.raises(DataError, match=message):
        check(made)


def test_a_divergence_without_a_student_and_other_things_than_objects_are_refused() -> None:
    made = record(student=False)
    made["answers"][0]["reverse_kl"] = {"a": [0.0] * 3, "b": [0.0] * 3}
    with pytest.raises(DataError, match="needs a student"):
        check(made)
    for thing in ([], "text", None):
        with pytest.raises(DataError, match="JSON object"):
            check(thing)
