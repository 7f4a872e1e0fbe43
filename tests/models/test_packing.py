"""Which rollouts share a micro-batch."""

from __future__ import annotations

import numpy as np

from opd.models.packing import plan
from tests import rooms


def made():
    prompts = rooms.prompts(rooms.prompt_format(), ["a"] * 40)
    lengths = np.random.default_rng(0).integers(1, 30, 40)
    return [rooms.answer(p, [5] * n, [-1.0] * n, k) for k, (p, n) in enumerate(zip(prompts, lengths, strict=True))]


def length(rollout) -> int:
    return len(rollout.prompt.ids) + len(rollout.response_ids)


def test_padded_rectangles_stay_within_the_budget_and_hold_every_rollout_once() -> None:
    rollouts = made()
    for budget in (1, 40, 100, 10_000):
        groups = plan(rollouts, budget)
        assert sorted(r.id for g in groups for r in g) == sorted(r.id for r in rollouts)
        assert all(len(g) == 1 or len(g) * max(map(length, g)) <= budget for g in groups)
    assert len(plan(rollouts, 1)) == len(rollouts) and len(plan(rollouts, 10_000)) == 1


def test_the_plan_does_not_depend_on_the_order_of_arrival() -> None:
    """Many have the same length: ties are broken by id."""
    rollouts = made()
    shuffled = [rollouts[i] for i in np.random.default_rng(1).permutation(len(rollouts))]
    assert [[r.id for r in g] for g in plan(rollouts, 60)] == [[r.id for r in g] for g in plan(shuffled, 60)]
