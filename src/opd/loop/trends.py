"""Is it a change, or noise? Statistics of a number over the steps of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SURE = 5.0  # standard errors: a run is looked at after every step, by several guards, and metrics are not Gaussian


@dataclass(frozen=True)
class Change:
    """A number averaged over two stretches of steps.

    errors   the difference of the means in standard errors (Welch, 1947): from the scatter between steps, so that it
             holds for small and large batches alike. Infinite where neither stretch scatters and the means differ.
    """

    before: float
    after: float
    errors: float

    @property
    def rose(self) -> bool:
        return self.errors >= SURE

    @property
    def fell(self) -> bool:
        return self.errors <= -SURE


def change(before: NDArray[np.float64], after: NDArray[np.float64]) -> Change | None:
    """From one stretch of steps to another; NaN are steps without the number. None where more than half are."""
    kept = [values[np.isfinite(values)] for values in (before, after)]
    if any(len(k) < max(2, len(values) / 2) for k, values in zip(kept, (before, after), strict=True)):
        return None
    first, last = (float(k.mean()) for k in kept)
    error = math.sqrt(sum(float(k.var(ddof=1)) / len(k) for k in kept))
    difference = last - first
    if error < 1e-12 * max(abs(first), abs(last), 1e-300):  # what is left of equal numbers after rounding
        errors = 0.0 if abs(difference) <= 1e-12 * max(abs(first), abs(last)) else math.copysign(math.inf, difference)
    else:
        errors = difference / error
    return Change(first, last, errors)


def rises(values: NDArray[np.float64]) -> bool:
    """Whether later values tend to be larger than earlier ones (Mann, Econometrica 13, 1945; Kendall, 1975).

    S counts pairs in order minus pairs out of order; without a trend its variance is n (n - 1) (2n + 5) / 18, and here
    it has to be `SURE` standard deviations above zero. Only ranks enter: no outlier and no curve counts more than its
    place. NaN are left out; fewer than 15 values never rise.
    """
    x = values[np.isfinite(values)]
    n = len(x)
    s = float(np.triu(np.sign(x[None, :] - x[:, None]), 1).sum())
    return s > SURE * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
