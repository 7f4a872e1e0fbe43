"""The lines of `metrics.jsonl` as guards read them: what a run was like in the beginning, and what it is like now.

The beginning is the first `window` lines once there are `2 * window`, and until then the first line alone. That one's
answers are the untouched student's. Where the learning rate is far too high, all is lost a few steps later, and most of
the first `window` lines are of the loss. A change that comes in those lines fills the last window before there are
`2 * window`, and is held against the first line; a change that comes later finds them as they should be.

Beginning and last window never overlap, so nothing can be compared in the first `window` steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.loop.trends import Change, change, change_from_one

Line = Mapping[str, Any]

SHARES = ("truncated", "ended", "repetition", "end_probability")  # means over answers, between 0 and 1


@dataclass(frozen=True)
class Limits:
    """What does not change during a run; see `opd.loop.guards.Guards`."""

    vocab_size: int
    max_tokens: int
    samples_per_prompt: int


@dataclass(frozen=True)
class Lines:
    """The first `end` lines of a run. Nulls and NaN, and missing keys, are numbers that are not there."""

    history: Sequence[Line]
    end: int
    window: int
    limits: Limits

    @property
    def beginning(self) -> str:
        """As a message says it."""
        return f"over the first {self.window}" if self._many else "in the first step"

    def last(self, key: str, steps: int) -> NDArray[np.float64]:
        """float64 [steps]: the last `steps` values; NaN where there is none. Shorter when the run is."""
        return _column(self._last(steps), key)

    def said(self, key: str, values: int) -> NDArray[np.float64]:
        """float64 [values]: the last so many numbers that are there, of the last `values * window` steps; fewer when
        there are no more."""
        found_T = self.last(key, values * self.window)
        return found_T[~np.isnan(found_T)][-values:]

    def change(self, key: str, *, scale: float | None = None) -> Change | None:
        """From the beginning to the last window; None while they overlap, or where the number is missing.

        scale   of a number without an upper bound: see `change_from_one`, which is used for the first line.
        """
        if self.end <= self.window:
            return None
        last = self._last(self.window)
        if self._many:
            return change(_column(self.history[: self.window], key), _column(last, key))
        first = self.history[0]
        most = self.limits.max_tokens if key == "response_length" else 1.0 if key in SHARES else None
        answers = (sum(self._answers(key, [first])), sum(self._answers(key, last)))
        return change_from_one(_column([first], key)[0], _column(last, key), most=most, answers=answers, scale=scale)

    @property
    def _many(self) -> bool:
        return self.end >= 2 * self.window

    def _last(self, steps: int) -> Sequence[Line]:
        return self.history[max(self.end - steps, 0) : self.end]

    def _answers(self, key: str, lines: Sequence[Line]) -> list[float]:
        """Of every line, how many answers a number is a mean over, at least. Those to one prompt may be all alike: they
        count as one."""
        answers_T = _column(lines, "rollouts")
        if key == "repetition":  # a mean over tokens: long answers count for more
            answers_T = _column(lines, "response_tokens") / np.maximum(_column(lines, "response_length_max"), 1)
        if key == "end_probability":
            answers_T *= _column(lines, "ended")
        return np.fmax(answers_T / self.limits.samples_per_prompt, 1).tolist()


def _column(lines: Sequence[Line], key: str) -> NDArray[np.float64]:
    values = [line.get(key) for line in lines]
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)
