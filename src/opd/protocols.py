"""The only seams of the house. A room is anything that fits one of these; the loop works through them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from opd.types import Batch, Grade, Prompt, Rollout, Row, SamplingParams, ScorerRows, Spans, StepReport, Want

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Sampler(Protocol):
    """Writes answers with the student's current weights."""

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """`params.samples_per_prompt` rollouts for every prompt, grouped by prompt, in the order of `prompts_P`.

        A rollout's id is `<tag>/<prompt id>/<sample>`; its noise depends on (seed, id, position) only, so neither the
        batch it is drawn in nor the order of prompts changes it.
        """
        ...

    def load(self, weights: Weights) -> None:
        """Takes over new weights; later rollouts carry `weights.version`."""
        ...


@runtime_checkable
class Weights(Protocol):
    """A version of the student's weights on its way to a sampler."""

    @property
    def version(self) -> int: ...

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Name to tensor, named as in the model's own state dict."""
        ...


class EvidenceHandle(Protocol):
    """Lazy evidence on a batch of rollouts: nothing is computed or held until a micro-batch pulls it."""

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        """Scorer to rollout id to how their tokens fit: of scorers with another tokenizer than the student's, and of
        no others. It is known from the text alone, before anything is pulled."""
        ...

    def prepare(self, wants: Mapping[str, Want]) -> int:
        """What the update is going to pull: a scorer that is far away may begin with it. Nothing is waited for.

        Returns how many of the student's most likely tokens must be named in `Batch.student_top_TK` when it is pulled:
        0 where no scorer needs to be told.
        """
        ...

    def pull(self, batch: Batch, wants: Mapping[str, Want]) -> list[ScorerRows]:
        """The rows of every wanted scorer that has something to read in `batch`, joined by rollout id."""
        ...

    def lengths(self) -> Mapping[str, Sequence[int]]:
        """Scorer to the lengths of all sequences, prompt and answer, that it has read so far: what scoring cost."""
        ...

    def release(self) -> None:
        """The update is over: frees what pulling needed (an offloaded teacher leaves the device)."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """Reads rollouts and says how likely every token was."""

    name: str
    fingerprint: str

    def evidence(self, rollouts_N: Sequence[Rollout]) -> EvidenceHandle: ...


class NextToken(Protocol):
    """A model that can be asked token by token, for behaviours that need the teacher inside sampling."""

    def logits(self, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 [N, V]: unnormalised scores of the next token of every prefix."""
        ...


@runtime_checkable
class Learner(Protocol):
    """Holds the student's master weights and changes them."""

    def update(self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None) -> StepReport: ...

    def weights(self) -> Weights: ...


@runtime_checkable
class Grader(Protocol):
    """Says how good answers are. Model text never runs in our own process."""

    def grade(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]: ...

    def close(self) -> None: ...


class Environment(Protocol):
    """Answers the student between its turns (tools, games). Its tokens are never trained."""

    def reset(self, row: Row) -> None: ...

    def reply(self, answer: str) -> tuple[str | None, Mapping[str, Any]]:
        """The next message to the student, or None when the episode is over; and facts for the report."""
        ...


class WeightChannel(Protocol):
    """Carries weights from learner to a sampler that is a program of its own."""

    def publish(self, weights: Weights) -> str:
        """Returns when the sampler has them, and the name by which it is asked to write with them.

        ServiceUnavailable when it is not there, BadService when it shows that something is missing.
        """
        ...
