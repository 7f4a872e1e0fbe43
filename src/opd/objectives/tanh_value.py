"""The divergence whose h is s tanh(log r / s): its f, which has a closed form for s = 1 alone.

With x = log r and y = |x|,

    r >= 1:  f = r J(y),  J(y) = integral from 0 to y of s tanh(t / s) e^-t dt
    r <  1:  f = K(y),    K(y) = integral from 0 to y of s tanh(t / s) e^(t - y) dt
    s = 1:   f = 1 - r + 2 r (arctan r - pi / 4)

J and K are tabulated once per scale, by Gauss-Legendre on every interval, and read with cubic Hermite interpolation:
their derivatives are known, J' = s tanh(y / s) e^-y and K' = s tanh(y / s) - K. The error is below 1e-9 nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

INTERVALS = 128  # per nat, or per scale where that is smaller
NODES = 8  # of Gauss-Legendre, per interval
SETTLED = 40.0  # nats after which e^-y is nothing, ...
SATURATED = 20.0  # ... and scales after which tanh is 1: J and K are constant past both
CLOSED_FORM = 1.0  # the scale that has one


class TanhValue(Protocol):
    """f of one scale, as functions of log-probabilities."""

    def mass(self, logp: Tensor, logq: Tensor, gap: Tensor) -> Tensor:
        """p f(r), with gap = log q - log p."""
        ...

    def at(self, gap: Tensor) -> Tensor:
        """f(r) of gap = log r."""
        ...


@lru_cache(maxsize=8)
def tanh_value(scale: float) -> TanhValue:
    """The f of a scale in nats."""
    return _Closed() if scale == CLOSED_FORM else _tabulated(scale)


def tanh_tables(scale: float) -> tuple[float, Tensor, Tensor]:
    """The step between entries in nats, and value and slope x step of J and of K, float64 [2, entries] each."""
    table = _tabulated(scale)
    return table.step, table.above_2I, table.below_2I


class _Closed:
    def mass(self, logp: Tensor, logq: Tensor, gap: Tensor) -> Tensor:
        return logp.exp() + logq.exp() * self._slope(gap.exp())

    def at(self, gap: Tensor) -> Tensor:
        r = gap.exp()
        return 1.0 + r * self._slope(r)

    def _slope(self, r: Tensor) -> Tensor:
        return 2.0 * (torch.arctan(r) - math.pi / 4) - 1.0


@dataclass(frozen=True)
class _Tabulated:
    """above_2I, below_2I: J and K, value and slope x step, float64 at the ends of the intervals.

    copies   of both where they have been needed: a device is sent a table once.
    """

    step: float
    above_2I: Tensor
    below_2I: Tensor
    copies: dict[tuple[int, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    def mass(self, logp: Tensor, logq: Tensor, gap: Tensor) -> Tensor:
        above, below = self._read(self.above_2I, gap), self._read(self.below_2I, gap)
        return torch.where(gap >= 0, logq.exp() * above, logp.exp() * below)

    def at(self, gap: Tensor) -> Tensor:
        above, below = self._read(self.above_2I, gap), self._read(self.below_2I, gap)
        return torch.where(gap >= 0, gap.exp() * above, below)

    def _read(self, table_2I: Tensor, gap: Tensor) -> Tensor:
        key = (id(table_2I), gap.device, gap.dtype)
        if key not in self.copies:
            self.copies[key] = table_2I.to(gap.device, gap.dtype)
        value_I, slope_I = self.copies[key]
        last = len(value_I) - 1
        place = (gap.abs() / self.step).clamp(max=last)  # NaN stays NaN, in the fraction
        index = place.nan_to_num().long().clamp(max=last - 1)
        t = place - index
        here, there = value_I[index], value_I[index + 1]
        bend_here = slope_I[index] - (there - here)
        bend_there = (there - here) - slope_I[index + 1]
        return here + t * ((there - here) + (1 - t) * ((1 - t) * bend_here + t * bend_there))


def _tabulated(scale: float) -> _Tabulated:
    step = min(1.0, scale) / INTERVALS
    y_I = np.arange(math.ceil((SETTLED + SATURATED * scale) / step) + 1) * step
    node, weight = np.polynomial.legendre.leggauss(NODES)
    inside = (node + 1) * (step / 2)
    h = scale * np.tanh((y_I[:-1, None] + inside) / scale)
    weighted = h * (weight * step / 2)
    J_I = np.concatenate([[0.0], np.cumsum((weighted * np.exp(-y_I[:-1, None] - inside)).sum(1))])
    gained = (weighted * np.exp(inside - step)).sum(1)
    K_I, decay = np.zeros(len(y_I)), math.exp(-step)
    for n, gain in enumerate(gained):
        K_I[n + 1] = K_I[n] * decay + gain
    h_I = scale * np.tanh(y_I / scale)
    above, below = np.stack([J_I, step * h_I * np.exp(-y_I)]), np.stack([K_I, step * (h_I - K_I)])
    return _Tabulated(step, torch.from_numpy(above), torch.from_numpy(below))
