"""The ledger of a run: floating-point operations, tokens and seconds, by part.

Operations are counted from shapes, the same on every machine, as multiply and add = 2:

    forward   2 N for every token, N = active parameters (the head is in N)
              + 4 x attention layers x attention width for every pair of a token and a token it attends to
    training  three times that (a backward pass is two forward passes)

Recomputation under gradient checkpointing is not counted, and a prompt that is read once for several answers counts for
each: they are ways to do the work, not more or less work. A sliding window
counts as full attention, and the head as if it were applied to prompt tokens too: both make the figure an upper bound.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opd.costs.size import ModelSize
from opd.types import Rollout


@dataclass(frozen=True)
class Cost:
    """Operations, and the tokens that went through the model."""

    flops: float
    tokens: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.tokens + other.tokens)


def forward(size: ModelSize, tokens: int, first: int = 0) -> Cost:
    """One pass over `tokens` tokens at positions first, first + 1, ...; each attends to itself and all before it."""
    pairs = tokens * first + tokens * (tokens + 1) // 2
    weights = 2.0 * size.active_parameters * tokens
    return Cost(weights + 4.0 * size.attention_layers * size.attention_width * pairs, tokens)


def prefill_cost(rollouts_N: Sequence[Rollout], size: ModelSize) -> Cost:
    """Reading the prompts before writing: every distinct prompt once, shared by its samples."""
    lengths = {rollout.prompt.id: len(rollout.prompt.ids) for rollout in rollouts_N}
    return sum((forward(size, length) for length in lengths.values()), Cost(0.0, 0))


def sampling_cost(rollouts_N: Sequence[Rollout], size: ModelSize) -> Cost:
    """Writing the answers, token by token after a prefilled prompt."""
    return sum((forward(size, len(r.response_ids), len(r.prompt.ids)) for r in rollouts_N), Cost(0.0, 0))


def reading_cost(lengths: Iterable[int], size: ModelSize) -> Cost:
    """Reading sequences of these lengths, each by itself."""
    return sum((forward(size, length) for length in lengths), Cost(0.0, 0))


def scoring_cost(rollouts_N: Sequence[Rollout], size: ModelSize) -> Cost:
    """Reading the student's prompt and the answer of every rollout once."""
    return reading_cost((len(r.prompt.ids) + len(r.response_ids) for r in rollouts_N), size)


def training_cost(rollouts_N: Sequence[Rollout], size: ModelSize, trainable: int | None = None) -> Cost:
    """Forward and backward over prompt and answer of every rollout.

    trainable   parameters that get a gradient, None for all. The backward pass goes through frozen weights as well, to
                reach the layers below, but makes no gradient of theirs: 2 operations per weight and token less.
    """
    read = scoring_cost(rollouts_N, size)
    frozen = 0 if trainable is None else max(size.active_parameters - trainable, 0)
    return Cost(3 * read.flops - 2.0 * frozen * read.tokens, read.tokens)


class Ledger:
    """Adds up what a run spends. Parts and phases are free names, e.g. `student_sampling`, `teacher_scoring`.

    Billing is a choice of parts: whether a teacher is free or a data set is sunk is said by what `total` leaves out.
    One ledger belongs to one thread.
    """

    def __init__(self) -> None:
        self.parts: dict[str, Cost] = {}
        self.seconds_by_phase: dict[str, float] = {}
        self._earlier = 0.0
        self._started = time.monotonic()
        self._inner: list[float] = []

    def add(self, part: str, flops: float, tokens: int) -> None:
        self.parts[part] = self.parts.get(part, Cost(0.0, 0)) + Cost(flops, tokens)

    def add_cost(self, part: str, cost: Cost) -> None:
        self.add(part, cost.flops, cost.tokens)

    def total(self, *, without: Collection[str] = ()) -> Cost:
        """All parts together, except those named. Raises KeyError for a name that was never added."""
        unknown = set(without) - self.parts.keys()
        if unknown:
            raise KeyError(f"the ledger has no {sorted(unknown)}; its parts are {sorted(self.parts)}")
        return sum((cost for part, cost in self.parts.items() if part not in without), Cost(0.0, 0))

    @contextmanager
    def seconds(self, phase: str) -> Iterator[None]:
        """Times a block. A phase inside a phase is taken out of the outer one: the seconds add up to the whole."""
        start = time.monotonic()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.monotonic() - start
            own = spent - self._inner.pop()
            self.seconds_by_phase[phase] = self.seconds_by_phase.get(phase, 0.0) + own
            if self._inner:
                self._inner[-1] += spent

    @property
    def elapsed(self) -> float:
        """Seconds since the ledger was made, and those of the run before it was continued."""
        return self._earlier + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """Everything so far, as plain JSON values; `go_on_from` reads it."""
        return {
            "parts": {part: [cost.flops, cost.tokens] for part, cost in self.parts.items()},
            "seconds_by_phase": dict(self.seconds_by_phase),
            "elapsed": self.elapsed,
        }

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Adds what a run had spent when it was left off."""
        self._earlier += state["elapsed"]
        for part, (flops, tokens) in state["parts"].items():
            self.add(part, flops, tokens)
        for phase, spent in state["seconds_by_phase"].items():
            self.seconds_by_phase[phase] = self.seconds_by_phase.get(phase, 0.0) + spent

    def metrics(self) -> dict[str, float]:
        """Everything so far, flat, for a line of metrics: `flops_<part>`, `tokens_<part>`, `seconds_<phase>`."""
        numbers: dict[str, float] = {}
        for part, cost in self.parts.items():
            numbers |= {f"flops_{part}": cost.flops, f"tokens_{part}": cost.tokens}
        return numbers | {f"seconds_{phase}": spent for phase, spent in self.seconds_by_phase.items()}
