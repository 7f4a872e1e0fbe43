"""Every preset with one writer: the world it is run in, the field that it declares, and its formula from the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opd.config.objective import Objective as ObjectiveSpec
from opd.config.presets import expand
from opd.objectives.oracle import divergences as d
from tests.oracle.presets import fields, tables
from tests.oracle.presets.expectation import Loss, in_pairs, mean_over_answers
from tests.oracle.presets.tables import World
from tests.oracle.presets.worlds import ALL, BASES, ROUTES, SPECIAL, UNITS


@dataclass(frozen=True)
class Case:
    """A preset and what it is compared with.

    world     from the noise between sampler and student.
    declared  the declared field, from the oracle.
    source    the method's own formula.
    exact     the ages at which field and gradient agree; at others the difference is a number in `test_biases.py`.
    grouped   every group of two answers instead of one group of all.
    """

    preset: str
    world: Callable[[float], World]
    declared: Callable[[World], Tensor]
    source: Callable[[World], Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    exact: tuple[str, ...] = ALL
    behaviour: str = "student"
    units: int = sum(UNITS)
    grouped: bool = False
    special: frozenset[int] = frozenset()

    @property
    def spec(self) -> ObjectiveSpec:
        return objective(self.preset, self.parameters)

    def gradient(self, world: World) -> Tensor:
        """What the real learner expects to do."""
        made = tables.pairs(world, self.units) if self.grouped else tables.population(world, self.units, self.behaviour)
        return tables.gradient(world, self.spec, made, special_ids=self.special)


def objective(preset: str, parameters: Mapping[str, Any] | None = None) -> ObjectiveSpec:
    made = expand(preset, parameters or {})
    return ObjectiveSpec(behaviour=made.behaviour, terms=made.terms)


# ---- fields and sources ----------------------------------------------------------------------------------------


def local(divergence: d.Divergence, target: fields.Table = fields.teacher) -> Callable[[World], Tensor]:
    return lambda world: fields.local(world, divergence, target)


def answers(loss: Loss, *, by_answer: bool = False) -> Callable[[World], Tensor]:
    return lambda world: mean_over_answers(world, loss, by_answer=by_answer)


def on_top(divergence: d.Divergence, k: int, of: str) -> d.Divergence:
    """The divergence over k entries and the rest."""
    bucketed = d.bucketed(divergence)
    return lambda logp, logq: bucketed(logp, logq, d.top_k_mask(logq if of == "teacher" else logp, k))


def rescaled_on_top(divergence: d.Divergence, k: int) -> d.Divergence:
    rescaled = d.renormalised(divergence)
    return lambda logp, logq: rescaled(logp, logq, d.top_k_mask(logq, k))


def not_special(world: World, prompt: int) -> Tensor:
    return 1 - world.tree.logprobs(world.writer[prompt])[:, SPECIAL].exp()


def after_first(world: World, prompt: int) -> Tensor:
    return torch.tensor([float(len(state) >= 1) for state in world.tree.states], dtype=torch.float64)


def routed(world: World, prompt: int) -> Tensor:
    return world.scorer(ROUTES[world.asked[prompt]], prompt)


def extrapolated(scale: float) -> fields.Table:
    return fields.product({"teacher": scale, "reference": 1 - scale})


def corrected(world: World, prompt: int) -> Tensor:
    """Every teacher with the model that it was before its RL."""
    name = ROUTES[world.asked[prompt]]
    return fields.product({name: 1.25, BASES[name]: -0.25})(world, prompt)


def by_writer(world: World, prompt: int) -> Tensor:
    return world.writer[prompt]


def both(*made: Callable[[World], Tensor]) -> Callable[[World], Tensor]:
    return lambda world: torch.stack([one(world) for one in made]).sum(0)


def times(factor: float, made: Callable[[World], Tensor]) -> Callable[[World], Tensor]:
    return lambda world: factor * made(world)


def rewarded_in_pairs(world: World) -> Tensor:
    """The policy gradient of that advantage; prompts differ in who is likely."""
    assert world.rewards is not None
    sign_NN = (world.rewards[:, None] - world.rewards[None]).sign()

    def credit(w: World, prompt: int) -> Tensor:
        return fields.of_answers(sign_NN @ w.tree.chances(w.writer[prompt]), w.tree)

    return fields.policy(world, credit)


def rewarded_in_one_group(world: World) -> Tensor:
    """(r - E[r]) / deviation over all answers: the gradient of the expected reward over its deviation."""
    assert world.rewards is not None
    chance_N = world.tree.chances(world.writer[0])
    gap_N = world.rewards - (chance_N * world.rewards).sum()
    scaled_N = gap_N / (chance_N * gap_N.square()).sum().sqrt()
    return fields.policy(world, lambda w, prompt: fields.of_answers(scaled_N, w.tree))


def pairs_of(loss: Loss) -> Callable[[World], Tensor]:
    return lambda world: mean_over_answers(world, in_pairs(world, loss))
