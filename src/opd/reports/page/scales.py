"""From numbers to places on an axis, and the round numbers that are written beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis from `low` to `high`, drawn from `start` to `end` (pixels; y grows downwards)."""

    low: float
    high: float
    log: bool = False
    start: float = 0.0
    end: float = 1.0

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        *,
        log: bool = False,
        exact: bool = False,
        limits: tuple[float | None, float | None] = (None, None),
        least: float = 0.0,
    ) -> Scale:
        """A scale that holds all values (above 0 where `log`).

        exact   from the smallest to the largest; otherwise with a little room, and from 0 where that is near.
                A single value stands on an axis from 0: a level line has no other scale that says something.
        limits  what the room never crosses.
        least   the scale covers at least this share of the largest value, so that a level line looks level.
        """
        low, high = min(values), max(values)
        if log:
            low, high = (low / 1.5, high * 1.5) if low == high else (low / 1.1, high * 1.1)
            return cls(low=low, high=high, log=True)
        if low == high:
            end = (low if exact else 1.25 * low) or 1.0
            low, high = min(0.0, end), max(0.0, end)
        elif not exact:
            room = max((high - low) / 20, (least * max(abs(low), abs(high)) - (high - low)) / 2)
            low, high = (0.0 if 0 <= low < 0.4 * high else low - room), high + room
        if limits[0] is not None:
            low = max(low, limits[0])
        if limits[1] is not None:
            high = min(high, limits[1])
        return cls(low=low, high=high) if high > low else cls(low=low - 1, high=low + 1)

    def placed(self, start: float, end: float) -> Scale:
        return replace(self, start=start, end=end)

    def at(self, value: float) -> float:
        """Where a value stands; one that is outside stands at the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def ticks_of(
    scale: Scale, about: int, label: Callable[[float], str] | None = None, *, whole: bool = False
) -> list[tuple[float, str]]:
    """(value, label) of the round numbers inside the scale: about so many, at least one.

    whole  whole numbers only: half a step is none.
    """
    if scale.log:
        values = _decades(scale.low, scale.high)
        return [(value, (label or _plain)(value)) for value in values]
    step = _round_step((scale.high - scale.low) / about)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)] or [scale.low]
    return [(value, label(value) if label else _by_step(value, step)) for value in values]


def _round_step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    values = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
    every = math.ceil(len(values) / 6)
    return values[::every] or [math.sqrt(low * high)]


def _plain(value: float) -> str:
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4g}"


def _by_step(value: float, step: float) -> str:
    """As many digits as the step needs."""
    if abs(value) < step / 1000:
        return "0"
    if step < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
