"""The same problems measured twice: p is what counting every outcome gives, and what cannot be paired is not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.reports.paired import Paired, p_value, paired, problems, sign_test


def row(scores: Mapping[str, Sequence[float | None]], prompts: dict[str, str] | None = None, source: str = "h") -> dict:
    """A line of evals: place of a problem to the scores of its answers."""
    answers: list[dict[str, Any]] = [
        {"problem": f"{source}/{place}", "prompt": (prompts or {}).get(place, f"prompt {place}"), "score": score}
        for place, each in scores.items()
        for score in each
    ]
    return {"answers": answers}


def single(*scores: float | None) -> dict:
    return row({str(i): [score] for i, score in enumerate(scores)})


@cache
def by_enumeration(n: int, uneven: int) -> Fraction:
    """Share of all 2^n rows of coins whose heads and tails differ by at least `uneven`."""
    found = sum(abs(sum(coins)) >= uneven for coins in itertools.product((-1, 1), repeat=n))
    return Fraction(found, 2**n)


@given(st.integers(0, 12), st.integers(0, 12))
def test_p_is_the_share_of_all_outcomes_at_least_as_uneven(better: int, worse: int) -> None:
    if better + worse <= 12:
        assert sign_test(better, worse) == float(by_enumeration(better + worse, abs(better - worse)))


@given(st.integers(0, 900), st.integers(0, 900))
def test_p_of_many_problems_is_exact_too(better: int, worse: int) -> None:
    n, least = better + worse, min(better, worse)
    exact = min(Fraction(1), 2 * Fraction(sum(comb(n, i) for i in range(least + 1)), 2**n))
    assert sign_test(better, worse) == pytest.approx(float(exact), rel=1e-12)
    assert sign_test(better, worse) == sign_test(worse, better) <= 1


def test_known_values_and_a_hundred_thousand_problems() -> None:
    assert sign_test(0, 0) == 1.0 and sign_test(5, 5) == 1.0 and sign_test(1, 0) == 1.0
    assert sign_test(6, 0) == 0.03125 and sign_test(0, 5) == 0.0625
    assert 0 <= sign_test(20_000, 10_000) < 1e-300 and 0.99 < sign_test(15_000, 15_001) <= 1


# A tenth and three tenths are not sums of halves: the order of adding must not make a difference.
score = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])


@given(st.integers(1, 5).flatmap(lambda k: st.lists(st.tuples(*[st.lists(score, min_size=k, max_size=k)] * 2))))
def test_each_problem_counts_once_by_the_mean_of_its_answers(pairs: list[tuple[list[float], list[float]]]) -> None:
    before = row({str(i): a for i, (a, _) in enumerate(pairs)})
    after = row({str(i): b for i, (_, b) in enumerate(pairs)})
    found = paired(before, after)
    if not pairs:
        assert found is None
        return
    exact = [sum(map(Fraction, b), Fraction()) - sum(map(Fraction, a), Fraction()) for a, b in pairs]
    assert found is not None
    changed = [change for change in exact if abs(change) > Fraction(1, 10**9)]
    assert found.better == sum(c > 0 for c in changed) and found.worse == sum(c < 0 for c in changed)
    assert found.better + found.worse + found.same == len(pairs)
    assert found.p == sign_test(found.better, found.worse)
    back = paired(after, before)
    assert back is not None and (back.better, back.worse, back.p) == (found.worse, found.better, found.p)
    shuffled = paired(before, row({str(i): a[::-1] for i, (a, _) in enumerate(pairs)}))
    assert shuffled is not None and shuffled.better == shuffled.worse == 0, "the same answers in another order"


def test_rounding_is_no_difference() -> None:
    found = paired(row({"0": [0.1, 0.1, 0.1]}), row({"0": [0.3, 0.0, 0.0]}))
    assert found is not None and found.same == 1


def test_only_the_same_problems_are_paired() -> None:
    asked = {"0": [1.0], "1": [0.0]}
    base = row(asked)
    assert paired(base, row(asked, source="another/name")) is not None, "what a config calls a source does not matter"
    assert paired(base, row(asked, prompts={"1": "something else"})) is None
    assert paired(base, row({**asked, "2": [1.0]})) is None and paired(base, row({"0": [1.0]})) is None
    assert paired(base, row({"0": [1.0, 1.0], "1": [0.0, 1.0]})) is None, "one answer against two is no fair coin"
    assert paired(base, row({"0": [1.0, None], "1": [0.0, None]})) is not None, "what was not graded does not count"
    assert paired(base, row({"0": [None], "1": [0.0]})) is None
    assert paired(row({"0": [None]}), row({"0": [None]})) is None
    assert paired(base, None) is None and paired({}, base) is None and paired(base, {"answers": []}) is None
    without = {"answers": [{key: a[key] for key in ("problem", "score")} for a in base["answers"]]}
    assert paired(without, without) is None, "an older record does not say what was asked"
    twice = {"answers": [*base["answers"], {"problem": "h/0", "prompt": "other", "score": 1.0}]}
    assert problems(twice) is None


def test_words() -> None:
    def words(better: int, worse: int, change: float = 0.1, confidence: float = 0.95) -> str:
        made = Paired(better=better, worse=worse, same=2, change=change, p=sign_test(better, worse))
        return made.words(confidence)

    assert words(41, 9) == "better on 41 problems, worse on 9: not chance, p < 0.00001"
    assert words(1, 3) == "better on 1 problem, worse on 3: could be chance, p = 0.62"
    assert words(9, 1) == "better on 9 problems, worse on 1: not chance, p = 0.021"
    assert "could be chance" in words(9, 1, confidence=0.99)
    assert words(0, 0) == "the same on all 2 problems"
    assert "the mean score says otherwise: no clear difference" in words(41, 9, change=-0.1)
    assert "not chance" in words(9, 41, change=-0.1)
    assert [p_value(p) for p in (1.0, 0.5, 0.05, 0.0123, 0.00012, 2e-5, 9e-6, 0.0)] == [
        *("p = 1.00", "p = 0.50", "p = 0.050", "p = 0.012", "p = 0.00012", "p = 0.000020"),
        *("p < 0.00001", "p < 0.00001"),
    ]


def test_p_of_one_of_several_comparisons_is_multiplied_and_stays_a_probability() -> None:
    found = paired(single(*[0] * 6), single(*[1] * 6))
    assert found is not None and found.is_clear() and found.p == 0.03125
    assert found.times(3).p == pytest.approx(0.09375) and not found.times(3).is_clear()
    assert found.times(66).p == 1.0
