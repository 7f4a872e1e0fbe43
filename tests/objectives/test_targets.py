"""Targets as coefficients: each against its formula in log-probabilities, and routes that do not exist."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from opd.config.targets import AnyTarget
from opd.errors import ConfigError, DataError
from opd.objectives.targets import coefficients, scorers
from tests.objectives.answers import answer

TARGET = TypeAdapter(AnyTarget)
LOGS = {"teacher": -0.3, "math": -0.7, "code": -1.1, "reference": -2.3, "weak": -1.9, "student": -0.9}


def log_target(spec: dict | str, step: int = 0, **row) -> float:
    """sum_k c_k log m_k at a token where the models' log-probabilities are `LOGS`."""
    made = coefficients(TARGET.validate_python(spec), answer(**row), step)
    return math.fsum(c * LOGS[name] for name, c in made.items())


def test_a_single_scorer_is_itself() -> None:
    assert coefficients(TARGET.validate_python("math"), answer(), 0) == {"math": 1.0}


@pytest.mark.parametrize(("domain", "expected"), [("m", "math"), ("c", "code"), ("x", "teacher")])
def test_routes_go_by_domain_and_otherwise(domain: str, expected: str) -> None:
    spec = {"kind": "routed", "routes": {"m": "math", "c": "code"}, "otherwise": "teacher"}
    assert coefficients(TARGET.validate_python(spec), answer(domain=domain), 0) == {expected: 1.0}


def test_routes_go_by_a_column_of_any_type() -> None:
    target = TARGET.validate_python({"kind": "routed", "by": "level", "routes": {"1": "math", "2": "code"}})
    assert scorers(target, answer(columns={"level": 2})) == {"code"}


def test_a_row_without_a_route_says_which_there_are() -> None:
    target = TARGET.validate_python({"kind": "routed", "routes": {"m": "math"}})
    with pytest.raises(DataError, match=r"row a has domain 'd'.*it has m.*otherwise"):
        coefficients(target, answer(), 0)
    by_column = TARGET.validate_python({"kind": "routed", "by": "level", "routes": {"m": "math"}})
    with pytest.raises(DataError, match=r"row a has no column 'level'.*its columns: x"):
        coefficients(by_column, answer(columns={"x": 1}), 0)


@given(scale=st.floats(0, 3))
def test_O_15_lambda_moves_the_target_from_the_reference_to_beyond_the_teacher(scale: float) -> None:
    """log q~ = log m + lambda (log q - log m); the reference is read for every lambda but 1."""
    spec = {"kind": "extrapolated", "scale": scale}
    m, q = LOGS["reference"], LOGS["teacher"]
    assert log_target(spec) == pytest.approx(m + scale * (q - m))
    assert ("reference" in scorers(TARGET.validate_python(spec), answer())) == (scale != 1)


def test_every_teacher_has_its_own_lambda_and_reference() -> None:
    spec = {
        "kind": "extrapolated",
        "teacher": {"kind": "routed", "routes": {"m": "math", "c": "code"}},
        "reference": {"math": "reference", "code": "weak"},
        "scale": {"math": 1.25, "code": 0.5},
    }
    assert log_target(spec, domain="m") == pytest.approx(1.25 * LOGS["math"] - 0.25 * LOGS["reference"])
    assert log_target(spec, domain="c") == pytest.approx(0.5 * LOGS["code"] + 0.5 * LOGS["weak"])
    without = TARGET.validate_python({**spec, "reference": {"math": "reference"}})
    with pytest.raises(ConfigError, match=r"target\.reference has nothing for the teacher 'code'"):
        coefficients(without, answer(domain="c"), 0)


def test_O_15_a_teacher_with_lambda_1_needs_no_reference() -> None:
    spec = {
        "kind": "extrapolated",
        "teacher": {"kind": "routed", "routes": {"m": "math", "c": "code"}},
        "reference": {"math": "reference"},
        "scale": {"math": 1.25, "code": 1.0},
    }
    assert coefficients(TARGET.validate_python(spec), answer(domain="c"), 0) == {"code": 1.0}
    assert scorers(TARGET.validate_python(spec), answer(domain="m")) == {"math", "reference"}


def test_products_and_deltas_follow_their_formulas() -> None:
    weights = {"math": 0.25, "code": 0.75}
    assert log_target({"kind": "product", "weights": weights}) == pytest.approx(
        0.25 * LOGS["math"] + 0.75 * LOGS["code"]
    )
    delta = {"kind": "delta", "strong": "teacher", "weak": "weak", "base": "reference", "alpha": 0.8}
    expected = LOGS["reference"] + (LOGS["teacher"] - LOGS["weak"]) / 0.8
    assert log_target(delta) == pytest.approx(expected)


def test_a_scorer_named_twice_counts_with_the_sum() -> None:
    target = TARGET.validate_python(
        {"kind": "delta", "strong": "teacher", "weak": "weak", "base": "weak", "alpha": 0.5}
    )
    assert coefficients(target, answer(), 0) == {"weak": -1.0, "teacher": 2.0}


@pytest.mark.parametrize(("step", "share"), [(0, 0.5), (25, 0.25), (50, 0.0), (90, 0.0)])
def test_veto_takes_its_share_of_the_student_at_the_step(step: int, share: float) -> None:
    spec = {"kind": "veto", "share": {"start": 0.5, "end": 0.0, "steps": 50}}
    assert log_target(spec, step) == pytest.approx(LOGS["teacher"] + share * LOGS["student"])
    assert scorers(TARGET.validate_python(spec), answer()) == {"teacher"}, "nobody else has to read for the student"
    assert ("student" in coefficients(TARGET.validate_python(spec), answer(), step)) == (share > 0)
