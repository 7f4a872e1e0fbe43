"""Views of a teacher with another tokenizer: where only the ids differ the same numbers as of one with the student's,
where the tokens do those of a slow reading."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from opd.journal.graded import GradedRecord, check, grouped, penalty
from opd.models.answer_states import answer_states
from opd.objectives.head import head_logits
from opd.teachers.local import LocalTeacher
from opd.teachers.local_service import LocalService
from opd.teachers.own_words import in_own_words, in_shares
from opd.teachers.reading import read_answers, writer
from opd.teachers.served.served import ServedTeacher
from opd.text.agreement import compare
from opd.text.crossing import agree
from opd.types import Spans
from tests import crossing, rooms

SETTINGS: dict[str, Any] = {"chunk_tokens": 7, "share_prompts": True}
STUDENT = crossing.fmt("byte_bpe")


def teacher(model, fmt, *, name: str = "teacher") -> LocalTeacher:
    return LocalTeacher(model, fmt, agree(STUDENT, fmt), name=name, temperature=1.0, **SETTINGS)


def record(rollouts_N, **members: Any) -> GradedRecord:
    student = crossing.model(STUDENT)
    return read_answers(
        rollouts_N,
        {"student": writer(student, STUDENT, **SETTINGS), **members},
        student="student",
        tokenizer=STUDENT.tokenizer,
        models={name: name for name in ("student", *members)},
        top_k=3,
        tokens_per_micro_batch=200,
        chunk_tokens=5,
        device=torch.device("cpu"),
        title="a view",
    )


def test_a_teacher_with_the_same_tokens_under_other_ids_says_the_same() -> None:
    fmt, moved_V = crossing.permuted(STUDENT)
    own = crossing.model(STUDENT, seed=1)
    rollouts_N = crossing.answers(STUDENT)
    found = record(
        rollouts_N,
        same=rooms.teacher(own, STUDENT, name="same"),
        other=teacher(crossing.permuted_model(own, moved_V), fmt, name="other"),
    )
    check(json.loads(json.dumps(found)))
    assert "crossed" not in found["readers"]["same"]
    assert found["readers"]["other"].get("crossed") == {
        "coverage": 1.0,
        "same": 1.0,
        "span_tokens": 1.0,
        "span_own_tokens": 1.0,
    }
    for answer in found["answers"]:
        for of in (answer["logprobs"], answer["entropy"]):
            assert of["other"] == pytest.approx(of["same"], abs=2e-4)
        assert penalty(answer, "other", "student") == pytest.approx(penalty(answer, "same", "student"), abs=3e-4)
        assert answer.get("reverse_kl", {})["other"] == [None] * len(answer["ids"])
        assert [piece for ((_, piece, _),) in answer.get("own", {})["other"]] == answer["pieces"]
        texts, own_texts = found["texts"], found.get("own_texts", {})["other"]
        assert [[own_texts[str(n)] for n, _ in row] for row in answer.get("own_top", {})["other"]] == [
            [texts[str(n)] for n, _ in row] for row in answer["top"]["same"]
        ]
        assert answer["top"]["other"] == [[]] * len(answer["ids"])


@pytest.mark.parametrize("family", ["unigram", "unigram_nfkc", "wordpiece"])
def test_A_5_numbers_are_those_of_the_teachers_own_tokens_where_they_were_predicted(family: str) -> None:
    fmt = crossing.fmt(family)
    reader = teacher(crossing.model(fmt, seed=1), fmt)
    rollouts_N = crossing.answers(STUDENT, [*crossing.TEXTS, "ﬁne Å \ufffd １"])
    found = record(rollouts_N, teacher=reader)
    check(json.loads(json.dumps(found)))
    several = 0
    for rollout, answer in zip(rollouts_N, found["answers"], strict=True):
        read = agree(STUDENT, fmt).read(rollout)  # pyright: ignore[reportAttributeAccessIssue]
        states_UD = answer_states(reader.model, [fmt.prompt_ids(rollout.prompt.row)], [read.ids], share=False)
        log_UV = torch.log_softmax(head_logits(states_UD, reader.own_head).double(), -1).detach().numpy()
        drawn_U = log_UV[np.arange(len(read.ids)), read.ids]
        entropy_U = -(np.exp(log_UV) * log_UV).sum(-1)
        logprobs, entropy = answer["logprobs"]["teacher"], answer["entropy"]["teacher"]
        spans = read.spans.span_T.tolist()
        assert answer.get("spans", {})["teacher"] == spans
        assert [value is None for value in logprobs] == [span < 0 for span in spans]
        rows = zip(grouped(spans), grouped(read.spans.span_U.tolist()), strict=True)
        for n, (of_T, of_U) in enumerate(rows):
            several += len(of_T) + len(of_U) > 2
            assert sum(logprobs[t] for t in of_T) == pytest.approx(drawn_U[of_U].sum(), abs=1e-3)  # pyright: ignore
            assert sum(entropy[t] for t in of_T) == pytest.approx(entropy_U[of_U].sum(), abs=1e-3)  # pyright: ignore
            own = answer.get("own", {})["teacher"][n]
            assert [number for number, _, _ in own] == read.ids[of_U].tolist()
            assert [q for _, _, q in own] == pytest.approx(drawn_U[of_U], abs=1e-3)
            best = np.argsort(-log_UV[of_U[0]])[:3]
            top = answer.get("own_top", {})["teacher"][n]
            assert [q for _, q in top] == pytest.approx(log_UV[of_U[0], best], abs=1e-3)
    assert several > 3


def test_A_9_what_the_teacher_does_not_read_has_no_number_and_counts_as_not_covered() -> None:
    fmt = crossing.fmt("byte_bpe")
    other, _ = crossing.permuted(fmt)
    (rollout,) = crossing.answers(STUDENT, ["the fox"], cut=())
    broken = STUDENT.tokenizer.encode("🦊")[:2]  # half a character
    ids = np.array([*rollout.response_ids[:-1], *broken, rollout.response_ids[-1]])
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[0] = False
    made = rooms.answer(rollout.prompt, ids.tolist(), [-1.0] * len(ids), mask=mask)
    found = record([made], teacher=teacher(crossing.model(other, seed=1), other))
    (answer,) = found["answers"]
    assert [value is None for value in answer["logprobs"]["teacher"]] == [*[False] * (len(ids) - 3), True, True, False]
    covered = found["readers"]["teacher"].get("crossed")
    assert covered is not None and covered["coverage"] == pytest.approx((len(ids) - 3) / (len(ids) - 1))
    assert penalty(answer, "teacher", "student")[0] is None, "masked"
    assert penalty(answer, "teacher", "student")[-1] is not None, "the end is heard"


def test_a_served_teacher_is_heard_like_one_that_is_here() -> None:
    fmt = crossing.fmt("unigram")
    here = teacher(crossing.model(fmt, seed=1), fmt)
    alone = LocalTeacher(here.model, fmt, compare(fmt, fmt), name="served", temperature=1.0, **SETTINGS)
    served = ServedTeacher(
        LocalService(alone),
        fmt,
        here.agreement,
        name="served",
        temperature=1.0,
        vocab_size=fmt.tokenizer.vocab_size,
        parameter_count=1,
        max_invalid=0.5,
    )
    found = record(crossing.answers(STUDENT), teacher=here, served=served)
    for answer in found["answers"]:
        for key in ("logprobs", "entropy", "spans", "own", "own_top"):
            of = answer.get(key, {})
            if key in ("logprobs", "entropy"):
                assert of["served"] == pytest.approx(of["teacher"], abs=2e-4)
            elif key == "spans":
                assert of["served"] == of["teacher"]
            else:
                ours, theirs = ([one[-1] for row in of[name] for one in row] for name in ("teacher", "served"))
                assert theirs == pytest.approx(ours, abs=2e-4)
    assert in_own_words(served).vocab_size == fmt.tokenizer.vocab_size


def test_shares_of_a_span_add_up_and_one_missing_number_takes_all_of_it() -> None:
    spans = Spans(
        span_T=np.array([0, 0, -1, 1, 2]), span_U=np.array([-1, 0, 1, 1, 2]), same_T=np.zeros(5, dtype=np.bool_)
    )
    shares_T = in_shares(np.array([9.0, -1.0, -2.0, -4.0, np.nan]), spans)
    np.testing.assert_array_equal(shares_T, [-0.5, -0.5, np.nan, -6.0, np.nan])
    nothing = Spans(span_T=np.array([-1, -1]), span_U=np.empty(0, np.int64), same_T=np.zeros(2, dtype=np.bool_))
    assert np.isnan(in_shares(np.empty(0), nothing)).all()
