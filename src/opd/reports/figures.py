"""Numbers as people read them: one spelling of shares, counts, bytes and durations for all reports. ASCII only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def interval(score: Mapping[str, Any]) -> str:
    """The two ends of a score's interval, in percent: `[82.0, 88.1]`."""
    return f"[{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def closed(gap: float | None, before: float | None, after: float | None) -> str:
    """What `gap_closed` is: `91 %`; below 0, where a share says nothing, `lost 3.2 points`."""
    if gap is None or before is None or after is None:
        return "-"
    return f"lost {100 * (before - after):.1f} points" if gap < 0 else f"{100 * gap:.0f} %"


def count(number: float | None) -> str:
    """Three digits and a magnitude: 950, 12.1k, 3.40M, 8.2e+19 beyond."""
    if number is None:
        return "-"
    for limit, unit, digits in ((1e3, 1, 0), (1e4, 1e3, 2), (1e5, 1e3, 1), (1e6, 1e3, 0)):
        if abs(number) < limit:
            return f"{number / unit:.{digits}f}" + ("" if unit == 1 else "k")
    for unit, name in ((1e6, "M"), (1e9, "G"), (1e12, "T")):
        if abs(number) < 1000 * unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.2g}"


def often(n: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(n, f"{n} times")


def counted(n: int, noun: str, form: str = "") -> str:
    """1 answer, 4 answers; with the form "," 4,000 answers."""
    return f"{n:{form}} {noun}" + ("" if n == 1 else "s")


def size(number: float) -> str:
    """Bytes: 512 B, 1.5 MB, 23.4 GB, 1.2 TB (powers of ten)."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """45 s, 1:12, 2:03:10."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def number(value: Any) -> str:
    """A metric: four significant digits; nan and inf as such."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else "-"
