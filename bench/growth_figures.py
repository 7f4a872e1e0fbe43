"""docs/figures/growth_*.svg: seconds and memory against every size, from the results that are there.

python bench/growth_figures.py
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from measures.drawing import Line, Panel, figure
from results import LATEST

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
TITLES = {"pass": "The pass over the vocabulary", "update": "A whole update"}
ORDER = ("tokens", "answer", "rows", "vocab", "teachers", "k")
THOUSANDS = 10_000  # an axis that ends beyond it counts in thousands
UNITS = {"seconds": "seconds", "megabytes": "peak memory, MB"}
ROOM = 1.3  # above and below the points; an axis covers at least a factor of ten, so that a level line looks level


def figures(growth: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """File name to SVG: two of each part that was measured."""
    return {
        f"growth_{part}_{unit}.svg": figure(
            f"{TITLES[part]}: {UNITS[unit]} against each size, both on logarithmic axes",
            [panel(sweeps[size], unit) for size in ORDER if size in sweeps],
        )
        for part, sweeps in growth.items()
        for unit in UNITS
    }


def panel(found: Mapping[str, Any], unit: str) -> Panel:
    """What was measured, and the law's slope through the middle of it."""
    x, y, power, label = found["x"], found[unit], found[f"{unit}_law"], found["label"]
    if x[-1] >= THOUSANDS:
        x, label = [value / 1000 for value in x], f"{label}, thousands"
    slope = found[f"{unit}_slope"]
    slope = slope["slope"] if isinstance(slope, Mapping) else slope
    middle_x, middle_y = _geometric_mean(x), _geometric_mean(y)
    expected = [middle_y * (value / middle_x) ** power for value in x]
    everything = [*y, *expected]
    low, high = min(everything) / ROOM, max(everything) * ROOM
    if high < 10 * low:
        low, high = (low * high / 10) ** 0.5, (low * high * 10) ** 0.5
    return Panel(
        title=f"Against {found['label']}",
        x_label=label,
        y_label=UNITS[unit],
        lines=[
            Line(name=f"measured, slope {_two(slope)}", points=list(zip(x, y, strict=True)), colour=0),
            Line(name=f"expected, {_two(power)}", points=list(zip(x, expected, strict=True)), colour=1, dashed=True),
        ],
        x=(x[0], x[-1]),
        y=(low, high),
        log_x=True,
        log_y=True,
    )


def _two(value: float) -> str:
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def _geometric_mean(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def main() -> None:
    for name, drawn in figures(json.loads(LATEST.read_text())["growth"]).items():
        (FIGURES / name).write_text(drawn)


if __name__ == "__main__":
    main()
