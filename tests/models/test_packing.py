"""Which rollouts share a micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from opd.models.families import Padded
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


def families(prompts: Sequence[int], answers: Sequence[int]):
    """Every prompt of so many tokens has an answer of each length."""
    asked = rooms.prompts(rooms.prompt_format(), ["a"] * len(prompts))
    asked = [dataclasses.replace(p, ids=np.arange(n) + k) for k, (p, n) in enumerate(zip(asked, prompts, strict=True))]
    return [rooms.answer(p, [5] * a, [-1.0] * a, k) for p in asked for k, a in enumerate(answers)]


def ids(groups) -> list[list[str]]:
    return [[r.id for r in group] for group in groups]


def padded(group) -> Padded:
    prompts = {r.prompt.id for r in group}
    return Padded.of([len(r.prompt.ids) for r in group], [len(r.response_ids) for r in group], len(prompts))


def test_answers_to_one_prompt_stay_together_within_what_is_held() -> None:
    rollouts = families([60, 30, 45, 50], [9, 4, 7, 8, 2, 9])
    for budget in (160, 300, 1000):
        groups = plan(rollouts, budget, share_prompts=True)
        assert sorted(r.id for g in groups for r in g) == sorted(r.id for r in rollouts)
        assert all(padded(g).pays and padded(g).held <= budget for g in groups)
        assert sum(padded(g).read for g in groups) < 0.5 * sum(padded(g).plain for g in plan(rollouts, budget))
    assert [len(g) for g in plan(rollouts, 1000, share_prompts=True)] == [24]
    assert {len({r.prompt.id for r in g}) for g in plan(rollouts, 160, share_prompts=True)} == {1}


def test_a_family_that_does_not_fit_is_split() -> None:
    rollouts = families([100], [10] * 12)
    groups = plan(rollouts, 200, share_prompts=True)
    assert [len(g) for g in groups] == [4, 4, 4] and all(padded(g).held <= 200 for g in groups)
    assert [len(g) for g in plan(rollouts, 50, share_prompts=True)] == [1] * 12, "not even one fits"


def test_one_long_answer_does_not_pad_the_others() -> None:
    groups = plan(families([50], [10, 12, 400, 9]), 2000, share_prompts=True)
    assert [sorted(len(r.response_ids) for r in g) for g in groups] == [[400], [9, 10, 12]]


def test_the_plan_of_families_does_not_depend_on_the_order_of_arrival() -> None:
    rollouts = families([40, 40, 30, 2], [9, 4, 9, 20, 1]) + made()
    for budget in (80, 150, 400):
        whole = ids(plan(rollouts, budget, share_prompts=True))
        for seed in range(5):
            shuffled = [rollouts[i] for i in np.random.default_rng(seed).permutation(len(rollouts))]
            assert ids(plan(shuffled, budget, share_prompts=True)) == whole


def test_where_sharing_saves_little_the_plan_is_the_plain_one() -> None:
    alone = [r for n, r in enumerate(families(range(20, 60), [9, 5])) if n % 2]
    long = families([4, 5], [50, 40, 30])
    for rollouts in (alone, long, alone + families([30], [5, 5])):
        assert ids(plan(rollouts, 300, share_prompts=True)) == ids(plan(rollouts, 300))
