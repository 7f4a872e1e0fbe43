"""The models that the presets are run on: students, writers and scorers as tables, drawn once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd.objectives.oracle.tabular import Tree, tree
from tests.oracle.presets.tables import World, noisy, shares

END = 3
SPECIAL = 1
TREE = tree(4, 3, END)  # answers of one to three tokens
SHORT = tree(4, 2, END)  # two prompts
SMALL = tree(3, 2, 2)  # groups of two answers: pairs of pairs
UNITS = (4, 2, 1, 1)
SMALL_UNITS = (2, 1, 1)
AGES = {"fresh": 0.0, "near": 0.05, "old": 1.0}  # noise on the student's logits since the answers were drawn
ALL = tuple(AGES)
ROUTES = {"math": "math_teacher", "code": "code_teacher"}
BASES = {"math_teacher": "math_base", "code_teacher": "code_base"}


def random(world: Tree, seed: int, prompts: int = 1) -> Tensor:
    return torch.stack([world.random_table(seed + 10 * p) for p in range(prompts)])


def base(noise: float) -> World:
    writer = shares(TREE, UNITS, seed=0)
    scorers = {"teacher": random(TREE, 5), "reference": random(TREE, 6), "weak": random(TREE, 7)}
    return World(TREE, noisy(writer, noise, 9), writer, scorers)


def by_teacher(noise: float) -> World:
    """The teacher writes."""
    made = base(noise)
    return World(TREE, noisy(random(TREE, 8), noise, 9), made.writer, {"teacher": made.writer})


def by_data(noise: float) -> World:
    return World(TREE, noisy(random(TREE, 8), noise, 9), shares(TREE, UNITS, seed=0))


def by_untrained(noise: float) -> World:
    """The student before training writes and is the scorer."""
    made = base(noise)
    return World(TREE, made.student, made.writer, {"teacher": made.writer})


def mixed(noise: float, alpha: float = 0.2) -> World:
    """alpha q + (1 - alpha) p writes; q and the mixture are given, and p is what is left."""
    writer, teacher = shares(TREE, UNITS, seed=0), shares(TREE, UNITS, seed=1)
    student = ((writer.exp() - alpha * teacher.exp()) / (1 - alpha)).log()
    return World(TREE, noisy(student, noise, 9), writer, {"teacher": teacher})


def cut(noise: float) -> World:
    """The sampler leaves out the unlikeliest token, top_p 0.9: 0.94 of the student is what it draws from."""
    writer = shares(TREE, (2, 1, 1, 0), seed=0)
    student = torch.where(writer.isinf(), 0.06, 0.94 * writer.exp()).log()
    return World(TREE, noisy(student, noise, 9), writer, {"teacher": random(TREE, 5)})


def told_more(average: Callable[[Tensor, Tensor], Tensor]) -> Callable[[float], World]:
    """The scorer is the student of another time, and reads prompt 1 where the student reads 0."""

    def world(noise: float) -> World:
        writer = shares(TREE, UNITS, seed=0, prompts=2)
        student, untrained = noisy(writer, noise, 9), noisy(writer, 0.7, 10)
        return World(TREE, student, writer, {"teacher": average(untrained, student)}, instead={"teacher": {0: 1}})

    return world


def two_domains(noise: float) -> World:
    writer = shares(SHORT, UNITS, seed=0, prompts=2)
    names = (*ROUTES.values(), *BASES.values())
    scorers = {name: random(SHORT, seed, 2) for seed, name in enumerate(names, 5)}
    return World(SHORT, noisy(writer, noise, 9), writer, scorers, asked={0: "math", 1: "code"})


def graded(noise: float) -> World:
    writer = shares(SMALL, SMALL_UNITS, seed=0)
    scorers = {"teacher": random(SMALL, 5), "reference": random(SMALL, 6)}
    return World(SMALL, noisy(writer, noise, 9), writer, scorers, rewards=rewards(SMALL))


def graded_alone(noise: float) -> World:
    made = graded(noise)
    return World(SMALL, made.student, made.writer, rewards=made.rewards)


def graded_anchored(noise: float) -> World:
    made = graded(noise)
    return World(SMALL, made.student, made.writer, {"reference": made.scorers["reference"]}, rewards=made.rewards)


def graded_domains(noise: float) -> World:
    writer = shares(SMALL, SMALL_UNITS, seed=0, prompts=2)
    scorers = {name: random(SMALL, seed, 2) for seed, name in enumerate(ROUTES.values(), 5)}
    student = noisy(writer, noise, 9)
    return World(SMALL, student, writer, scorers, asked={0: "math", 1: "code"}, rewards=rewards(SMALL))


def rewards(world: Tree) -> Tensor:
    """0, 1/4, ..., 1 of every answer."""
    made = torch.Generator().manual_seed(3)
    return torch.randint(0, 5, (world.answers,), generator=made).double() / 4


def only(*names: str) -> Callable[[float], World]:
    """The base world with these scorers."""

    def world(noise: float) -> World:
        made = base(noise)
        return World(TREE, made.student, made.writer, {name: made.scorers[name] for name in names})

    return world
