"""Who writes the answers that are trained on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from opd.config.spec import Spec

BehaviourKind = Literal["student", "dataset", "teacher", "teacher_mixed", "speculative", "cached"]


class StudentWrites(Spec):
    """The student samples its own answers."""

    kind: Literal["student"] = "student"


class DatasetWrites(Spec):
    """The answers that came with the rows: one to each, whatever `sampling.samples_per_prompt` says."""

    kind: Literal["dataset"] = "dataset"


class TeacherWrites(Spec):
    """A scorer samples (SeqKD), with the step's sampling parameters."""

    kind: Literal["teacher"] = "teacher"
    scorer: str = "teacher"


class TeacherMixed(Spec):
    """Every token is drawn from alpha q + (1 - alpha) p (MiniLLM). Recorded log-probabilities are the mixture's."""

    kind: Literal["teacher_mixed"] = "teacher_mixed"
    scorer: str = "teacher"
    alpha: float = Field(default=0.2, gt=0, lt=1, description="the teacher's share")


class Speculative(Spec):
    """The student proposes a token; it stays if it is among the teacher's `top_k`, else the teacher draws one (SKD)."""

    kind: Literal["speculative"] = "speculative"
    scorer: str = "teacher"
    top_k: int = Field(default=25, ge=1)


class Cached(Spec):
    """Answers that an earlier run wrote, from its run folder, step by step."""

    kind: Literal["cached"] = "cached"
    run: str = Field(description="run folder")


Writer = StudentWrites | DatasetWrites | TeacherWrites | TeacherMixed | Speculative | Cached


class Share(Spec):
    """One writer of a mixture."""

    writer: Annotated[Annotated[Writer, Field(discriminator="kind")], BeforeValidator(lambda value: _named(value))]
    share: float = Field(
        gt=0,
        le=1,
        description="of the prompts (or batches), not of the answers: a row of the data has one answer, where a model "
        "writes sampling.samples_per_prompt",
    )


class Mixture(Spec):
    """Several writers: each prompt (or whole batch) of a step is given to one of them, by lot."""

    kind: Literal["mixture"] = "mixture"
    of: Annotated[tuple[Share, ...], BeforeValidator(lambda value: _as_tuple(value))] = Field(
        min_length=2, description="their shares add up to 1"
    )
    per: Literal["prompt", "batch"] = Field(default="prompt", description="batch: as GKD draws")

    @model_validator(mode="after")
    def _sum(self) -> Mixture:
        total = sum(part.share for part in self.of)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares add up to {total:g}; make it 1")
        return self


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value  # JSON's list, which a strict reader takes for no tuple


Behaviour = Writer | Mixture
AnyBehaviour = Annotated[
    Annotated[Behaviour, Field(discriminator="kind")],
    BeforeValidator(_named, json_schema_input_type=BehaviourKind | Behaviour),
]


def writers(behaviour: Behaviour) -> tuple[Writer, ...]:
    """Everybody who may write an answer."""
    return tuple(part.writer for part in behaviour.of) if isinstance(behaviour, Mixture) else (behaviour,)
