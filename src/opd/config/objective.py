"""The objective as data: a sum of terms, each a point in the algebra of `docs/architecture.md`. Imports no torch.

Slots that a term has today: target, shape, support, importance weights, reduction. A new method is a new value of a
slot or a new preset in `presets.py`; neither the loop nor the learner knows any of their names.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ReverseKL(Spec):
    """KL(student || teacher): h(r) = log r. Mode-seeking; the usual choice for on-policy distillation."""

    formula: ClassVar[str] = "KL(student || teacher)"
    kind: Literal["reverse_kl"] = "reverse_kl"


class ForwardKL(Spec):
    """KL(teacher || student): h(r) = r - 1. Mass-covering."""

    formula: ClassVar[str] = "KL(teacher || student)"
    kind: Literal["forward_kl"] = "forward_kl"


class JensenShannon(Spec):
    """GKD's generalised JSD, beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p."""

    formula: ClassVar[str] = "JSD(teacher, student)"
    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1, description="weight of the teacher in the mixture")
    normalised: bool = Field(
        default=False, description="divide by beta (1 - beta), which is continuous to forward (0) and reverse KL (1)"
    )


Shape = Annotated[ReverseKL | ForwardKL | JensenShannon, Field(discriminator="kind")]
FORMULAS = {shape.model_fields["kind"].default: shape.formula for shape in (ReverseKL, ForwardKL, JensenShannon)}


class Term(Spec):
    """One summand: coefficient x (mean over its tokens of a divergence between target and student)."""

    name: str = Field(description="how metrics call it")
    coefficient: float = 1.0
    target: Literal["teacher", "data"] = Field(
        default="teacher",
        description="whose tokens the student moves to: the teacher's distribution, or the data's own tokens",
    )
    shape: Shape = ReverseKL()
    support: Literal["full", "sampled"] = Field(
        default="full",
        description="full: the whole vocabulary at every position; sampled: only the token that was drawn",
    )
    advantage_under: Literal["student", "sampler"] = Field(
        default="student",
        description="whose log-probability enters the log-ratio of a sampled term: the student's as it is now, "
        "or the one recorded when the token was drawn (as in Thinking Machines' code)",
    )
    importance: Literal["none", "ratio"] = Field(
        default="none", description="weight of a sampled token: 1, or student now / sampler then, unclipped"
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        default="token_mean",
        description="mean over all trained tokens of the step, or over answers of their own token means",
    )


class Objective(Spec):
    """What is minimised. Name a preset, or list the terms; a resolved config holds both and they must agree."""

    preset: str | None = Field(default=None, description="a named method: see `opd config presets`")
    parameters: dict[str, Any] = Field(default_factory=dict, description="parameters of the preset, e.g. {beta: 0.1}")
    behaviour: Literal["student", "dataset"] | None = Field(
        default=None, description="who writes the answers that are trained on; the preset decides when it is not given"
    )
    terms: tuple[Term, ...] = ()
    student_temperature: float = Field(
        default=1.0, gt=0, description="divides the student's logits inside the objective"
    )
    teacher_temperature: float = Field(
        default=1.0, gt=0, description="divides the teacher's logits inside the objective"
    )
