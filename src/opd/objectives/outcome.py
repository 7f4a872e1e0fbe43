"""From rewards of whole answers to advantages and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd.config.objective import DivergenceTerm, OutcomeTerm, Term
from opd.config.shapes import VerifierGatedKL
from opd.types import Rollout


def advantages(term: OutcomeTerm, rollouts_N: Sequence[Rollout]) -> dict[str, float]:
    """Rollout id to advantage (ascent sign), from all graded answers that the term reads in the step.

    group    (r - mean) / deviation among the answers to one prompt; the deviation is that of the group itself
             (divided by n, not n - 1), and answers with equal rewards get exactly 0 (GRPO, arXiv 2402.03300)
    centred  r - mean of the same group (Dr. GRPO, arXiv 2503.20783)
    plain    r

    Answers without a reward are in no group and get no entry.
    """
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts_N:
        if rollout.reward is not None:
            groups.setdefault(rollout.prompt.id, []).append(rollout)
    return {key: value for group in groups.values() for key, value in _of_group(term, group).items()}


def verdicts(term: Term, rollouts_N: Sequence[Rollout]) -> dict[str, bool] | None:
    """Rollout id to whether the answer is right, for verifier-gated shapes; None for others.

    Answers that nobody could grade get no entry: they are masked.
    """
    if not isinstance(term, DivergenceTerm) or not isinstance(term.shape, VerifierGatedKL):
        return None
    return {r.id: r.reward >= term.shape.right_from for r in rollouts_N if r.reward is not None}


def _of_group(term: OutcomeTerm, group: Sequence[Rollout]) -> dict[str, float]:
    reward_N = np.array([r.reward for r in group], dtype=np.float64)
    if term.advantage == "plain":
        advantage_N = reward_N
    elif reward_N.min() == reward_N.max():  # said exactly: the deviation of equal numbers is rounding noise
        advantage_N = np.zeros_like(reward_N)
    else:
        advantage_N = reward_N - reward_N.mean()
        if term.advantage == "group":
            advantage_N /= reward_N.std()
    return {r.id: float(a) for r, a in zip(group, advantage_N, strict=True)}
