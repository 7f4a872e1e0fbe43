"""Advantages of whole answers."""

from __future__ import annotations

import statistics

import pytest

from opd.config.objective import DivergenceTerm, OutcomeTerm
from opd.config.shapes import VerifierGatedKL
from opd.objectives.outcome import advantages, verdicts
from tests.objectives.answers import answer

REWARDS = {"a/0": 1.0, "a/1": 0.0, "a/2": 0.0, "b/0": 0.1, "b/1": 0.1, "b/2": 0.1, "c/0": 1.0}
ANSWERS = [answer(key, reward=reward) for key, reward in REWARDS.items()] + [answer("a/3"), answer("d/0")]


def test_the_group_is_the_answers_to_one_prompt_that_have_a_reward() -> None:
    """Equal rewards give exactly 0, where their deviation is rounding: mean(0.1, 0.1, 0.1) is not 0.1."""
    group = [1.0, 0.0, 0.0]
    mean, deviation = statistics.fmean(group), statistics.pstdev(group)
    expected = {f"a/{n}": (r - mean) / deviation for n, r in enumerate(group)}
    expected |= {"b/0": 0.0, "b/1": 0.0, "b/2": 0.0, "c/0": 0.0}
    got = advantages(OutcomeTerm(name="o"), ANSWERS)
    assert got == pytest.approx(expected) and got["b/0"] == 0.0 and "a/3" not in got


def test_centred_is_not_divided_and_plain_is_the_reward() -> None:
    centred = advantages(OutcomeTerm(name="o", advantage="centred"), ANSWERS)
    assert centred["a/0"] == pytest.approx(2 / 3) and centred["a/1"] == pytest.approx(-1 / 3) and centred["c/0"] == 0
    assert advantages(OutcomeTerm(name="o", advantage="plain"), ANSWERS) == REWARDS


def test_a_verdict_is_the_reward_against_its_threshold() -> None:
    graded = [answer(key, reward=reward) for key, reward in (("a", 0.5), ("b", 0.4), ("c", None))]
    gated = DivergenceTerm(name="g", shape=VerifierGatedKL(right_from=0.5))
    assert verdicts(gated, graded) == {"a": True, "b": False}
    assert verdicts(DivergenceTerm(name="g"), graded) is None
