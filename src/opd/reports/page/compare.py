"""`compare.html`: several runs on one page, their curves over steps, over trained tokens and over operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd.errors import BadInput
from opd.journal.atomic import write_atomic
from opd.reports.compare import Arm, Comparison, against, correction, gap
from opd.reports.figures import count, duration, interval, percent
from opd.reports.page.answers import clip, option_name
from opd.reports.page.base import asset, attribute, page, text
from opd.reports.page.charts import (
    WHISKERS,
    Chart,
    Series,
    legend,
    line_chart,
    percent_label,
    score_chart,
    short_count,
    swatch,
)
from opd.reports.page.curves import spans
from opd.reports.page.thinning import smooth, window_for
from opd.reports.run_data import Curve

AXES = (("step", "steps"), ("tokens", "trained tokens"), ("flops", "FLOPs"))
POINTS = 1500  # of all the lines of one chart together


@dataclass(frozen=True)
class Overlay:
    """A metric of all runs in one picture. `share`: a fraction, shown in percent."""

    key: str
    title: str
    caption: str
    y_label: str
    share: bool = False


OVERLAYS = (
    Overlay("accuracy", "Accuracy", "Right answers to held-out problems, with intervals.", "right answers", True),
    Overlay("reverse_kl", "Distance to the teacher", "Reverse KL on the student's own answers.", "nats per token"),
    Overlay("response_length", "Length of answers", "Mean of a step.", "tokens per answer"),
    Overlay("entropy", "Entropy", "How undecided the student is at each token.", "nats per token"),
)


def write_comparison(made: Comparison, path: Path) -> Path:
    """Writes the page; raises BadInput when it cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, compare_page(made).encode())
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}; choose another --out") from error
    return path


def compare_page(made: Comparison) -> str:
    """The page, self-contained; below 350 kB whatever the runs (12 at most)."""
    names = " against ".join(arm.run.name[:80] for arm in made.arms)
    charts = {
        f"{overlay.key}-{axis}": _overlay(made, overlay, axis, label) for overlay in OVERLAYS for axis, label in AXES
    }
    charts = {key: chart for key, chart in charts.items() if chart is not None}
    hover = {key: {**chart.hover, "percent": key.startswith("accuracy-")} for key, chart in charts.items()}
    body = "\n".join(part for part in (_head(made), _table(made), _curves(made, charts), _differences(made)) if part)
    title = f"{names}: runs compared"
    return page(title, body, css=[asset("report.css")], js=[asset("charts.js")], data={"chart-numbers": hover})


def _head(made: Comparison) -> str:
    notes = "".join(f"<li>{clip(caveat, 400)}</li>" for caveat in made.caveats)
    cost = f"<p>{clip(made.per_cost, 500)}</p>" if made.per_cost else ""
    lines = "".join(f"<li>{clip(line, 300)}</li>" for line in against(made))
    lines = f"<ul>{lines}</ul>" if lines else ""
    return (
        f'<h1>{count(len(made.arms))} runs compared</h1><p class="lead">{clip(made.verdict, 600)}</p>{lines}{cost}'
        + (f'<div class="warning"><b>Before you conclude</b><ul>{notes}</ul></div>' if notes else "")
    )


def _table(made: Comparison) -> str:
    scored = [(arm.name[:40], arm.after, i) for i, arm in enumerate(made.arms, 1) if arm.after is not None]
    reach = f'<th class="number">FLOPs to {percent(made.level)}</th>' if made.level is not None else ""
    rows = "".join(_row(made, arm, i) for i, arm in enumerate(made.arms, 1))
    heads = "".join(
        f'<th class="number">{head}</th>'
        for head in ("accuracy", "interval", "gap closed", "steps", "tokens", "FLOPs", "step time")
    )
    task = f"Accuracy on {clip(made.task, 200)}. " if made.task else "Accuracy: each run on its own task. "
    alike = "p: how often a coin, thrown for every problem on which two runs differ, would come out at least as uneven"
    alike = f"{alike} (exact sign test). {correction(made)} " if made.pairs else ""
    bold = "Bold: best, and what cannot be told from it. " if made.best else ""
    picture = f'<div class="scores">{score_chart(scored, title="Scores after training")}</div>' if scored else ""
    return (
        f"<section><h2>Scores and costs</h2>{picture}"
        f'<div class="wide"><table><tr><th>run</th>{heads}{reach}</tr>{rows}</table></div>'
        f'<p class="note">{task}{bold}{alike}Tokens: trained on. FLOPs: '
        "sampling, scoring and training; evaluations are not counted. Step time: of all steps, without loading and "
        "evaluations.</p></section>"
    )


def _row(made: Comparison, arm: Arm, colour: int) -> str:
    best = " best" if arm.letter in made.best else ""
    score = ("-", "-") if arm.after is None else (percent(arm.after["mean"]), interval(arm.after))
    cells = [(score[0], best), (score[1], best), (gap(arm), "")]
    cells += [(cell, "") for cell in (f"{arm.run.steps:,}", count(arm.tokens), count(arm.flops), duration(arm.seconds))]
    if made.level is not None:
        reached = "-" if arm.reached is None else count(arm.reached["flops"])
        cells.append((reached, " best" if arm.letter == made.cheapest else ""))
    numbers = "".join(f'<td class="number{mark}">{text(cell)}</td>' for cell, mark in cells)
    own = f'<br><span class="note">{clip(arm.task, 100)}</span>' if made.task is None and arm.task else ""
    return f'<tr><td class="run">{swatch(colour)}{clip(arm.name, 200)}{own}</td>{numbers}</tr>'


def _curves(made: Comparison, charts: dict[str, Chart]) -> str:
    """All figures for each axis; the style sheet shows those of the chosen one, so it needs no script."""
    if not charts:
        return ""
    choices = "".join(
        f'<label><input type="radio" name="axis" id="axis-{axis}"{checked}> {label}</label>'
        for (axis, label), checked in zip(AXES, (" checked", "", ""), strict=True)
    )
    names = legend([(_short_name(arm.name), i) for i, arm in enumerate(made.arms, 1)])
    blocks = []
    for axis, _ in AXES:
        figures = "".join(
            f"<figure data-chart={attribute(f'{overlay.key}-{axis}')}><figcaption><h3>{overlay.title}</h3>"
            f'<p class="note">{overlay.caption}</p></figcaption>{charts[f"{overlay.key}-{axis}"].svg}'
            '<output class="several"></output></figure>'
            for overlay in OVERLAYS
            if f"{overlay.key}-{axis}" in charts
        )
        blocks.append(f'<div class="charts two over-{axis}">{figures}</div>')
    return (
        f'<section class="axes"><h2>Curves</h2><p class="choice screen-only">Over {choices}</p>{names}{"".join(blocks)}'
        '<p class="note">Lines of many steps are means of a window of steps.</p></section>'
    )


def _short_name(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:58]}.."


def _overlay(made: Comparison, overlay: Overlay, axis: str, label: str) -> Chart | None:
    most = max(24, POINTS // len(made.arms) // len(AXES))
    lines = []
    for i, arm in enumerate(made.arms, 1):
        points, intervals = _accuracy(arm) if overlay.key == "accuracy" else (_smoothed(arm, overlay.key), [])
        if axis != "step":
            points, intervals = _over(arm.run.spent()[axis], points, intervals)
        if any(y is not None for _, y in points):
            marks = overlay.key == "accuracy" and len(points) <= WHISKERS
            lines.append(
                Series(name=arm.name, points=points, intervals=intervals, colour=i, tag=arm.letter, marks=marks)
            )
    if not lines:
        return None
    return line_chart(
        lines,
        title=f"{overlay.title} over {label}",
        x_label=label,
        y_label=overlay.y_label,
        log=overlay.key == "reverse_kl" and spans([point for line in lines for point in line.points]),
        limits=(0.0, 1.0) if overlay.share else (None, None),
        y_format=percent_label if overlay.share else None,
        x_format=short_count,
        size=(480, 260),
        max_points=most,
    )


def _accuracy(arm: Arm) -> tuple[Curve, list[tuple[float, float] | None]]:
    rows = arm.run.scores(arm.task) if arm.task is not None else []
    return [(row["step"], row["mean"]) for row in rows], [(row["low"], row["high"]) for row in rows]


def _smoothed(arm: Arm, key: str) -> Curve:
    curve = arm.run.curve(key)
    means = smooth([y for _, y in curve], window_for(len(curve)))
    return [(x, y) for (x, _), y in zip(curve, means, strict=True)]


def _over(
    spent: Curve, points: Curve, intervals: Sequence[tuple[float, float] | None]
) -> tuple[Curve, list[tuple[float, float] | None]]:
    """The same points over what had been spent at their steps; a step that is not in the record is left out."""
    at = {0: 0.0, **dict(spent)}
    kept = [i for i, (step, _) in enumerate(points) if at.get(step) is not None]
    moved = [(at[points[i][0]] or 0.0, points[i][1]) for i in kept]
    return moved, [intervals[i] for i in kept] if intervals else []


def _differences(made: Comparison) -> str:
    if not made.differences:
        return "<section><h2>Configs</h2><p>No option differs.</p></section>"
    heads = "".join(f"<th>{clip(arm.name, 100)}</th>" for arm in made.arms)
    rows = "".join(
        f'<tr><td class="mono name">{option_name(name)}</td>'
        + "".join(f'<td class="mono">{clip(value, 300)}</td>' for value in values)
        + "</tr>"
        for name, values in made.differences[:200]
    )
    left = len(made.differences) - 200
    more = f'<p class="note">{count(left)} more; see the runs’ config.json.</p>' if left > 0 else ""
    return (
        '<section><h2>Where the configs differ</h2><div class="wide"><table class="options">'
        f"<tr><th>option</th>{heads}</tr>{rows}</table></div>{more}</section>"
    )
