"""How far small steps are from the population steps that the other tests use, and what float32 records do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from opd.models.causal import CausalLM
from opd.teachers.moving import Moving
from tests import rooms
from tests.oracle.presets import tables
from tests.oracle.presets.tables import World, noisy
from tests.oracle.presets.vetted import AVERAGED, VETTED
from tests.oracle.presets.worlds import AGES, TREE

NAMES = ("reverse_kl", "tml")


def sums_of_answers(name: str, world: World) -> Tensor:
    """[N, S, V]: what the real learner leaves for each answer as a step of its own."""
    made = []
    for n in range(TREE.answers):
        alone = [tables.rollout(world, 0, n, "one", "x")]
        made.append(tables.gradient(world, VETTED[name].spec, alone)[0])
    return torch.stack(made)


def in_steps_of(answers: int, own_NSV: Tensor, world: World) -> Tensor:
    """[S, V]: the exact expectation of (sum of losses) / (sum of tokens) over steps of so many independent answers.

    By symmetry answers x E[G_1 / (L_1 + ... + L_n)]; how long the other answers are together is a convolution.
    """
    length_N = TREE.mask_NT.sum(-1)
    chance_N = TREE.chances(world.writer[0])
    lengths = np.zeros(TREE.longest + 1)
    np.add.at(lengths, length_N.numpy(), chance_N.numpy())
    others = np.ones(1)
    for _ in range(answers - 1):
        others = np.convolve(others, lengths)
    inverse_N = torch.tensor([float((others / (np.arange(len(others)) + int(n))).sum()) for n in length_N])
    return torch.einsum("n,nsv->sv", answers * chance_N * length_N * inverse_N, own_NSV)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("exact_records")
def test_token_mean_of_few_answers_is_biased_and_less_with_every_answer(name: str) -> None:
    """A ratio of sums is not the ratio of expectations: off by about c / answers. With one answer in a step token_mean
    is the mean over that answer; with 256 there is little left."""
    world = VETTED[name].world(AGES["fresh"])
    field = VETTED[name].declared(world)[0]
    own_NSV = sums_of_answers(name, world)
    off = {n: rooms.distance(in_steps_of(n, own_NSV, world), field) for n in (1, 4, 16, 64, 256)}
    assert off[1] == pytest.approx({"reverse_kl": 0.1206, "tml": 0.1176}[name], rel=1e-3)
    assert off[256] == pytest.approx({"reverse_kl": 2.710e-4, "tml": 3.046e-4}[name], rel=1e-3)
    for few, many in ((16, 64), (64, 256)):
        assert off[few] / off[many] == pytest.approx(4, rel=0.05)


@pytest.mark.usefixtures("exact_records")
def test_a_step_of_two_answers_is_what_the_sums_say() -> None:
    world = VETTED["tml"].world(AGES["fresh"])
    own_NSV, length_N = sums_of_answers("tml", world), TREE.mask_NT.sum(-1)
    for first, second in ((0, 5), (7, 7), (3, 30)):
        step = [tables.rollout(world, 0, n, str(k), "x") for k, n in enumerate((first, second))]
        both = sum(own_NSV[n] * length_N[n] for n in (first, second)) / (length_N[first] + length_N[second])
        assert rooms.distance(tables.gradient(world, VETTED["tml"].spec, step)[0], both) < 1e-12


@pytest.mark.parametrize("name", ["tml", "mopd", "exopd", "minillm", "grpo"])
def test_float32_records_of_log_probabilities_move_the_gradient_by_rounding(name: str) -> None:
    case = VETTED[name]
    world = case.world(AGES["fresh"])
    apart = rooms.distance(case.gradient(world), case.source(world))
    assert 1e-10 < apart < 2e-7


def test_the_average_of_sdft_and_sdpo_is_the_teachers_in_their_cases() -> None:
    """`Moving` on the table itself: after a step the average has moved by its rate from the untrained student."""
    world = AVERAGED(AGES["near"])
    untrained = noisy(world.writer, 0.7, 10)
    student = tables.table_model(TREE, untrained)
    average = Moving("teacher", student, kind="ema", rate=0.5)
    with torch.no_grad():
        student.module.head.weight.copy_(world.student.flatten(0, 1).T)
    average.after_update(1)
    assert rooms.distance(table(average.model, world), world.scorers["teacher"]) < 1e-15


def table(model: CausalLM, world: World) -> Tensor:
    return model.head.weight_VD.T.reshape(world.student.shape)


def test_a_population_is_every_answer_as_often_as_it_is_likely() -> None:
    world = VETTED["reverse_kl"].world(AGES["fresh"])
    made = tables.population(world, 8)
    assert len(made) == 8**TREE.longest and len({r.id for r in made}) == len(made)
    for r in made[:: len(made) // 50]:
        alike = sum(np.array_equal(r.response_ids, other.response_ids) for other in made)
        assert alike / len(made) == pytest.approx(float(np.exp(r.behaviour_logprobs.sum())), rel=1e-12)
