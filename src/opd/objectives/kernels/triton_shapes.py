"""Shapes as Triton device functions: p h(r) and p f(r) of one entry, as `objectives/shapes.py` defines them.

Only float32. exp and log are Triton's own; functions that have to be exact near 0 are series there, since `1 + x`
loses x. Comparisons, not min and max, hold numbers to a range: a NaN stays a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR: tl.constexpr = tl.constexpr(80.0)  # as in shapes.py
NEAR: tl.constexpr = tl.constexpr(0.5)  # below it the series are exact to float32
SATURATED: tl.constexpr = tl.constexpr(15.0)  # past it tanh is 1 in float32


@triton.jit
def at_most(x, bound):
    return tl.where(x > bound, bound, x)


@triton.jit
def at_least(x, bound):
    return tl.where(x < bound, bound, x)


@triton.jit
def expm1(x):
    series = 1.0 + x / 9.0
    series = 1.0 + x / 8.0 * series
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(tl.abs(x) < NEAR, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """2 artanh(x / (2 + x)) near 0."""
    s = x / (2.0 + x)
    s2 = s * s
    series = 1.0 / 11.0 + s2 / 13.0
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    series = 1.0 + s2 * series
    return tl.where(tl.abs(x) < NEAR, 2.0 * s * series, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    grown = expm1(2.0 * at_least(at_most(x, SATURATED), -SATURATED))
    return grown / (grown + 2.0)


@triton.jit
def weighted(mass, value):
    """mass * value with 0 * inf = 0."""
    return tl.where(mass == 0.0, 0.0, mass * value)


@triton.jit
def hermite(value_ptr, slope_ptr, place, last, inside):
    """A table between its entries; place in intervals from its start."""
    place = at_most(place, last.to(tl.float32))
    index = tl.where(place == place, place, 0.0).to(tl.int32)
    index = tl.where(index > last - 1, last - 1, index)
    t = place - index.to(tl.float32)
    here = tl.load(value_ptr + index, mask=inside, other=0.0)
    rise = tl.load(value_ptr + index + 1, mask=inside, other=0.0) - here
    bend_here = tl.load(slope_ptr + index, mask=inside, other=0.0) - rise
    bend_there = rise - tl.load(slope_ptr + index + 1, mask=inside, other=0.0)
    return here + t * (rise + (1.0 - t) * ((1.0 - t) * bend_here + t * bend_there))


@triton.jit
def masses(
    logp, logq, inside, low, high, a, b, c, table_ptr, entries, step, SHAPE: tl.constexpr, WITH_VALUE: tl.constexpr
):
    """(p h(r), p f(r)) of every entry; without WITH_VALUE the second is p h(r) again.

    low, high   of clipped shapes, per row.
    a, b, c     numbers of the shape, see `triton_launch.shape_arguments`.
    table_ptr   float32 [4, entries], of tanh: J, its slope x step, K, its slope x step.
    """
    gap = tl.where((logp == float("-inf")) & (logq == float("-inf")), 0.0, logq - logp)
    p = tl.exp(logp)
    q = tl.exp(logq)
    h_mass = weighted(p, gap)
    f_mass = -h_mass
    if SHAPE == "forward_kl":
        h_mass = q - p
        f_mass = weighted(q, gap)
    elif SHAPE == "jsd":
        near = at_most(gap, FAR)
        mixed = log1p(a * expm1(near))
        h_mass = weighted(p, mixed) * (b * (1.0 - a))
        f_mass = weighted(q, near - mixed) * (b * a) - h_mass
    elif SHAPE == "skew_forward_kl":
        near = at_most(gap, FAR)
        excess = expm1(near)
        h_mass = weighted(p, (1.0 - a) * (1.0 - a) * excess / (1.0 + a * excess))
        f_mass = weighted(q, near - log1p(a * excess))
    elif SHAPE == "skew_reverse_kl":
        log_u = log1p((1.0 - a) * expm1(at_most(gap, FAR))) + at_least(gap - FAR, 0.0)
        h_mass = weighted(p, log_u + a * expm1(-log_u))
        f_mass = -weighted(p, log_u)
    elif SHAPE == "total_variation":
        h_mass = weighted(p, 0.5 * ((gap > a).to(tl.float32) - (gap < -a).to(tl.float32)))
        f_mass = 0.5 * (at_least(c * q - p, 0.0) + at_least(p - b * q, 0.0))
    elif SHAPE == "clipped":
        held = at_least(at_most(gap, high), low)
        rest = tl.where(held == float("-inf"), logp, logq - held)
        h_mass = weighted(p, held)
        f_mass = q - tl.exp(rest) - h_mass
    elif SHAPE == "tanh":
        h_mass = weighted(p, a * tanh(gap / a))
        if WITH_VALUE:
            place = tl.abs(gap) / step
            above = hermite(table_ptr, table_ptr + entries, place, entries - 1, inside)
            below = hermite(table_ptr + 2 * entries, table_ptr + 3 * entries, place, entries - 1, inside)
            f_mass = tl.where(gap >= 0.0, q * above, p * below)
    else:
        tl.static_assert(SHAPE == "reverse_kl", "an unknown shape")
    return h_mass, f_mass
