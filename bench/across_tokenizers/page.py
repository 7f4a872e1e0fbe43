"""Tables and figures from `bench/results/across_tokenizers.json`.

    python bench/across_tokenizers/page.py

Writes docs/figures/across_tokenizers*.svg and prints the tables as Markdown.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))

from across_tokenizers import arms, routed, world
from measures.drawing import COLOURS, STYLE

from opd.reports.page.scales import Scale, ticks_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "across_tokenizers.json"
FIGURES = ROOT / "docs" / "figures"
ROW, LEFT, WIDTH, TOP = 34, 210, 720, 34


def closed(run: Mapping[str, Any]) -> float:
    """Share of the gap between student and teacher that a run closed."""
    before, after, teacher = (run[key]["mean"] for key in ("before", "after", "teacher"))
    return (after - before) / (teacher - before)


def rows(found: Mapping[str, Any]) -> Iterator[tuple[arms.Arm, list[Mapping[str, Any]]]]:
    """The ways that have runs, with their runs by seed."""
    for arm in arms.ARMS:
        if runs := found.get("arms", {}).get(arm.name):
            yield arm, [runs[seed] for seed in sorted(runs)]


def table(found: Mapping[str, Any]) -> str:
    lines = [
        "| way | teacher | learning rate | after, % | gap closed, % (of each seed) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, runs in rows(found):
        after = statistics.fmean(run["after"]["mean"] for run in runs)
        each = [closed(run) for run in runs]
        shown = ", ".join(f"{100 * share:.0f}" for share in each)
        teacher = "Unigram" if arm.teacher == "unigram_teacher" else "own BPE"
        lines.append(
            f"| {arm.shown} | {teacher} | {runs[0]['lr']:g} | {100 * after:.1f} | "
            f"**{100 * statistics.fmean(each):.0f}** ({shown}) |"
        )
    return "\n".join(lines)


def routed_table(found: Mapping[str, Any]) -> str:
    lines = [
        "| task | its teacher | right in its style, % | right in any style, % | style of its teacher, % "
        "| nats from Unigram | nats from WordPiece | nats from own BPE |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for task, teacher in routed.TEACHERS.items():
        one = found["routed"]["tasks"][task]
        pairs = [
            (100 * when["accuracy"]["mean"], 100 * when["solved"], 100 * when["styles"][routed.STYLES[teacher]])
            for when in (one["before"], one["after"])
        ]
        figures = [f"{a:.1f} to {b:.1f}" for a, b in zip(*pairs, strict=True)]
        for name in routed.TEACHERS.values():
            shown = f"{one['before']['from'][name][0]:.1f} to {one['after']['from'][name][0]:.1f}"
            figures.append(f"**{shown}**" if name == teacher else shown)
        lines.append(f"| {world.TASKS[task]} | {teacher.removeprefix('routed_')} | {' | '.join(figures)} |")
    return "\n".join(lines)


def arms_figure(found: Mapping[str, Any]) -> str:
    """Held-out accuracy after each run, with its interval; where the student began, and where the teachers are."""
    shown = list(rows(found))
    height = TOP + ROW * len(shown) + 54
    x = Scale(low=0, high=100).placed(LEFT, WIDTH - 20)
    bottom = TOP + ROW * len(shown)
    parts = _opened("Held-out accuracy after the run, each dot one seed with its 95 % interval", height)
    for value, label in ticks_of(x, 10):
        parts.append(_line(x.at(value), x.at(value), TOP, bottom, "grid"))
        parts.append(_text(x.at(value), bottom + 17, label, "middle"))
    parts.append(_text((LEFT + WIDTH) / 2, bottom + 38, "held-out answers that are right, % of 600 problems", "middle"))
    any_run = shown[0][1][0]
    levels = {"student before": any_run["before"]["mean"]}
    for arm, runs in shown:
        name = "Unigram teacher" if arm.teacher == "unigram_teacher" else "BPE teacher"
        levels[name] = runs[0]["teacher"]["mean"]
    for i, (name, value) in enumerate(sorted(levels.items(), key=lambda item: item[1])):
        parts.append(_line(x.at(100 * value), x.at(100 * value), TOP - 4, bottom, "axis level"))
        anchor = "end" if i == len(levels) - 2 and len(levels) > 2 else "start" if i else "middle"
        parts.append(_text(x.at(100 * value), TOP - 10, name, anchor))
    for i, (arm, runs) in enumerate(shown):
        middle = TOP + ROW * (i + 0.5)
        colour = COLOURS[0] if arm.teacher == "unigram_teacher" else COLOURS[1]
        parts.append(_text(LEFT - 10, middle + 4, arm.shown, "end"))
        for j, run in enumerate(runs):
            y = middle + 8 * (j - (len(runs) - 1) / 2)
            low, mean, high = (x.at(100 * run["after"][key]) for key in ("low", "mean", "high"))
            parts.append(f'<path d="M{low:.1f},{y:.1f}H{high:.1f}" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(f'<circle cx="{mean:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def routed_figure(found: Mapping[str, Any]) -> str:
    """How far the student is from each teacher in each task, before and after."""
    tasks = found["routed"]["tasks"]
    values = [when["from"][name][0] for one in tasks.values() for when in one.values() for name in when["from"]]
    low, high = max(min(values), 0.05) / 1.4, max(values) * 1.4
    x = Scale(low=low, high=high, log=True).placed(LEFT, WIDTH - 20)
    height = TOP + ROW * 9 * 0.75 + 3 * 16 + 54
    parts = _opened("How far the student is from each teacher, task by task, before and after the routed run", height)
    bottom = height - 54
    for value, label in ticks_of(x, 8):
        parts.append(_line(x.at(value), x.at(value), TOP, bottom, "grid"))
        parts.append(_text(x.at(value), bottom + 17, label, "middle"))
    caption = "log p - log q of the student's answers, nats in an answer (log scale); open: before, full: after"
    parts.append(_text(WIDTH / 2, bottom + 38, caption, "middle"))
    y = TOP + 4.0
    for task, teacher in routed.TEACHERS.items():
        parts.append(f'<text class="title" x="8" y="{y + 12:.1f}">{escape(world.TASKS[task])}</text>')
        y += 16
        for name in routed.TEACHERS.values():
            before, after = (x.at(max(tasks[task][when]["from"][name][0], low)) for when in ("before", "after"))
            colour = COLOURS[0] if name == teacher else COLOURS[5]
            middle = y + ROW * 0.75 / 2
            says = f"{name.removeprefix('routed_')}{', its teacher' if name == teacher else ''}"
            parts.append(_text(LEFT - 10, middle + 4, says, "end"))
            parts.append(f'<path d="M{before:.1f},{middle:.1f}H{after:.1f}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{before:.1f}" cy="{middle:.1f}" r="4" fill="#fff" stroke="{colour}"/>')
            parts.append(f'<circle cx="{after:.1f}" cy="{middle:.1f}" r="4" fill="{colour}"/>')
            y += ROW * 0.75
    return "\n".join([*parts, "</svg>"]) + "\n"


def _opened(title: str, height: float) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
        f'height="{height:g}" role="img"><title>{escape(title)}</title><style>{STYLE}</style>',
        f'<rect width="{WIDTH}" height="{height:g}" fill="#fff"/>',
    ]


def _line(x1: float, x2: float, y1: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def main() -> None:
    found = json.loads(RESULTS.read_text())
    (FIGURES / "across_tokenizers.svg").write_text(arms_figure(found), encoding="utf-8")
    print(table(found))
    if "routed" in found:
        (FIGURES / "across_tokenizers_routed.svg").write_text(routed_figure(found), encoding="utf-8")
        print()
        print(routed_table(found))


if __name__ == "__main__":
    main()
