"""Lines in panels, as SVG that stands alone: plain text, no script, no font of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from opd.reports.page.scales import Scale, ticks_of

COLOURS = ("#0b6aa8", "#b3480a", "#00785a", "#8d3f78", "#7a6a00", "#444444")  # Okabe and Ito's, darker on white
WIDE, NARROW = 430, 300  # of a panel; narrow where there are three or more
HEIGHT, LEGEND_LINE = 300, 18
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 40, 46
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600}.grid{stroke:#e4e4e4}.axis{stroke:#888}"
    ".curve{fill:none;stroke-width:2;stroke-linejoin:round}.dashed{stroke-dasharray:6 4}.level{stroke-dasharray:2 3}"
)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. Parts outside the panel's y range are left out. colour: 0 to 5."""

    name: str
    points: Points
    colour: int
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line, named at its right end."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot. x and y: (lowest, highest) of its axes."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    levels: Sequence[Level] = ()


def figure(title: str, panels: Sequence[Panel]) -> str:
    """The panels side by side, each with its legend below. title: for those who do not see the picture."""
    height = HEIGHT + LEGEND_LINE * max(len(p.lines) for p in panels) + 8
    each = NARROW if len(panels) > 2 else WIDE
    width = each * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{STYLE}</style>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for i, panel in enumerate(panels):
        parts += _panel(panel, i * each, each)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, left: float, width: float) -> list[str]:
    x = Scale(low=panel.x[0], high=panel.x[1], log=panel.log_x)
    y = Scale(low=panel.y[0], high=panel.y[1], log=panel.log_y)
    x_ticks, y_ticks = ticks_of(x, 6), ticks_of(y, 6)
    x, y = x.placed(left + LEFT, left + width - RIGHT), y.placed(HEIGHT - BOTTOM, TOP)
    parts = [
        f'<text class="title" x="{left + 8}" y="16">{escape(panel.title)}</text>',
        f'<text x="{left + 8}" y="32">{escape(panel.y_label)}</text>',
    ]
    for value, label in y_ticks:
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{x.start - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for value, label in x_ticks:
        at = x.at(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:.1f}" y2="{y.start:.1f}"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 17:.1f}" text-anchor="middle">{escape(label)}</text>')
    parts.append(f'<line class="axis" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{y.start:.1f}" y2="{y.start:.1f}"/>')
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle:.1f}" y="{y.start + 36:.1f}" text-anchor="middle">{escape(panel.x_label)}</text>')
    for level in panel.levels:
        at = y.at(level.value)
        ends = f'x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"'
        parts.append(f'<line class="axis level" {ends}/>')
        parts.append(f'<text x="{x.end - 4:.1f}" y="{at - 5:.1f}" text-anchor="end">{escape(level.name)}</text>')
    for i, line in enumerate(panel.lines):
        parts += _curve(line, x, y)
        parts += _entry(line, left + LEFT, HEIGHT + LEGEND_LINE * i + 4)
    return parts


def _curve(line: Line, x: Scale, y: Scale) -> list[str]:
    path, pen = [], "M"
    for at, value in line.points:
        if not y.low <= value <= y.high:
            pen = "M"
            continue
        path.append(f"{pen}{x.at(at):.1f},{y.at(value):.1f}")
        pen = "L"
    return [f'<path {_stroke(line)} d="{"".join(path)}"/>'] if path else []


def _entry(line: Line, left: float, y: float) -> list[str]:
    swatch = f'<path {_stroke(line)} d="M{left},{y}h26"/>'
    return [swatch, f'<text x="{left + 34}" y="{y + 4}">{escape(line.name)}</text>']


def _stroke(line: Line) -> str:
    return f'class="curve{" dashed" if line.dashed else ""}" stroke="{COLOURS[line.colour]}"'
