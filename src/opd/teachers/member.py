"""What a panel needs of a scorer, in this process or served elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from opd.text.agreement import Agreement
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.types import Batch, Prompt, Resolution, Rollout, ScorerRows, Spans, Want


class MemberEvidence(Protocol):
    """What one scorer says about one step's rollouts; see `protocols.EvidenceHandle`."""

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        """By this scorer's name; empty where it has the student's tokenizer."""
        ...

    def prepare(self, wants: Mapping[str, Want]) -> int: ...

    def read(self, batch: Batch, want: Want) -> ScorerRows | None:
        """The wanted rollouts of the micro-batch, in its order; None where there is none."""
        ...

    def lengths(self) -> Mapping[str, Sequence[int]]: ...

    def release(self) -> None: ...


class Member(Protocol):
    """One scorer.

    resolution       the most that it says about a token.
    most_entries     so many of its most likely tokens at a position, where it does not say everything.
    vocab_size       its tokens: the student's, or with another tokenizer its own. `parameter_count`: of its weights,
                     for the bill.
    fingerprint      weights, tokenizer, template, context and temperature when it was made.
    """

    name: str
    format: PromptFormat
    agreement: Agreement | Crossing
    fingerprint: str
    vocab_size: int
    parameter_count: int

    @property
    def resolution(self) -> Resolution: ...

    @property
    def most_entries(self) -> int: ...

    def fingerprint_now(self) -> str: ...

    def evidence(self, rollouts_N: Sequence[Rollout]) -> MemberEvidence: ...

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ModelError or ServiceUnavailable when it is of no use: caught before anything expensive starts."""
        ...

    def release(self) -> None: ...
