"""From one step to a stretch of steps: what `change_from_one` makes of shares, of divergences, and of noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from opd.loop.trends import SURE, Change, change_from_one

SHARES = st.floats(0, 1, allow_subnormal=False)
STRETCHES = st.lists(SHARES, min_size=4, max_size=30)
COUNTS = st.tuples(st.integers(1, 500), st.integers(1, 10_000))


def seen(first: float, after: object, **kwargs) -> Change:
    found = change_from_one(first, np.asarray(after, dtype=np.float64), **kwargs)
    assert found is not None
    return found


# ---- what holds for all numbers ----------------------------------------------------------------------------------


@given(SHARES, STRETCHES, COUNTS)
def test_what_is_cut_off_rises_as_what_ends_falls(first, after, answers):
    cut = seen(first, after, most=1.0, answers=answers)
    ended = seen(1 - first, 1 - np.array(after), most=1.0, answers=answers)
    assert ended.errors == pytest.approx(-cut.errors, rel=1e-6, abs=1e-6)


@given(SHARES, STRETCHES, COUNTS, st.sampled_from([0.5, 8.0, 512.0]))
def test_a_bounded_number_may_have_any_unit(first, after, answers, unit):
    one = seen(first, after, most=1.0, answers=answers)
    other = seen(first * unit, np.array(after) * unit, most=unit, answers=answers)
    assert other.errors == pytest.approx(one.errors, rel=1e-6, abs=1e-6)


@given(SHARES, STRETCHES, COUNTS, st.sampled_from([None, 0.01, 1.0]))
def test_the_sign_is_that_of_the_difference_and_the_means_are_of_the_numbers(first, after, answers, scale):
    found = seen(first, after, most=1.0 if scale is None else None, answers=answers, scale=scale)
    assert (found.before, found.after) == (first, pytest.approx(float(np.mean(after)), abs=1e-12))
    if scale is None and abs(found.after - first) > 1e-9:
        assert (found.errors > 0) == (found.after > first)
    if min(after) > first + 1e-9:
        assert found.errors > 0
    if max(after) < first - 1e-9:
        assert found.errors < 0


@given(SHARES, STRETCHES, COUNTS)
def test_the_bound_makes_nobody_surer(first, after, answers):
    assert abs(seen(first, after, most=1.0, answers=answers).errors) <= abs(seen(first, after).errors) * (1 + 1e-9)


@given(st.floats(0.1, 5), st.lists(st.floats(0.1, 5), min_size=4, max_size=30), st.floats(1e-3, 1e-1))
def test_far_above_the_scale_only_ratios_count_and_far_below_only_differences(first, after, unit):
    numbers = np.array([first, *after])
    assume(np.ptp(numbers) > 1e-2)
    logs = seen(math.log(first), np.log(after)).errors
    assert seen(first * unit, numbers[1:] * unit, scale=1e-6 * unit).errors == pytest.approx(logs, rel=1e-3, abs=1e-3)
    straight = seen(first, after).errors
    assert seen(first + unit, numbers[1:] + unit, scale=1e6).errors == pytest.approx(straight, rel=1e-3, abs=1e-3)


@given(st.floats(-10, 10), st.integers(4, 40), st.sampled_from([None, 1.0]))
def test_equal_numbers_are_no_change_and_any_other_is_one_where_nothing_scatters(value, steps, scale):
    assert seen(value, np.full(steps, value), scale=scale).errors == 0.0
    assert seen(value, np.full(steps, value + 1), scale=scale).errors == math.inf
    assert seen(value, np.full(steps, value - 1), scale=scale).errors == -math.inf


@pytest.mark.parametrize(
    ("first", "after"),
    [
        (math.nan, [1.0] * 8),
        (math.inf, [1.0] * 8),
        (0.0, [1.0, 1.0]),
        (0.0, [1.0, 2.0, 3.0] + [math.nan] * 4),
        (0.0, []),
    ],
)
def test_too_few_numbers_say_nothing(first, after):
    assert change_from_one(first, np.array(after)) is None


def test_half_of_the_numbers_are_enough():
    nan = math.nan
    assert seen(0.0, [nan, 1.0, nan, 2.0, 3.0, nan]) == seen(0.0, [1.0, 2.0, 3.0])


# ---- a collapse is seen, noise is not ----------------------------------------------------------------------------


@pytest.mark.parametrize(("answers", "window"), [(8, 4), (4, 20), (128, 20)])
def test_all_answers_cut_off_where_none_was(answers, window):
    found = seen(0.0, np.ones(window), most=1.0, answers=(answers, answers * window))
    assert found.rose and math.isfinite(found.errors)


def test_one_or_two_answers_are_not_enough():
    """One answer in ten ends: then two ends in a row, and forty others after them, are no wonder."""
    for answers in (1, 2):
        assert not seen(0.0, np.ones(20), most=1.0, answers=(answers, 20 * answers)).rose


def test_a_slope_is_not_taken_for_scatter():
    slope = np.linspace(1.0, 11.0, 20)
    assert seen(0.4, slope).errors > 10
    assert (slope.mean() - 0.4) / slope.std(ddof=1) < 2


@pytest.mark.parametrize("answers", [1, 2, 4, 16, 128])
def test_shares_of_a_healthy_run_are_no_change(answers):
    """Whatever the share is: the first step, and the sixteen windows of twenty steps that come after it."""
    rng = np.random.default_rng(0)
    wrong = 0
    for share in np.repeat([0.02, 0.2, 0.5, 0.8, 0.9, 0.95], 100):
        share_S = rng.binomial(answers, share, 36) / answers
        windows = (share_S[1 + k : 21 + k] for k in range(0, 16, 3))
        wrong += any(
            abs(seen(share_S[0], after, most=1.0, answers=(answers, 20 * answers)).errors) >= SURE for after in windows
        )
    assert wrong == 0


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1.0), st.sampled_from([None, 0.01, 1.0]))
def test_a_first_step_that_is_drawn_like_the_others_is_no_change(seed, scatter, scale):
    rng = np.random.default_rng(seed)
    errors = [seen(x[0], x[1:], scale=scale).errors for x in rng.lognormal(0, scatter, (500, 21))]
    assert np.mean(np.array(errors) >= SURE) <= 0.002


def test_errors_are_standard_errors():
    rng = np.random.default_rng(0)
    errors = [seen(x[0], x[1:]).errors for x in rng.normal(3, 2, (4000, 41))]
    assert np.std(errors) == pytest.approx(1.0, abs=0.1)
