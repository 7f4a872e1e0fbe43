"""Charts as inline SVG, written by hand: pure functions from plain numbers to markup that is safe to embed.

A curve of many steps is thinned so that its extremes stay; over it runs the mean of a window of steps. A missing value
breaks the line. Colours are classes of base.css (Okabe & Ito's, darkened for text on white), so both schemes hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from opd.reports.figures import count
from opd.reports.page.base import attribute, text
from opd.reports.page.scales import Scale, ticks_of
from opd.reports.page.thinning import Point, smooth, thin

WIDTH, HEIGHT = 390, 230  # what a phone shows without scaling, and a third of a wide page
COLOURS = 6
WHISKERS = 40  # more intervals than this in one chart are drawn as bands

Interval = tuple[float, float]


class Chart(NamedTuple):
    """svg: markup. hover: the numbers behind it, plain JSON for charts.js."""

    svg: str
    hover: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve.

    points     (x, y) in the order of x; y None where it is missing.
    intervals  (low, high) for each point, or nothing.
    colour     1 to 6; larger numbers come round again, dashed.
    window     steps that the bold line averages; 1: the points themselves.
    tag        a letter or two at the end of the line.
    marks      whether every point gets a dot.
    """

    name: str
    points: Sequence[Point]
    intervals: Sequence[Interval | None] = ()
    colour: int = 1
    window: int = 1
    tag: str = ""
    marks: bool = False


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A level to compare with: a horizontal line, and its interval where it has one."""

    name: str
    value: float
    interval: Interval | None = None
    colour: int = 6


Format = Callable[[float], str]


def short_count(value: float) -> str:
    """A count beside an axis: 950, 12k, 1.5M."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}" if value < 1e15 else f"{value:.3g}"
    return f"{value:.4g}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    log: bool = False,
    references: Sequence[Reference] = (),
    limits: tuple[float | None, float | None] = (None, None),
    x_format: Format = short_count,
    y_format: Format | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    max_points: int = 240,
) -> Chart:
    """Curves over steps, tokens or operations.

    title       for people who cannot see the picture; figures carry their own heading.
    log         logarithmic y; values that are not above 0 count as missing.
    limits      y never goes below or above these (shares: 0 and 1).
    max_points  of one drawn line, at most; an even larger record is thinned to its extremes.
    """
    series = [_positive(s) if log else s for s in series]
    drawn = [s for s in series if any(y is not None for _, y in s.points)]
    width, height = size
    if not drawn:
        label = f'<text x="{width / 2:.0f}" y="{height / 2:.0f}" text-anchor="middle">nothing was measured</text>'
        return Chart(_svg(size, title, [label]), {"series": []})
    references = [r for r in references if not log or r.value > 0]
    xs = [x for s in drawn for x, y in s.points if y is not None]
    ys = [y for s in drawn for y in _extent(s, log)]
    ys += [y for r in references for y in (r.value, *(r.interval or ())) if not log or y > 0]
    y_scale = Scale.of(ys, log=log, limits=limits, least=0.0 if y_format is percent_label else 0.2)
    y_ticks = ticks_of(y_scale, 5, y_format)
    left = 14 + 6.3 * max(len(label) for _, label in y_ticks)
    right = width - (12 + 8 * max(len(s.tag) for s in drawn))
    x_scale = Scale.of(xs, exact=True)
    x_ticks = ticks_of(x_scale, 5, x_format, whole=True)
    x_scale = x_scale.placed(left, right)
    y_scale = y_scale.placed(height - 36, 24)

    parts = [f'<text x="2" y="12">{text(y_label)}{" (log scale)" if log else ""}</text>']
    for value, label in y_ticks:
        y = y_scale.at(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text(label)}</text>')
    for value, label in x_ticks:
        x = x_scale.at(value)
        parts.append(f'<text x="{x:.1f}" y="{height - 21}" text-anchor="middle">{text(label)}</text>')
    parts.append(f'<line class="axis" x1="{left:.1f}" x2="{right:.1f}" y1="{height - 36}" y2="{height - 36}"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle:.1f}" y="{height - 5}" text-anchor="middle">{text(x_label)}</text>')
    for reference in references:
        parts += _reference(reference, y_scale, left, right)
    as_band = sum(len(one.intervals) for one in drawn) > WHISKERS
    for one in drawn:
        parts += _intervals(one, x_scale, y_scale, as_band)
        parts += _curve(one, x_scale, y_scale, max_points)
    parts += _end_tags(drawn, x_scale, y_scale)
    hover = {
        "x": [round(x_scale.start, 1), round(x_scale.end, 1)],
        "y": [24, height - 36],
        "domain": [x_scale.low, x_scale.high],
        "label": x_label,
        "series": [_hover(s, max_points // 2) for s in drawn],
    }
    return Chart(_svg(size, f"{title}. {_in_words(drawn)}", parts), hover)


def score_chart(rows: Sequence[tuple[str, Mapping[str, Any], int]], *, title: str, width: int = WIDTH) -> str:
    """Scores with their intervals, one below the other: (name, {mean, low, high} as fractions, colour)."""
    if not rows:
        return ""
    scale = Scale.of([row[key] for _, row, _ in rows for key in ("low", "high")], limits=(0.0, 1.0))
    ticks = ticks_of(scale, 4, percent_label)
    scale = scale.placed(12, width - 24)
    height = 34 * len(rows) + 30
    parts = []
    for value, label in ticks:
        x = scale.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{text(label)}</text>')
    for i, (name, score, colour) in enumerate(rows):
        y = 34 * i + 26
        low, mean, high = (scale.at(score[key]) for key in ("low", "mean", "high"))
        stroke, fill = _classes(colour)
        anchor, x = ("end", high) if mean > width / 2 else ("start", low)
        parts.append(f'<text class="over" x="{x:.1f}" y="{y - 10}" text-anchor="{anchor}">{text(name)}</text>')
        parts.append(f'<line class="whisker {stroke}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        for end in (low, high):
            parts.append(f'<line class="whisker {stroke}" x1="{end:.1f}" x2="{end:.1f}" y1="{y - 4}" y2="{y + 4}"/>')
        parts.append(f'<circle class="{fill}" cx="{mean:.1f}" cy="{y}" r="4.5"/>')
    return _svg((width, height), title, parts)


def stacked_bar(rows: Sequence[tuple[str, float, int]], *, title: str) -> str:
    """One bar whose parts add up to the whole: (name, amount, colour)."""
    total = sum(value for _, value, _ in rows)
    parts, x = [], 0.0
    for name, value, colour in rows:
        share = 1000 * value / total if total else 0.0
        tip = f"<title>{text(name)}: {100 * value / total if total else 0:.0f} %</title>"
        parts.append(
            f'<rect class="{_classes(colour)[1]}" x="{x:.2f}" y="0" width="{share:.2f}" height="20">{tip}</rect>'
        )
        x += share
    return (
        f'<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img" aria-label={attribute(title)}>'
        f"{''.join(parts)}</svg>"
    )


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Names beside their colours."""
    items = "".join(f"<li>{swatch(colour)}{text(name)}</li>" for name, colour in entries)
    return f'<ul class="legend">{items}</ul>'


def swatch(colour: int) -> str:
    """A short line in a series' colour."""
    stroke, _ = _classes(colour)
    line = f'<line class="swatch {stroke}" x1="0" x2="18" y1="6" y2="6"/>'
    return f'<svg class="swatch" width="18" height="12" aria-hidden="true">{line}</svg>'


def percent_label(fraction: float) -> str:
    return f"{100 * fraction:.10g} %" if abs(fraction) > 1e-12 else "0 %"


# ---- parts of a chart ---------------------------------------------------------------------------------------------


def _svg(size: tuple[int, int], title: str, parts: Sequence[str]) -> str:
    width, height = size
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f"aria-label={attribute(title)}>{''.join(parts)}</svg>"
    )


def _classes(colour: int) -> tuple[str, str]:
    index = (colour - 1) % COLOURS + 1
    return f"stroke-{index}" + (" dashed" if colour > COLOURS else ""), f"fill-{index}"


def _positive(series: Series) -> Series:
    points = [(x, y if y is not None and y > 0 else None) for x, y in series.points]
    return Series(**{**vars(series), "points": points})


def _extent(series: Series, log: bool) -> Iterator[float]:
    """What the picture of a curve must hold: its intervals, and its values but for rare peaks far outside."""
    known = sorted(y for _, y in series.points if y is not None)
    low, high = known[0], known[-1]
    if len(known) >= 100 and not log:
        usual = known[len(known) // 100], known[-1 - len(known) // 100]
        room = 3 * (usual[1] - usual[0])
        low, high = max(low, usual[0] - room), min(high, usual[1] + room)
    yield from (low, high)
    for interval in series.intervals:
        if interval is not None:
            yield from (y for y in interval if not log or y > 0)


def _curve(series: Series, x_scale: Scale, y_scale: Scale, most: int) -> Iterator[str]:
    stroke, fill = _classes(series.colour)
    raw = thin(series.points, most)
    if series.window > 1:
        yield from _line(raw, x_scale, y_scale, f"faint {stroke}")
        means = smooth([y for _, y in series.points], series.window)
        raw = thin([(x, y) for (x, _), y in zip(series.points, means, strict=True)], most)
    yield from _line(raw, x_scale, y_scale, f"curve {stroke}")
    for i, (x, y) in enumerate(raw):
        alone = (i == 0 or raw[i - 1][1] is None) and (i + 1 == len(raw) or raw[i + 1][1] is None)
        if y is not None and (alone or series.marks):
            at = f'cx="{x_scale.at(x):.1f}" cy="{y_scale.at(y):.1f}"'
            yield f'<circle class="{fill}" {at} r="{3.5 if alone else 3}"/>'


def _line(points: Sequence[Point], x_scale: Scale, y_scale: Scale, classes: str) -> Iterator[str]:
    """A path with a gap at every missing value."""
    path, pen = [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        path.append(f"{pen}{x_scale.at(x):.1f},{y_scale.at(y):.1f}")
        pen = "L"
    if path:
        yield f'<path class="{classes}" d="{"".join(path)}"/>'


def _intervals(series: Series, x_scale: Scale, y_scale: Scale, as_band: bool) -> Iterator[str]:
    stroke, fill = _classes(series.colour)
    known = [(x, i) for (x, _), i in zip(series.points, series.intervals, strict=False) if i is not None]
    if as_band and len(known) > 1:
        upper = [f"{x_scale.at(x):.1f},{y_scale.at(high):.1f}" for x, (_, high) in known]
        lower = [f"{x_scale.at(x):.1f},{y_scale.at(low):.1f}" for x, (low, _) in reversed(known)]
        yield f'<path class="band {fill}" d="M{"L".join(upper + lower)}Z"/>'
        return
    for x, (low, high) in known:
        at, bottom, top = x_scale.at(x), y_scale.at(low), y_scale.at(high)
        yield f'<line class="whisker {stroke}" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{top:.1f}"/>'
        for y in (bottom, top):
            yield f'<line class="whisker {stroke}" x1="{at - 2.5:.1f}" x2="{at + 2.5:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _reference(reference: Reference, y_scale: Scale, left: float, right: float) -> Iterator[str]:
    stroke, fill = _classes(reference.colour)
    if reference.interval is not None:
        top, bottom = y_scale.at(reference.interval[1]), y_scale.at(reference.interval[0])
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        yield f'<rect class="band {fill}" {box}/>'
    y = y_scale.at(reference.value)
    yield f'<line class="reference {stroke}" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _end_tags(series: Sequence[Series], x_scale: Scale, y_scale: Scale) -> Iterator[str]:
    """Each line's letter at its right end, moved apart where they would lie on each other."""
    ends = []
    for one in series:
        if one.tag:
            means = smooth([y for _, y in one.points], one.window)
            x, y = [(x, y) for (x, _), y in zip(one.points, means, strict=True) if y is not None][-1]
            ends.append((y_scale.at(y), x_scale.at(x), one))
    free: list[tuple[float, float]] = []  # where letters stand already
    for y, x, one in sorted(ends, key=lambda end: end[:2]):
        while any(abs(y - there) < 11 and abs(x - beside) < 12 for there, beside in free):
            y += 1
        free.append((y, x))
        fill = _classes(one.colour)[1]
        yield f'<text class="tag {fill}" x="{x + 5:.1f}" y="{y + 4:.1f}">{text(one.tag)}</text>'


def _hover(series: Series, most: int) -> dict[str, Any]:
    """Name, colour and up to `most` points as [x, y, mean of the window]."""
    means = smooth([y for _, y in series.points], series.window)
    rows = [[x, _short(y), _short(m)] for (x, y), m in zip(series.points, means, strict=True)]
    step = math.ceil(len(rows) / most)
    kept = rows[::step] + ([rows[-1]] if (len(rows) - 1) % step else [])
    if series.window == 1:
        kept = [row[:2] for row in kept]
    return {"name": series.tag or series.name, "colour": _classes(series.colour)[1], "points": kept}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _in_words(series: Sequence[Series]) -> str:
    said = []
    for one in series[:COLOURS]:
        known = [(x, y) for x, y in one.points if y is not None]
        (x0, y0), (x1, y1) = known[0], known[-1]
        said.append(f"{one.name}: {y0:.3g} at {count(x0)}, {y1:.3g} at {count(x1)}")
    return "; ".join(said)
