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
    return Change(first, last, _errors(first, last, error))


def change_from_one(
    first: float,
    after: NDArray[np.float64],
    *,
    most: float | None = None,
    answers: tuple[float, float] = (1, 1),
    scale: float | None = None,
) -> Change | None:
    """From a single step to a stretch of steps. NaN are steps without the number.

    A step says nothing of its own scatter. It is taken from the stretch, as half the mean square of successive
    differences, which a slope does not swell (von Neumann, 1941). That is too little where a change made steps more
    alike, as when all answers are cut off now. So:

    most     the largest value of a number that is a mean over answers and lies between 0 and `most`. Whatever the
             answers, their variance is no more than `p (1 - p) most^2` with p = mean / most (Bhatia and Davis, 2000);
             that is what is assumed where it is more. p is taken over both, with four answers added, two of them at
             `most` (Agresti and Caffo, 2000).
    answers  of the step, and of the stretch: how many that have nothing to do with each other.
    scale    for a number without such a bound, whose scatter goes with its size: logarithms are compared of what is
             far above `scale`, and numbers as they are below it (the area hyperbolic sine).
    """
    kept = after[np.isfinite(after)]
    n = len(kept)
    if not math.isfinite(first) or n < max(3, len(after) / 2):
        return None
    x, y = (first, kept) if scale is None else (math.asinh(first / scale), np.arcsinh(kept / scale))
    last = float(y.mean())
    scatter = float(np.mean(np.diff(y) ** 2)) / 2
    widest = 0.0
    if most is not None:
        p = ((x * answers[0] + last * answers[1]) / most + 2) / (sum(answers) + 4)
        widest = max(p * (1 - p), 0.0) * most**2
    error = math.sqrt(max(scatter, widest / answers[0]) + max(scatter / n, widest / answers[1]))
    return Change(first, float(kept.mean()), _errors(x, last, error))


def _errors(first: float, last: float, error: float) -> float:
    difference, rounding = last - first, 1e-12 * max(abs(first), abs(last), 1e-300)
    if error >= rounding:
        return difference / error
    return 0.0 if abs(difference) <= rounding else math.copysign(math.inf, difference)  # equal numbers


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
