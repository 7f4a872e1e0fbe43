"""Divergences D_f(target || student) by name. Their functions of log-probabilities are in `objectives/shapes.py`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from opd.config.spec import Spec


class ReverseKL(Spec):
    """KL(student || target): h(r) = log r. Mode-seeking; the usual choice for on-policy distillation."""

    formula: ClassVar[str] = "KL(student || target)"
    kind: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Spec):
    """KL(target || student): h(r) = r - 1. Mass-covering."""

    formula: ClassVar[str] = "KL(target || student)"
    kind: Literal["forward_kl"] = "forward_kl"


class JensenShannon(Spec):
    """GKD's generalised JSD, beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p."""

    formula: ClassVar[str] = "JSD(target, student)"
    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1, description="weight of the target in the mixture")
    normalised: bool = Field(
        default=False, description="divide by beta (1 - beta), which is continuous to forward (0) and reverse KL (1)"
    )


class SkewForwardKL(Spec):
    """DistiLLM's skew KL, KL(q || alpha q + (1 - alpha) p): h(r) = (1 - alpha)^2 (r - 1) / (alpha r + 1 - alpha)."""

    formula: ClassVar[str] = "KL(target || mixture)"
    kind: Literal["skew_forward_kl"] = "skew_forward_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1, description="share of the target in the mixture")


class SkewReverseKL(Spec):
    """DistiLLM's skew reverse KL, KL(p || (1 - alpha) q + alpha p): h(r) = log u + alpha / u - alpha."""

    formula: ClassVar[str] = "KL(student || mixture)"
    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    alpha: float = Field(default=0.1, gt=0, lt=1, description="share of the student in the mixture")


class TotalVariation(Spec):
    """Total variation: h(r) = sign(r - 1) / 2, and 0 where |log r| <= dead_zone."""

    formula: ClassVar[str] = "TV(target, student)"
    kind: Literal["total_variation"] = "total_variation"
    dead_zone: float = Field(
        default=1e-4, gt=0, description="|log r| below which student and target count as equal: rounding has no sign"
    )


class ClippedKL(Spec):
    """The divergence whose h is log r, clipped to [low, high]: near the target it is reverse KL."""

    formula: ClassVar[str] = "clipped KL(student || target)"
    kind: Literal["clipped"] = "clipped"
    low: float | None = Field(default=-5.0, lt=0, description="of log r, in nats; none: not clipped there")
    high: float | None = Field(default=5.0, gt=0, description="of log r, in nats; none: not clipped there")

    @model_validator(mode="after")
    def _one_end(self) -> ClippedKL:
        if self.low is None and self.high is None:
            raise ValueError("without low and high it is reverse_kl: name that")
        return self


class TanhKL(Spec):
    """The divergence whose h is scale tanh(log r / scale): reverse KL near the target, bounded far away."""

    formula: ClassVar[str] = "tanh-bounded KL(student || target)"
    kind: Literal["tanh"] = "tanh"
    scale: float = Field(default=1.0, gt=0, description="nats: the largest h")


class VerifierGatedKL(Spec):
    """OPDVR: log r where it agrees with the verdict, max(log r, 0) for right answers and min(log r, 0) for wrong ones.

    Either side is a divergence of its own. Needs `rewards`."""

    formula: ClassVar[str] = "one-sided KL(student || target), the side by verdict"
    kind: Literal["verifier_gated"] = "verifier_gated"
    right_from: float = Field(default=0.5, gt=0, le=1, description="reward from which an answer is right")


Shape = Annotated[
    ReverseKL
    | ForwardKL
    | JensenShannon
    | SkewForwardKL
    | SkewReverseKL
    | TotalVariation
    | ClippedKL
    | TanhKL
    | VerifierGatedKL,
    Field(discriminator="kind"),
]
SHAPES = get_args(get_args(Shape)[0])


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


AnyShape = Annotated[Shape, BeforeValidator(_named, json_schema_input_type=str | Shape)]
FORMULAS: dict[str, str] = {shape.model_fields["kind"].default: shape.formula for shape in SHAPES}
