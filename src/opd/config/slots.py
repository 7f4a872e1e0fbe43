"""The slots of a term besides target and shape: support, credit, weights, tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from opd.config.spec import Spec


class Schedule(Spec):
    """A number that goes in a straight line from `start` at the first step to `end` at step `steps`, and stays."""

    start: float
    end: float
    steps: int = Field(ge=1)

    def at(self, step: int) -> float:
        """The number at a step, counted from 0."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


Number = float | Schedule


def at(number: float | Schedule, step: int) -> float:
    """A number that may be a schedule, at a step counted from 0."""
    return number.at(step) if isinstance(number, Schedule) else number


# ---- support: at which vocabulary entries student and target are compared ----------------------------------------


class Full(Spec):
    """The whole vocabulary at every position."""

    kind: Literal["full"] = "full"


class Sampled(Spec):
    """Only the token that was drawn: the advantage of a policy gradient."""

    kind: Literal["sampled"] = "sampled"


class TopK(Spec):
    """The k most likely entries, and what is done about the others.

    bucket              the rest is one more class: nothing is lost but the shape of the tail
    sampled_correction  a bucket, and where a token of the tail was drawn its own ratio: unbiased for the whole
    renormalise         both distributions are rescaled to the set: mass outside gets no gradient and may drift out
    drop                entries outside have h = 0: as the bucket inside, and nothing outside
    """

    kind: Literal["student_top_k", "teacher_top_k", "union", "intersection"]
    k: int = Field(default=32, ge=1)
    tail: Literal["bucket", "sampled_correction", "renormalise", "drop"] = "bucket"
    floor: float = Field(
        default=1e-6, gt=0, lt=0.1, description="least mass of the target's tail: 1 - sum is rounding noise below it"
    )


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Support = Full | Sampled | TopK
AnySupport = Annotated[
    Annotated[Support, Field(discriminator="kind")],
    BeforeValidator(_named, json_schema_input_type=Literal["full", "sampled"] | Support),
]


# ---- credit: what a drawn token answers for ----------------------------------------------------------------------


class Credit(Spec):
    """G_t = h(r_t) + sum_{t' > t} discount^(t' - t) c_t', c = -f(r) (for reverse KL log r), over trained tokens."""

    discount: float = Field(default=0.0, ge=0, le=1)
    now: bool = Field(default=True, description="false: the future alone, where another term has the present (MiniLLM)")
    length_norm: bool = Field(default=False, description="divide the future by the number of tokens in it (MiniLLM)")
    baseline: Literal["none", "exact"] = Field(
        default="none", description="exact: minus E_p[h] of the position, which needs the whole vocabulary"
    )


# ---- weights: what a drawn token of an older student counts ------------------------------------------------------


class WeightBase(Spec):
    level: Literal["token", "sequence"] = Field(
        default="token", description="the ratio of the token, or of the whole answer (its geometric mean over tokens)"
    )
    against: Literal["sampler", "proximal"] = Field(
        default="sampler",
        description="what the student now is compared with: the sampler, or the student at the first of "
        "learner.updates_per_batch updates",
    )


class NoImportance(Spec):
    """Every token counts 1: samples are the student's own, as it is now."""

    kind: Literal["none"] = "none"


class Ratio(WeightBase):
    """student now / then, unclipped."""

    kind: Literal["ratio"] = "ratio"


class TIS(WeightBase):
    """min(ratio, cap): truncated importance sampling."""

    kind: Literal["tis"] = "tis"
    cap: float = Field(default=2.0, ge=1)


class IcePop(WeightBase):
    """The ratio inside [low, high], and 0 outside."""

    kind: Literal["icepop"] = "icepop"
    low: float = Field(default=0.5, ge=0, lt=1)
    high: float = Field(default=2.0, gt=1)


class PPOClip(WeightBase):
    """PPO's clipped surrogate: the ratio, and no gradient where it has moved out of [1 - low, 1 + high] already."""

    kind: Literal["ppo"] = "ppo"
    low: float = Field(default=0.2, gt=0, lt=1)
    high: float = Field(default=0.2, gt=0)


Weighting = NoImportance | Ratio | TIS | IcePop | PPOClip
Importance = Annotated[
    Annotated[Weighting, Field(discriminator="kind")],
    BeforeValidator(_named, json_schema_input_type=Literal["none", "ratio", "tis", "icepop", "ppo"] | Weighting),
]


# ---- tokens: which of them a term trains --------------------------------------------------------------------------


class EntropyGate(Spec):
    """Tokens at which a scorer's entropy lies above (below) a threshold, in nats (EOPD: teacher, above 0.8).

    Where it is shut a token has weight 0 and gives no credit; it stays in the denominator of the term's mean."""

    of: str = Field(default="teacher", description="a scorer, or student")
    above: float | None = Field(default=None, ge=0)
    below: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> EntropyGate:
        if self.above is None and self.below is None:
            raise ValueError("above or below is required")
        return self


class Selection(Spec):
    """The share of the step's tokens with the largest student entropy, divergence from the target, or either (TIP)."""

    by: Literal["entropy", "divergence", "either"]
    share: float = Field(default=0.5, gt=0, lt=1)


class Tokens(Spec):
    """Tokens of an answer that a term trains, among those that the writer chose."""

    special: Literal["train", "mask"] = Field(
        default="train", description="special tokens of the tokenizer, end tokens excepted"
    )
    truncated: Literal["train", "mask"] = Field(default="train", description="answers that were cut off at max_tokens")
    skip_first: int = Field(default=0, ge=0, description="so many tokens of every answer are left out")
    first: int | None = Field(default=None, ge=1, description="only so many tokens of every answer, after those")
    where: EntropyGate | None = None
    select: Selection | None = None
    importance_of_prefix: float = Field(
        default=0.0,
        ge=0,
        description="gamma of IW-OPD: a token's weight is 1 + gamma (1 - share of the answer's |log-ratio| before it)",
    )
