"""How much a page carries, and how exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.journal.graded import check
from opd.reports.page import tokens
from opd.reports.page.base import json_for_html
from opd.reports.page.token_columns import ALTERNATIVE, DIGITS, ENTROPY, KL, LOGPROB, PENALTY, Number
from opd.reports.page.token_extent import Extent, carried
from opd.reports.page.tokens import TokenView, token_view
from tests.reports.graded import english


def size(view: TokenView) -> int:
    return len(view.body.encode()) + len(json_for_html(view.data["token-data"]).encode())


def records(*steps: int, answers: int = 8, tokens: int = 300) -> list:
    return [check(english(answers, tokens, step=step, seed=step)) for step in steps]


def test_eight_answers_of_300_tokens_fit_whole():
    view = token_view(records(0))
    assert len(json_for_html(view.data["token-data"])) < 150_000 and size(view) < 180_000
    assert "To keep this page small" not in view.body
    assert len(view.css) + len(view.js) < 45_000


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (110_000, ["of 5 alternatives per token are kept"]),
        (70_000, ["0 of 5 alternatives", "of 8 answers are kept"]),
        (20_000, ["0 of 5 alternatives", "1 of 8 answers is kept", "answers are cut after"]),
    ],
)
def test_short_of_room_alternatives_go_first_then_answers_then_tokens(budget: int, said: list[str]):
    view = token_view(records(0), budget_bytes=budget)
    assert size(view) <= budget
    told = view.body[view.body.index("To keep this page small") :].split("</p>")[0]
    assert [part for part in said if part not in told] == []
    assert ("answers are kept" in told) == any("answers are kept" in part for part in said)


def test_steps_are_thinned_but_the_first_and_the_last_stay():
    view = token_view(records(*range(0, 200, 10), answers=2), budget_bytes=60_000)
    kept = [record["step"] for record in view.data["token-data"]["records"]]
    assert size(view) <= 60_000 and 2 <= len(kept) < 20 and (kept[0], kept[-1]) == (0, 190)
    assert f"{len(kept)} of 20 steps are kept" in view.body


def test_the_same_answers_are_kept_of_every_step():
    both = records(0, 40, answers=6, tokens=100)
    for record in both:
        for answer in record["answers"]:
            answer["prompt_id"] = f"p{int(answer['id'][-1]) // 2}"  # two answers to each prompt
    both[1]["answers"].reverse()
    data = token_view(both, budget_bytes=26_000).data["token-data"]
    keys = [sorted(answer["key"] for answer in record["answers"]) for record in data["records"]]
    assert keys[0] == keys[1] and 0 < len(keys[0]) <= 3
    assert all(key.startswith("0/") for key in keys[0])  # another prompt tells more than a second answer


def test_a_long_prompt_loses_its_middle_and_says_so():
    (record,) = records(0, answers=1, tokens=50)
    record["answers"][0]["prompt"] = "start" + "x" * 100_000 + "end"
    view = token_view([record], budget_bytes=40_000)
    prompt = view.data["token-data"]["records"][0]["answers"][0]["prompt"]
    assert prompt.startswith("start") and prompt.endswith("end") and "98008 characters left out" in prompt
    assert size(view) <= 40_000 and "prompts are cut to 2000 characters" in view.body


def test_a_long_run_is_cut_without_packing_all_of_it(monkeypatch):
    many, packed, parts = records(0, answers=8, tokens=500) * 80, [], tokens._parts

    def counted(of, extent):
        body, data = parts(of, extent)
        packed.append(len(body) + len(json_for_html(data["token-data"])))
        return body, data

    monkeypatch.setattr(tokens, "_parts", counted)
    assert size(token_view(many)) <= 180_000
    assert sum(packed) < 20 * 180_000


def test_unlikely_alternatives_are_not_carried_but_the_first_always_is():
    assert carried([(1, -0.1), (2, -6.9), (3, -7.0)], 5) == [(1, -0.1), (2, -6.9)]
    assert carried([(1, -9.0), (2, -9.1)], 5) == [(1, -9.0)]
    assert carried([(1, -0.1), (2, -3.0)], 1) == [(1, -0.1)]
    assert carried([(1, -0.1)], 0) == [] and carried([], 5) == []


def test_kept_steps_are_spread_evenly():
    eleven = records(*range(11), answers=0)
    assert Extent(steps=1).kept_steps(eleven) == [10]
    assert Extent(steps=3).kept_steps(eleven) == [0, 5, 10]
    assert Extent(steps=11).kept_steps(eleven) == Extent().kept_steps(eleven) == list(range(11))


@pytest.mark.parametrize("kind", [LOGPROB, PENALTY, KL, ENTROPY, ALTERNATIVE])
@given(share=st.floats(0, 1))
def test_a_packed_number_is_the_number_to_half_a_step(kind: Number, share: float):
    codes = len(DIGITS) ** kind.width - 2
    value = kind.low + kind.step * codes * share
    for given_, expected in ((value, value), (kind.low + kind.step * codes * 2, kind.low + kind.step * codes)):
        written = kind.pack([given_])
        assert len(written) == kind.width
        assert abs(_unpack(kind, written) - expected) <= abs(kind.step) * 0.5001
    assert kind.pack([None]) == DIGITS[-1] * kind.width


def _unpack(kind: Number, written: str) -> float:
    code = 0
    for digit in written:
        code = code * len(DIGITS) + DIGITS.index(digit)
    return kind.low + kind.step * code
