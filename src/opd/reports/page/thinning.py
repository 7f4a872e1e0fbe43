"""A long curve made light and readable: fewer points without losing a peak, and the mean of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence

Point = tuple[float, float | None]


def window_for(points: int) -> int:
    """Steps to average for a curve of so many: odd, a fortieth of them, none for a short curve."""
    return 1 if points < 20 else min(2 * (points // 80) + 3, 201)


def smooth(values: Sequence[float | None], window: int) -> list[float | None]:
    """Means over a window around each value; missing values are left out of it, and stay missing."""
    half = window // 2
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    made: list[float | None] = []
    for i, value in enumerate(values):
        low, high = max(0, i - half), min(len(values), i + half + 1)
        made.append(None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low]))
    return made


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points: of each stretch its lowest and its highest, in their order, so that no peak is lost.

    A stretch with a missing value ends in a missing one: the line stays broken there. First and last point stay.
    """
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(2 * len(points) / max(most - 2, 2))
    made: list[Point] = [points[0]]
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        known = [(y, i) for i, (_, y) in enumerate(part) if y is not None]
        if known:
            made += [part[i] for i in sorted({min(known)[1], max(known)[1]})]
        if len(known) < len(part):
            made.append((part[-1][0], None))
    if made[-1] != points[-1]:
        made.append(points[-1])
    return made
