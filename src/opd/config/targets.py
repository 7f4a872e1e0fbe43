"""What a term pulls the student to: log q~ = sum_k c_k log m_k over scorers m_k, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from opd.config.slots import Number, Schedule
from opd.config.spec import Spec

STUDENT = "student"  # in a target: the student as it is now, held fixed


class Single(Spec):
    """One scorer's distribution."""

    kind: Literal["single"] = "single"
    scorer: str = "teacher"


class Routed(Spec):
    """For every row the scorer that its domain, or another column, names (MOPD)."""

    kind: Literal["routed"] = "routed"
    by: str = Field(default="domain", description="domain, or a column of the rows")
    routes: Mapping[str, str] = Field(min_length=1, description="value to scorer, e.g. {math: math_teacher}")
    otherwise: str | None = Field(default=None, description="scorer of other rows; none: another value is an error")


class Product(Spec):
    """Weighted geometric mean of scorers, normalised: sum_k w_k KL(p || m_k) up to a constant (DeepSeek-V4)."""

    kind: Literal["product"] = "product"
    weights: Mapping[str, float] = Field(min_length=1, description="scorer to weight; they add up to 1")

    @model_validator(mode="after")
    def _sum(self) -> Product:
        total = math.fsum(self.weights.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"the weights add up to {total:g}, which acts as a temperature: make it 1, and say temperatures as such"
            )
        return self


class Extrapolated(Spec):
    """G-OPD: m (q / m)^scale, beyond the teacher for scale > 1 (ExOPD), between both below."""

    kind: Literal["extrapolated"] = "extrapolated"
    teacher: Annotated[Single | Routed, BeforeValidator(lambda v: _named(v))] = Single()
    reference: str | Mapping[str, str] = Field(
        default="reference", description="a scorer, or one for every teacher, e.g. the model before its RL"
    )
    scale: float | Mapping[str, float] = Field(default=1.25, description="lambda, or one for every teacher")


class Delta(Spec):
    """What a strong model has over a weak one of its family, added to a base: base (strong / weak)^(1 / alpha)."""

    kind: Literal["delta"] = "delta"
    strong: str = "teacher"
    weak: str = "weak"
    base: str = "reference"
    alpha: float = Field(default=1.0, gt=0)


class Veto(Spec):
    """q p^share, with p the student as it is now: a softer target while the two are far apart."""

    kind: Literal["veto"] = "veto"
    scorer: str = "teacher"
    share: Number = Field(default=Schedule(start=0.5, end=0.0, steps=100), description="power of the student")


def _named(value: Any) -> Any:
    return {"kind": "single", "scorer": value} if isinstance(value, str) else value


Target = Single | Routed | Product | Extrapolated | Delta | Veto
AnyTarget = Annotated[
    Annotated[Target, Field(discriminator="kind")], BeforeValidator(_named, json_schema_input_type=str | Target)
]
