"""What presets do that their divergence does not say, as numbers: |g - wanted| / |wanted|, and the cosine of the two.

g is the expected gradient of the real learner (`tables.py`). The numbers belong to the models of `cases.py`; that they
are not zero, and what they are caused by, does not depend on them. Each is computed anew, and pinned so that a change
of an estimator cannot pass as rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opd.objectives.oracle import bias, return_field, sequence_field
from opd.objectives.oracle import divergences as d
from tests import rooms
from tests.oracle.presets import fields, sources, tables
from tests.oracle.presets.cases import local, objective, on_top, rescaled_on_top, rewarded_in_one_group, routed
from tests.oracle.presets.expectation import in_pairs, mean_over_answers
from tests.oracle.presets.experimental import inverse_length
from tests.oracle.presets.tables import World
from tests.oracle.presets.vetted import TILT, VETTED
from tests.oracle.presets.worlds import AGES, ROUTES, two_domains

pytestmark = pytest.mark.usefixtures("exact_records")


@dataclass(frozen=True)
class Pinned:
    """Against `wanted`, at an age of the answers: relative error and cosine, and why it is not 0 and 1."""

    case: str
    age: str
    wanted: Callable[[World], Tensor]
    relative: float
    cosine: float
    why: str


def declared(name: str) -> Callable[[World], Tensor]:
    return VETTED[name].declared


def in_own_states(world: World) -> World:
    """The same models, with the student as it is now writing."""
    return World(world.tree, world.student, world.student, world.scorers, world.asked, world.instead, world.rewards)


def sequence_reverse_kl(world: World) -> Tensor:
    """The gradient of KL(p(y) || q(y)) per token of the student's own answers."""
    made = sequence_field(world.tree, world.student[0], fields.teacher(world, 0), d.reverse_kl)[None]
    return made / fields.tokens(in_own_states(world))


def expected_reward(world: World) -> Tensor:
    """Minus the gradient of E[reward], over the deviation and per token: as of one group that holds everything."""
    return rewarded_in_one_group(in_own_states(world))


def rescaled_forward(logp_SV: Tensor, logq_SV: Tensor) -> Tensor:
    return d.renormalised(d.forward_kl)(logp_SV, logq_SV, d.top_k_mask(logq_SV, 2))


def by_answer(world: World) -> Tensor:
    return mean_over_answers(world, in_pairs(world, sources.grpo(0.2)), by_answer=True)


def every_state(world: World) -> Tensor:
    return fields.local(world, rescaled_on_top(d.reverse_kl, 2))


PINNED = (
    Pinned("tml", "near", declared("tml"), 0.03711, 0.9997, "the advantage has the sampler's log-probability"),
    Pinned("tml", "old", declared("tml"), 0.8938, 0.7882, "the same, on older answers"),
    Pinned("tml, discount 1", "old", declared("tml, discount 1"), 0.8795, 0.7835, "the same, summed"),
    Pinned("tml, discount 1", "old", sequence_reverse_kl, 1.097, 0.7016, "and a ratio per token, not per prefix"),
    Pinned("mopd", "old", declared("mopd"), 0.8355, 0.5666, "IcePop drops ratios outside [0.5, 2]"),
    Pinned("mopd with rewards", "old", declared("mopd with rewards"), 0.7639, 0.6641, "the same"),
    Pinned("exopd, cap 1.5", "old", declared("exopd, cap 1.5"), 0.197, 0.9890, "the cap of 1.5 holds"),
    Pinned(
        "exopd, discount 1",
        "old",
        lambda w: fields.policy(in_own_states(w), fields.to_go(1.0, TILT)),
        0.7242,
        0.7323,
        "a ratio per token, not the product over the answer",
    ),
    Pinned("compass", "near", declared("compass"), 0.02741, 0.9997, "drawn tokens without a ratio"),
    Pinned("compass", "old", declared("compass"), 0.5586, 0.8519, "the same, on older answers"),
    Pinned(
        "lsm",
        "fresh",
        local(d.reverse_kl),
        1.027,
        0.0751,
        "rescaled to the teacher's two likeliest; special tokens masked",
    ),
    Pinned(
        "lsm", "fresh", every_state, 0.2917, 0.9866, "special tokens masked: what is drawn decides which states count"
    ),
    Pinned(
        "sdft",
        "fresh",
        local(d.forward_kl),
        0.0953,
        0.9956,
        "one class for the rest: the shape of the tail is not seen",
    ),
    Pinned("sdpo", "fresh", local(d.jensen_shannon(0.5)), 0.1456, 0.9894, "the same"),
    Pinned(
        "sdft",
        "fresh",
        local(rescaled_forward),
        1.048,
        0.5984,
        "the rest is kept: two codes rescale to the top k instead",
    ),
    Pinned(
        "sdft, skip_first 1",
        "fresh",
        local(on_top(d.forward_kl, 2, "teacher")),
        0.8771,
        0.6252,
        "the first state gets nothing, the others more each",
    ),
    Pinned(
        "minillm",
        "fresh",
        sequence_reverse_kl,
        0.3849,
        0.9650,
        "mixture's states, discount, mean instead of sum, token ratio",
    ),
    Pinned(
        "grpo", "fresh", expected_reward, 0.4602, 0.9888, "two answers: only which is better counts, not by how much"
    ),
    Pinned(
        "grpo", "fresh", by_answer, 0.1643, 0.9883, "a mean over all tokens: the paper takes every answer's own first"
    ),
    Pinned("grpo", "old", declared("grpo"), 0.4712, 0.9270, "the clip at 0.2 holds"),
    Pinned("grpo, one group of all", "near", expected_reward, 0.005267, 1.0000, "a ratio per token, not the product"),
    Pinned(
        "grpo, one group of all", "old", declared("grpo, one group of all"), 0.3912, 0.9350, "the clip at 0.2 holds"
    ),
)


@pytest.mark.parametrize("pinned", PINNED, ids=lambda p: f"{p.case}, {p.age}, {p.why}")
def test_what_is_biased_by_design_is_so_by_this_much(pinned: Pinned) -> None:
    case = VETTED[pinned.case]
    world = case.world(AGES[pinned.age])
    found = bias(case.gradient(world), pinned.wanted(world))
    assert (found.relative, found.cosine) == pytest.approx((pinned.relative, pinned.cosine), rel=1e-3), pinned.why


def test_sequence_mean_weights_drawn_tokens_by_a_length_that_they_decide() -> None:
    """MOPD's report divides by each answer's own length. 1 / |y| depends on the drawn token, so that the expectation is
    not the field with every state weighted by E[1 / |y|]; over the whole vocabulary it is (`gkd`)."""
    world = two_domains(AGES["fresh"])
    spec = objective("mopd", {"routes": ROUTES, "reduction": "sequence_mean"})
    made = tables.gradient(world, spec, tables.population(world, 8))
    by_state = bias(made, fields.weighted_local(world, d.reverse_kl, inverse_length, routed))
    by_token = bias(made, fields.local(world, d.reverse_kl, routed))
    assert (by_state.relative, by_state.cosine) == pytest.approx((0.1007, 0.9966), rel=1e-3)
    assert (by_token.relative, by_token.cosine) == pytest.approx((0.08257, 0.9972), rel=1e-3)
    exact = (
        objective("reverse_kl")
        .terms[0]
        .model_copy(
            update={"reduction": "sequence_mean", "target": spec.terms[0].target}  # type: ignore[union-attr]
        )
    )
    whole = tables.gradient(world, spec.model_copy(update={"terms": (exact,)}), tables.population(world, 8))
    assert rooms.distance(whole, fields.weighted_local(world, d.reverse_kl, inverse_length, routed)) < 1e-9


def test_discount_1_on_fresh_answers_is_the_sequence_level_gradient() -> None:
    world = VETTED["tml, discount 1"].world(AGES["fresh"])
    made = VETTED["tml, discount 1"].gradient(world)
    assert rooms.distance(made, sequence_reverse_kl(world)) < 1e-9


def test_extrapolated_at_discount_1_pays_for_the_unnormalised_target() -> None:
    """The reward is scale log q + (1 - scale) log m - log p as it is: its optimum is the tilt of whole answers, and the
    sum of KLs to every state's normalised target is another objective."""
    case = VETTED["exopd, discount 1"]
    world = case.world(AGES["fresh"])
    made = case.gradient(world)
    tree, student = world.tree, world.student[0]
    reward_SV = TILT(world, 0) - tree.logprobs(student)
    assert rooms.distance(made[0], return_field(tree, student, reward_SV, 1.0) / fields.tokens(world)) < 1e-9
    normalised = sequence_field(tree, student, TILT(world, 0), d.reverse_kl) / fields.tokens(world)
    found = bias(made[0], normalised)
    assert (found.relative, found.cosine) == pytest.approx((0.08086, 0.9969), rel=1e-3)


def test_grpo_of_one_large_group_is_the_gradient_of_the_expected_reward_over_its_deviation() -> None:
    case = VETTED["grpo, one group of all"]
    world = case.world(AGES["fresh"])
    assert world.rewards is not None
    tree, table = world.tree, world.student[0].clone().requires_grad_()
    expected = (tree.chances(table) * world.rewards).sum()
    (raised,) = torch.autograd.grad(expected, table)
    chance_N = tree.chances(world.student[0])
    deviation = (chance_N * (world.rewards - expected.detach()).square()).sum().sqrt()
    assert rooms.distance(case.gradient(world)[0], -raised / deviation / fields.tokens(world)) < 1e-9
