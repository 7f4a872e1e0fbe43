"""Every vetted preset on models whose every answer is there: what the real learner expects to do is the declared field.

See `tables.py` for what an expectation is here, `cases.py` for the declared fields and the formulas of the sources.
"""

from __future__ import annotations

import pytest

from opd.config.presets import METHODS
from tests import rooms
from tests.oracle.presets.vetted import VETTED
from tests.oracle.presets.worlds import AGES

SAME = 1e-9
pytestmark = pytest.mark.usefixtures("exact_records")


def test_no_vetted_preset_is_left_out() -> None:
    assert {case.preset for case in VETTED.values()} == {n for n, m in METHODS.items() if m.status == "vetted"}


@pytest.mark.parametrize("age", AGES)
@pytest.mark.parametrize("name", VETTED)
def test_O_01_expected_gradient_is_the_declared_field_and_the_sources_formula(name: str, age: str) -> None:
    case = VETTED[name]
    world = case.world(AGES[age])
    made, source = case.gradient(world), case.source(world)
    if name == "self_sft" and age == "fresh":
        assert max(made.abs().max(), source.abs().max()) < 1e-15, "zero in expectation at the start"
        return
    assert made.norm() > 1e-3
    assert rooms.distance(made, source) < SAME
    apart = rooms.distance(made, case.declared(world))
    assert apart < SAME if age in case.exact else apart > 1e-3
