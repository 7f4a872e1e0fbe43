"""Weights of whole answers, frozen ratios and prefix weights, against loops."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter

from opd.config.slots import Importance
from opd.objectives.importance import bounded, clipped, known_ratio, prefix_weight

RULE = TypeAdapter(Importance)
ROW = torch.tensor([0, 0, 0, 1, 1])
TRAINED = torch.tensor([True, True, False, True, True])
NOW = torch.tensor([-1.0, -2.0, -9.0, -0.5, -1.5], dtype=torch.float64)
SAMPLER = torch.tensor([-1.5, -1.8, float("nan"), -0.4, -2.5], dtype=torch.float64)
PROXIMAL = torch.tensor([-1.2, -2.1, -8.0, -0.6, -1.9], dtype=torch.float64)


def known(rule: dict, *, proximal=PROXIMAL, strength=None) -> list[float] | None:
    ratio = known_ratio(
        RULE.validate_python(rule), logprob_T=NOW, behaviour_T=SAMPLER, proximal_T=proximal, strength_T=strength,
        trained_T=TRAINED, row_T=ROW, rows=2,
    )  # fmt: skip
    return None if ratio is None else ratio.tolist()


def geometric(now, then) -> list[float]:
    """exp of the mean log-ratio over the trained tokens of each answer, at its tokens; 1 at masked ones."""
    gap = [float(a - b) for a, b in zip(now, then, strict=True)]
    first, second = math.exp((gap[0] + gap[1]) / 2), math.exp((gap[3] + gap[4]) / 2)
    return [first, first, 1.0, second, second]


def test_tokens_against_the_sampler_are_left_to_the_kernel() -> None:
    assert known({"kind": "tis"}) is None and known({"kind": "none"}) is None


def test_W_03_the_ratio_of_an_answer_is_that_of_the_student_as_it_is_now() -> None:
    assert known({"kind": "ratio", "level": "sequence"}) == pytest.approx(geometric(NOW, SAMPLER))


def test_rules_bound_the_ratio_of_an_answer() -> None:
    plain = geometric(NOW, SAMPLER)
    assert known({"kind": "tis", "level": "sequence", "cap": 1.1}) == pytest.approx([min(r, 1.1) for r in plain])
    inside = [r if 0.9 <= r <= 1.2 else 0.0 for r in plain]
    assert known({"kind": "icepop", "level": "sequence", "low": 0.9, "high": 1.2}) == pytest.approx(inside)
    assert 0.0 in inside and plain != inside


def test_the_clip_of_an_answer_looks_at_each_tokens_own_sign() -> None:
    strength = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    rule = {"kind": "ppo", "level": "sequence", "low": 0.1, "high": 0.1}
    a, _, _, b, _ = geometric(NOW, SAMPLER)
    assert a > 1.1 and b > 1.1
    assert known(rule, strength=strength) == pytest.approx([0.0, a, 1.0, 0.0, b])


def test_a_proximal_anchor_leaves_its_frozen_ratio_to_the_sampler() -> None:
    frozen = [math.exp(float(p - s)) for p, s in zip(PROXIMAL, SAMPLER, strict=True)]
    frozen[2] = 1.0
    assert known({"kind": "ratio", "against": "proximal"}) == pytest.approx(frozen)
    assert known({"kind": "ppo", "against": "proximal"}) == pytest.approx(frozen)
    capped = [min(f, 1.2) for f in frozen]
    assert known({"kind": "tis", "against": "proximal", "cap": 1.2}) == pytest.approx(capped)
    now = [math.exp(float(p - s)) for p, s in zip(NOW, SAMPLER, strict=True)]
    now[2] = 1.0
    assert known({"kind": "ratio", "against": "proximal"}, proximal=None) == pytest.approx(now)


def test_an_answers_ratio_against_the_anchor_times_the_anchors_own_is_its_ratio_against_the_sampler() -> None:
    whole = known({"kind": "ratio", "level": "sequence", "against": "proximal"})
    assert whole == pytest.approx(geometric(NOW, SAMPLER))


def test_what_a_rule_changed_can_be_read_from_what_it_left() -> None:
    ratio = torch.tensor([0.3, 1.0, 1.9, 3.0])
    for rule, expected in (
        ({"kind": "tis", "cap": 2.0}, [False, False, False, True]),
        ({"kind": "icepop", "low": 0.5, "high": 2.0}, [True, False, False, True]),
        ({"kind": "ratio"}, [False] * 4),
    ):
        made = RULE.validate_python(rule)
        assert clipped(made, bounded(made, ratio, None)).tolist() == expected


def test_prefix_weights_fall_from_one_plus_gamma_as_the_gap_is_used_up() -> None:
    gap = torch.tensor([0.5, -1.5, 99.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    trained = torch.tensor([True, True, False, True, True, True])
    lengths, gamma, expected, start = [4, 2], 0.5, [], 0
    for length in lengths:
        part = range(start, start + length)
        total = sum(abs(float(gap[k])) for k in part if trained[k])
        expected += [
            1 + gamma * (1 - sum(abs(float(gap[k])) for k in part if trained[k] and k < t) / total) for t in part
        ]
        start += length
    assert prefix_weight(gap, trained, lengths, gamma).tolist() == pytest.approx(expected)


def test_prefix_weights_stand_without_a_gap_and_with_an_infinite_one() -> None:
    none = prefix_weight(torch.zeros(3), torch.ones(3, dtype=torch.bool), [3], 0.5)
    assert none.tolist() == [1.5, 1.5, 1.5]
    gap = torch.tensor([1.0, -math.inf, 1.0])
    assert prefix_weight(gap, torch.ones(3, dtype=torch.bool), [3], 0.5).tolist() == [1.5, 1.5, 1.0]
