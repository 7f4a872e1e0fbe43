"""Targets as numbers: log q~ = sum_k c_k log m_k, with the coefficients c_k of one answer by scorer name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.config.slots import at
from opd.config.targets import STUDENT, Delta, Extrapolated, Product, Routed, Single, Target, Veto
from opd.errors import ConfigError, DataError
from opd.types import Rollout


def coefficients(target: Target, rollout: Rollout, step: int) -> dict[str, float]:
    """Scorer to c_k for the tokens of one answer, at a step counted from 0; zeros are left out.

        single        {scorer: 1}
        routed        {the scorer that the row names: 1}
        product       its weights
        extrapolated  {teacher: lambda, reference: 1 - lambda}            (G-OPD, arXiv 2602.12125)
        delta         {base: 1, strong: 1 / alpha, weak: -1 / alpha}      (CompassOPD, arXiv 2609.10154)
        veto          {scorer: 1, student: share at the step}

    A scorer that is named twice gets the sum. DataError when a row has no route, ConfigError when a teacher of an
    extrapolated target has no reference or lambda.
    """
    summed: dict[str, float] = {}
    for name, value in _parts(target, rollout, step):
        summed[name] = summed.get(name, 0.0) + value
    return {name: value for name, value in summed.items() if value != 0}


def scorers(target: Target, rollout: Rollout) -> frozenset[str]:
    """Names of the models that must read the answer; the student itself is not one of them."""
    return frozenset(coefficients(target, rollout, 0)) - {STUDENT}


def route(target: Routed, rollout: Rollout) -> str:
    """The scorer of a row; DataError when there is none."""
    row = rollout.prompt.row
    if target.by == "domain":
        value: Any = row.domain
    elif target.by in row.columns:
        value = row.columns[target.by]
    elif target.otherwise is not None:
        return target.otherwise
    else:
        have = ", ".join(sorted(row.columns)) or "none"
        raise DataError(
            f"row {row.id} has no column {target.by!r}, by which target.by routes it (its columns: {have}). Add the "
            "column, or name a scorer in target.otherwise."
        )
    if str(value) in target.routes:
        return target.routes[str(value)]
    if target.otherwise is not None:
        return target.otherwise
    raise DataError(
        f"row {row.id} has {target.by} {str(value)!r}, for which target.routes has no scorer (it has "
        f"{', '.join(sorted(target.routes))}). Add a route, or name a scorer in target.otherwise."
    )


def _parts(target: Target, rollout: Rollout, step: int) -> list[tuple[str, float]]:
    if isinstance(target, Single):
        return [(target.scorer, 1.0)]
    if isinstance(target, Routed):
        return [(route(target, rollout), 1.0)]
    if isinstance(target, Product):
        return list(target.weights.items())
    if isinstance(target, Extrapolated):
        inner = target.teacher
        teacher = inner.scorer if isinstance(inner, Single) else route(inner, rollout)
        scale = _of(target.scale, teacher, "scale")
        if scale == 1:  # it is the teacher itself, and needs no reference
            return [(teacher, 1.0)]
        return [(teacher, scale), (_of(target.reference, teacher, "reference"), 1.0 - scale)]
    if isinstance(target, Delta):
        return [(target.base, 1.0), (target.strong, 1.0 / target.alpha), (target.weak, -1.0 / target.alpha)]
    assert isinstance(target, Veto), f"no such target: {target.kind}"
    return [(target.scorer, 1.0), (STUDENT, at(target.share, step))]


def _of(value: Any, teacher: str, field: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if teacher not in value:
        raise ConfigError(
            f"target.{field} has nothing for the teacher {teacher!r} (it has {', '.join(sorted(value))}). Add it, or "
            "give one for all."
        )
    return value[teacher]
