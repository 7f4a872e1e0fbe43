"""What a scorer must be to write answers: a model in our own process that can be run token by token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from opd.models.causal import CausalLM
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing
from opd.text.formats import PromptFormat
from opd.types import Prompt


class WritingScorer(Protocol):
    """A scorer whose model is here; `LocalTeacher` is one.

    model         read only between `fetch` and `release`; over the student's vocabulary, or with another tokenizer over
                  its own.
    format        how it reads a row.
    agreement     how its ids, or its text, become the student's.
    temperature   of its own distribution.
    """

    name: str
    temperature: float

    @property
    def model(self) -> CausalLM: ...

    @property
    def format(self) -> PromptFormat: ...

    @property
    def agreement(self) -> Agreement | Crossing: ...

    def fetch(self) -> None: ...

    def release(self) -> None: ...


def can_write(scorer: Any) -> bool:
    """Whether a scorer is one; its model is not loaded to find out."""
    names = ("model", "format", "agreement", "temperature", "fetch", "release")
    return all(inspect.getattr_static(scorer, name, None) is not None for name in names)


@contextmanager
def fetched(scorer: WritingScorer) -> Iterator[CausalLM]:
    """The scorer's model on its device, for a while."""
    scorer.fetch()
    try:
        model, agreement = scorer.model, scorer.agreement
        known = agreement.vocab_size if isinstance(agreement, Agreement) else scorer.format.tokenizer.vocab_size
        assert model.vocab_size == known, "a scorer that knows other tokens could draw one"
        yield model
    finally:
        scorer.release()


def as_read(prompts_P: Sequence[Prompt], scorer: WritingScorer) -> list[Prompt]:
    """The prompts as the scorer reads them: in its own format, with the context that it is given."""
    return [replace(p, ids=scorer.format.prompt_ids(p.row), completion_ids=None) for p in prompts_P]
