"""The presets marked experimental, as `test_vetted.py`; and those for which several write in one step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from opd.config.presets import METHODS
from opd.objectives.oracle import divergences as d
from tests import rooms
from tests.oracle.presets import fields, sources, tables
from tests.oracle.presets.cases import objective
from tests.oracle.presets.expectation import mean_over_answers
from tests.oracle.presets.experimental import EXPERIMENTAL, inverse_length
from tests.oracle.presets.tables import World, shares
from tests.oracle.presets.worlds import AGES, TREE, UNITS, only

SAME = 1e-9
MIXTURES = {"gkd", "distillm", "distillm2"}
pytestmark = pytest.mark.usefixtures("exact_records")


def test_no_experimental_preset_is_left_out() -> None:
    tested = {case.preset for case in EXPERIMENTAL.values()} | MIXTURES
    assert tested == {name for name, method in METHODS.items() if method.status == "experimental"}


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("name", EXPERIMENTAL)
def test_expected_gradient_is_the_declared_field_and_the_sources_formula(name: str, age: str) -> None:
    case = EXPERIMENTAL[name]
    world = case.world(AGES[age])
    made = case.gradient(world)
    assert made.norm() > 1e-2
    assert rooms.distance(made, case.source(world)) < SAME
    apart = rooms.distance(made, case.declared(world))
    assert apart < SAME if age in case.exact else apart > 1e-3


def test_kdrl_k2_differentiated_is_its_second_term_on_fresh_answers() -> None:
    world = EXPERIMENTAL["kdrl"].world(0.0)
    clipped, k2 = (mean_over_answers(world, x) for x in (sources.reverse_kl_clipped(0.2), sources.k2))
    assert rooms.distance(clipped, k2) < SAME


def writers() -> tuple[World, World]:
    """The student's answers, and somebody else's, with the same student and teacher."""
    ours = only("teacher")(0.0)
    return ours, dataclasses.replace(ours, writer=shares(TREE, UNITS, seed=4))


def test_gkd_is_the_mean_of_a_step_of_the_students_and_one_of_the_datas() -> None:
    """Per batch by lot: with probability lambda a whole step is the student's."""
    ours, theirs = writers()
    spec = objective("gkd", {"on_policy": 0.3})
    steps = (
        (0.3, ours, tables.gradient(ours, spec, tables.population(ours, 8))),
        (0.7, theirs, tables.gradient(theirs, spec, tables.population(theirs, 8, "dataset"))),
    )
    made = total(share * gradient for share, _, gradient in steps)
    field = total(
        share * fields.weighted_local(world, d.jensen_shannon(0.5), inverse_length) for share, world, _ in steps
    )
    source = total(share * mean_over_answers(world, sources.jsd(0.5), by_answer=True) for share, world, _ in steps)
    assert rooms.distance(made, field) < SAME and rooms.distance(made, source) < SAME


@pytest.mark.parametrize(
    ("divergence", "exact", "typed"),
    [
        ("skl", d.skew_forward_kl(0.1), sources.skew_forward_kl(0.1)),
        ("srkl", d.skew_reverse_kl(0.1), sources.skew_reverse_kl(0.1)),
    ],
)
def test_distillm_is_one_mean_over_the_tokens_of_both_writers(divergence: str, exact, typed) -> None:
    """Per prompt by lot: both write in a step, half each, and its tokens are counted together."""
    ours, theirs = writers()
    step = tables.population(ours, 8) + tables.population(theirs, 8, "dataset")
    made = tables.gradient(ours, objective("distillm", {"divergence": divergence}), step)
    tokens = [fields.tokens(world) for world in (ours, theirs)]
    parts = [x / sum(tokens) for x in tokens]
    field = total(part * fields.local(world, exact) for part, world in zip(parts, (ours, theirs), strict=True))
    source = total(part * mean_over_answers(world, typed) for part, world in zip(parts, (ours, theirs), strict=True))
    assert rooms.distance(made, field) < SAME and rooms.distance(made, source) < SAME


def test_distillm2_is_a_mean_over_the_teachers_and_one_over_the_students_answers() -> None:
    """Each term has its own denominator: the shares of the writers do not weight the two."""
    ours = only("teacher")(0.0)
    teacher = shares(TREE, UNITS, seed=4)
    ours = dataclasses.replace(ours, scorers={"teacher": teacher})
    theirs = dataclasses.replace(ours, writer=teacher)
    step = tables.population(ours, 8) + tables.population(theirs, 8, "teacher")
    made = tables.gradient(ours, objective("distillm2"), step)
    field = fields.local(theirs, d.skew_forward_kl(0.1)) + fields.local(ours, d.skew_reverse_kl(0.1))
    source = mean_over_answers(theirs, sources.skew_forward_kl(0.1)) + mean_over_answers(
        ours, sources.skew_reverse_kl(0.1)
    )
    assert rooms.distance(made, field) < SAME and rooms.distance(made, source) < SAME


def total(parts) -> Tensor:
    return torch.stack(list(parts)).sum(0)
