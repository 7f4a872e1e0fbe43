"""The share of a step's tokens that is worth training, chosen over the whole step before anything is accumulated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from opd.config.slots import Selection

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating]
DIGITS = 17  # binary, of a score: a float32 has 24, of which batching changes a few


@dataclass(frozen=True)
class TokenLook:
    """What a pass without gradients saw at the tokens of one answer, float [T].

    entropy_T    of the student, in nats.
    divergence   term name to the divergence of the student from the term's target, for terms that select by it.
    """

    entropy_T: FloatArray
    divergence: Mapping[str, FloatArray] = field(default_factory=dict)


def select(
    rule: Selection, masks: Mapping[str, BoolArray], looks: Mapping[str, TokenLook], term: str
) -> dict[str, BoolArray]:
    """Rollout id to bool [T]: of the tokens in `masks`, the ceil(share x tokens) with the largest score.

        entropy     the student's entropy
        divergence  the divergence from the target
        either      1 - (1 - u)(1 - v) with u, v the ranks of both in [0, 1], equal values sharing their mean rank
                    (the soft-or of TIP)

    Equal scores are taken in the order of rollout id and position: neither the order of answers nor the cut into
    micro-batches decides. All answers of the step must be present.
    """
    keys = sorted(key for key, mask in masks.items() if mask.any())  # the others were not looked at
    mask_T = np.concatenate([masks[key] for key in keys]) if keys else np.zeros(0, np.bool_)
    chosen_T = np.zeros(len(mask_T), np.bool_)
    if mask_T.any():
        entropy_T = _settled(np.concatenate([looks[key].entropy_T for key in keys])[mask_T])
        score_T = entropy_T
        if rule.by != "entropy":
            score_T = _settled(np.concatenate([looks[key].divergence[term] for key in keys])[mask_T])
        if rule.by == "either":
            score_T = 1.0 - (1.0 - ranks(entropy_T)) * (1.0 - ranks(score_T))
        order_T = np.argsort(-score_T, kind="stable")[: math.ceil(rule.share * len(score_T))]
        chosen_T[np.flatnonzero(mask_T)[order_T]] = True
    ends = np.cumsum([len(masks[key]) for key in keys])[:-1]
    none = {key: np.zeros(len(mask), np.bool_) for key, mask in masks.items()}
    return none | (dict(zip(keys, np.split(chosen_T, ends), strict=True)) if keys else {})


def _settled(value_T: FloatArray) -> FloatArray:
    """Rounded to `DIGITS` binary digits. Answers to one prompt share their first state and its score: which of these
    tokens is chosen must not hang on what the cut into micro-batches does to the last digits."""
    mantissa_T, exponent_T = np.frexp(value_T)
    return np.ldexp(np.round(np.ldexp(mantissa_T, DIGITS)), exponent_T - DIGITS)


def ranks(value_T: FloatArray) -> NDArray[np.float64]:
    """float64 [T]: 0 for the smallest, 1 for the largest value; equal values share the mean of their ranks."""
    if len(value_T) < 2:
        return np.ones(len(value_T))
    _, place_T, count = np.unique(value_T, return_inverse=True, return_counts=True)
    before = np.cumsum(count) - count
    return (before + (count - 1) / 2)[place_T] / (len(value_T) - 1)
