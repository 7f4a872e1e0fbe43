"""The objective as data: a sum of terms, each a point in the algebra of `docs/objectives.md`. Imports no torch.

A slot is a small class per choice (`shapes.py`, `targets.py`, `slots.py`); a term holds one choice for each slot. A new
method is a new choice or a new preset: neither the loop nor the learner knows any of their names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from opd.config.alignments import AnyAlignment, Strict
from opd.config.behaviours import AnyBehaviour, BehaviourKind
from opd.config.shapes import AnyShape, ReverseKL
from opd.config.slots import AnySupport, Credit, Full, Importance, NoImportance, Number, Tokens
from opd.config.spec import Spec
from opd.config.targets import AnyTarget, Single

Reduction = Literal["token_mean", "sequence_mean", "constant"]


class TermBase(Spec):
    """What every term has: a name, a size, whose answers and which tokens it reads, and how it takes their mean."""

    name: str = Field(description="how metrics call it")
    coefficient: Number = Field(default=1.0, description="a number, or one that goes from start to end over steps")
    written_by: tuple[BehaviourKind, ...] = Field(
        default=(), description="whose answers it reads, where several write; empty: everybody's"
    )
    domains: tuple[str, ...] = Field(default=(), description="the rows it reads, by domain; empty: all")
    tokens: Tokens = Tokens()
    reduction: Reduction = Field(
        default="token_mean",
        description="token_mean: over all tokens the term trains in the step; sequence_mean: over answers of their own "
        "token means; constant: the sum over answers, divided by the number of those with a trained token times "
        "sampling.max_tokens, or what sampling.horizon makes of it in the step",
    )


class DivergenceTerm(TermBase):
    """coefficient x mean of a divergence of the student from a target."""

    kind: Literal["divergence"] = "divergence"
    target: AnyTarget = Single()
    shape: AnyShape = ReverseKL()
    support: AnySupport = Full()
    credit: Credit = Credit()
    advantage_under: Literal["student", "sampler", "proximal"] = Field(
        default="student",
        description="whose log-probability enters the log-ratio of a sampled term: the student's as it is now, the one "
        "recorded when the token was drawn (as in Thinking Machines' code), or the student's at the first of "
        "learner.updates_per_batch updates",
    )
    importance: Importance = NoImportance()
    alignment: AnyAlignment = Field(
        default=Strict(), description="how tokens are joined with those of a scorer that has another tokenizer"
    )


class OutcomeTerm(TermBase):
    """coefficient x policy gradient of the reward of whole answers, as the grader of `rewards` gives it."""

    kind: Literal["outcome"] = "outcome"
    advantage: Literal["group", "centred", "plain"] = Field(
        default="group",
        description="group: (reward - mean) / deviation among the answers to one prompt (GRPO); centred: not divided "
        "by the deviation; plain: the reward itself",
    )
    importance: Importance = NoImportance()


class DataTerm(TermBase):
    """coefficient x cross-entropy on answers that somebody else wrote: the data, or a teacher."""

    kind: Literal["data"] = "data"


def _kind(value: Any) -> str:
    return value.get("kind", "divergence") if isinstance(value, dict) else getattr(value, "kind", "divergence")


Term = Annotated[
    Annotated[DivergenceTerm, Tag("divergence")]
    | Annotated[OutcomeTerm, Tag("outcome")]
    | Annotated[DataTerm, Tag("data")],
    Discriminator(_kind),
]


class Objective(Spec):
    """What is minimised. Name a preset, or list the terms; a resolved config holds both and they must agree."""

    preset: str | None = Field(default=None, description="a named method: see `opd objectives`")
    parameters: dict[str, Any] = Field(default_factory=dict, description="parameters of the preset, e.g. {beta: 0.1}")
    behaviour: AnyBehaviour | None = Field(
        default=None,
        description="who writes the answers that are trained on; when it is not given the preset decides, and without "
        "one it is the student",
    )
    terms: tuple[Term, ...] = ()
    student_temperature: float = Field(
        default=1.0, gt=0, description="divides the student's logits inside the objective"
    )
    teacher_temperature: float = Field(
        default=1.0, gt=0, description="divides scorers' logits inside the objective, where they do not say their own"
    )
