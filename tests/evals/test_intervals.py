"""avg@k: what it averages, properties of its interval, and its coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.evals.intervals import avg_at_k, student_quantile


def ends(scores, confidence):
    """(low, high) of the interval, which there is."""
    estimate = avg_at_k(scores, confidence)
    assert estimate.low is not None and estimate.high is not None
    return estimate.low, estimate.high


def width(scores, confidence=0.95):
    low, high = ends(scores, confidence)
    return high - low


BINARY = st.sampled_from([0.0, 1.0])
SCORE = st.one_of(st.none(), st.floats(0, 1))


def test_mean_of_problem_means_with_missing_scores_left_out():
    estimate = avg_at_k([[1.0, None], [0.0, 0.0], [None, None], [1.0, 0.0]], 0.95)
    assert (estimate.mean, estimate.n, estimate.k, estimate.missing) == (0.5, 3, 2, 3)


@pytest.mark.parametrize("scores", [[], [[]], [[None, None]]])
def test_without_a_score_there_is_no_estimate(scores):
    estimate = avg_at_k(scores, 0.95)
    assert (estimate.mean, estimate.low, estimate.high, estimate.n, estimate.ci_method) == (None, None, None, 0, None)


def test_one_answer_per_problem_is_wilsons_interval():
    """Figures from the closed form: 8 of 10 at 95 %."""
    estimate = avg_at_k([[1.0]] * 8 + [[0.0]] * 2, 0.95)
    assert estimate.ci_method == "wilson"
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-5)


def test_E_01_answers_to_one_problem_are_not_independent_trials():
    alike = [[1.0] * 16] * 15 + [[0.0] * 16] * 15
    assert "clustered" in str(avg_at_k(alike, 0.95).ci_method)
    assert width(alike) == pytest.approx(width([[1.0]] * 15 + [[0.0]] * 15), rel=0.1)
    mixed = [[1.0, 0.0] * 8] * 29 + [[1.0] * 9 + [0.0] * 7]
    assert width(mixed) < 0.5 * width(alike)


@given(st.lists(st.lists(SCORE, min_size=1, max_size=5), max_size=20), st.floats(0.5, 0.999))
def test_interval_holds_the_mean_and_stays_in_range(scores, confidence):
    mean = avg_at_k(scores, confidence).mean
    if mean is not None:
        low, high = ends(scores, confidence)
        assert 0 <= low <= mean <= high <= 1 and low < high


@given(st.lists(st.lists(BINARY, min_size=3, max_size=3), min_size=1, max_size=20))
def test_interval_is_symmetric_in_right_and_wrong_and_blind_to_order(scores):
    low, high = ends(scores, 0.9)
    mirrored = ends([[1 - s for s in reversed(row)] for row in reversed(scores)], 0.9)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.lists(st.lists(BINARY, min_size=2, max_size=2), min_size=2, max_size=20))
def test_more_confidence_is_a_wider_interval(scores):
    narrow, wide = ends(scores, 0.8), ends(scores, 0.99)
    assert wide[0] <= narrow[0] and narrow[1] <= wide[1]


@pytest.mark.parametrize("score", [0.0, 1.0])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 8), (30, 1), (30, 8)])
def test_all_alike_still_has_width(n, k, score):
    assert width([[score] * k] * n) == pytest.approx(3.8415 / (n + 3.8415), rel=1e-3)


@pytest.mark.parametrize(
    ("p", "df", "quantile"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 3, 3.18245),
        (0.975, 9, 2.26216),
        (0.975, 29, 2.04523),
        (0.995, 2, 9.92484),
        (0.995, 3, 5.84091),
        (0.995, 9, 3.24984),
        (0.95, 4, 2.13185),
    ],
)
def test_student_quantile_against_tables(p, df, quantile):
    assert student_quantile(p, df) == pytest.approx(quantile, rel=0.02)


@pytest.mark.parametrize("graded", ["binary", "fractions"])
@pytest.mark.parametrize(
    ("n", "k", "a", "b"),
    [(30, 1, 1, 1), (30, 1, 4, 1), (30, 4, 0.3, 0.3), (30, 4, 4, 1), (100, 8, 20, 20), (5, 16, 1, 1)],
)
def test_coverage_of_a_95_percent_interval(n, k, a, b, graded):
    """Problems drawn with difficulty Beta(a, b), k answers each; the truth is the mean over all possible problems."""
    rng = np.random.default_rng([n, k, int(10 * a), graded == "binary"])
    hits, runs = 0, 1000
    for _ in range(runs):
        p = np.clip(rng.beta(a, b, (n, 1)), 1e-6, 1 - 1e-6)
        scores = rng.binomial(1, p, (n, k)) if graded == "binary" else rng.beta(5 * p, 5 * (1 - p), (n, k))
        low, high = ends(scores.tolist(), 0.95)
        hits += low <= a / (a + b) <= high
    assert 0.92 <= hits / runs <= 0.985
