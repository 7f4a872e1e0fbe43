r"""avg@k with an interval that respects the problem as the unit of chance.

The k answers to one problem are alike, so they are not k independent trials (trap E-1). The interval is Wilson's with
the effective number of independent trials in place of n:

    v      = variance of the problems' means, divided by the number of problems     (the cluster variance of the mean)
    n_eff  = p (1 - p) / v,  times (z / t)^2  with Student's t on problems - 1 degrees of freedom

the effective sample size of Korn & Graubard (1998) in the interval that Franco et al. (PMC6690503) recommend for
clustered samples. It stays inside [0, 1], has width where every problem came out alike, and draws no random numbers.
With k = 1 and scores of 0 or 1 it is Wilson's own interval. Coverage is simulated in `tests/evals/test_intervals.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean score in [0, 1] with its two-sided interval.

    mean, low, high  None when no answer had a score.
    n                problems that entered: those with at least one score.
    k                answers per problem that were asked for.
    missing          answers without a score, left out.
    ci_method        how the interval was made; None when there is none.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    k: int
    missing: int
    ci_method: str | None


def avg_at_k(scores: Sequence[Sequence[float | None]], confidence: float) -> Estimate:
    """Mean over problems of the mean over their answers, with an interval of the given confidence.

    scores      [problems][k]; each in [0, 1], None where the grader could not decide.
    confidence  in (0, 1), two-sided.
    """
    k = max((len(row) for row in scores), default=0)
    known = [[s for s in row if s is not None] for row in scores]
    missing = sum(len(row) for row in scores) - sum(len(row) for row in known)
    means = [fmean(row) for row in known if row]
    n = len(means)
    if not means:
        return Estimate(mean=None, low=None, high=None, n=0, k=k, missing=missing, ci_method=None)
    mean = fmean(means)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    binary = all(s in (0, 1) for row in known for s in row)
    if binary and k == 1:
        trials, method = float(n), "wilson"
    else:
        trials = _effective_trials(means, mean, z, confidence, sum(map(len, known)) if binary else math.inf)
        method = "wilson on the effective sample size, clustered by problem"
    low, high = wilson(mean, trials, z)
    return Estimate(mean=mean, low=low, high=high, n=n, k=k, missing=missing, ci_method=method)


def _effective_trials(means: Sequence[float], mean: float, z: float, confidence: float, most: float) -> float:
    """Independent 0/1 trials that would know the mean as well. `most`: never more than this many."""
    n = len(means)
    spread = variance(means) if n > 1 else 0.0
    if spread <= 1e-12:  # all problems alike: nothing is known of how they differ, so each counts as one trial
        return float(n)
    return min(most, mean * (1 - mean) * n / spread) * (z / student_quantile((1 + confidence) / 2, n - 1)) ** 2


def wilson(mean: float, trials: float, z: float) -> tuple[float, float]:
    """Wilson's score interval (1927) for a proportion; `trials` need not be whole."""
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials * trials))
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def student_quantile(p: float, df: int) -> float:
    """Quantile of Student's t with `df` degrees of freedom; relative error below 2 % up to 99 % confidence.

    Closed for 1 and 2 degrees, else the expansion of Abramowitz & Stegun 26.7.5.
    """
    if df == 1:
        return math.tan(math.pi * (p - 0.5))
    if df == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / df + g2 / df**2 + g3 / df**3 + g4 / df**4
