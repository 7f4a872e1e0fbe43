"""`report.html`: one run as one page, in the order in which a person asks. A view of the run folder, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.errors import BadInput
from opd.journal.atomic import write_atomic
from opd.reports.figures import count, counted, duration, interval, often, percent
from opd.reports.model_card import public_name
from opd.reports.objective import formula, scorer_model, scorers
from opd.reports.page.answers import changed_answers, clip, sample_answers
from opd.reports.page.base import asset, page, text
from opd.reports.page.charts import score_chart, swatch
from opd.reports.page.curves import Figure, figures
from opd.reports.page.record import config, costs, every_metric
from opd.reports.page.tokens import ASSETS, token_view
from opd.reports.page.verdict import EVENTS, gap, head
from opd.reports.paired import paired
from opd.reports.run_data import RunData, read_run

LIMIT = 500_000  # bytes of the page, whatever the run
RESERVE = 8_000  # bytes that nobody counts: hashes, ids, tags
VIEW_LEAST = 60_000  # bytes of a token view below which rather the rest is cut
ROOM = (1.0, 0.6, 0.35, 0.2, 0.1, 0.04)  # shares of what is shown of a run, tried until the page is small enough
ARMS = (("student before", "before", 3), ("student after", "after", 1), ("teacher", "teacher", 2))


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder and returns its path; also while the run goes on.

    Raises DataError when the folder is no run, and BadInput when the page cannot be written there.
    """
    run = read_run(folder)
    path = run.folder / "report.html"
    made = report(run).encode()
    try:
        write_atomic(path, made)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    return path


def report(run: RunData) -> str:
    """The page, self-contained and below `LIMIT` bytes: less is shown of a run that would not fit, and it says so."""
    made = ""
    assets = sum(len(asset(name).encode()) for name in ASSETS)
    for room in ROOM:
        made = _page(run, room, None)
        left = LIMIT - len(made.encode()) - assets - RESERVE
        if run.views and (left >= VIEW_LEAST or room == ROOM[-1]):
            made = _page(run, room, max(left, 0))
        elif run.views:
            continue
        if len(made.encode()) <= LIMIT:
            break
    return made


def _page(run: RunData, room: float, view_bytes: int | None) -> str:
    """The page with this share of everything; `view_bytes` for the token view, None: without it."""
    pictures = figures(run, max_points=max(30, round(240 * room)))
    css, js, data = [asset("report.css")], [asset("charts.js")], {"chart-numbers": {f.key: f.hover() for f in pictures}}
    size = round(1500 * room)
    body = [head(run), _scores(run), _curves(pictures, room), _events(run, room), costs(run)]
    if view_bytes is not None:
        view = token_view(run.views, budget_bytes=view_bytes)
        body.append(view.body)
        css, js, data = [*css, view.css], [*js, view.js], {**data, **view.data}
    elif not run.views:
        body.append(sample_answers(run.samples, most=4, size=size))
    body.append(changed_answers(run, most=max(2, round(12 * room)), size=min(size, 600)))
    body += [config(run, room), every_metric(run, room)]
    title = f"{run.name[:200]}: report of a run"
    return page(title, "\n".join(part for part in body if part), css=css, js=js, data=data)


# ---- did it work --------------------------------------------------------------------------------------------------


def _scores(run: RunData) -> str:
    parts = ["<section><h2>Did it work</h2>", '<div class="pair">']
    parts += [_task(run, task) for task in run.tasks[:4]]
    parts += [_facts(run), "</div></section>"]
    return "\n".join(parts)


def _task(run: RunData, task: str) -> str:
    rows = []
    for name, when, colour in ARMS:
        score = run.score(task, when)
        if score is None:
            continue
        rows.append((f"{name} (step {score['step']:,})" if when == "after" else name, score, colour))
    if not rows:
        return f"<div><p>No answer to {clip(task, 200)} was graded.</p></div>"
    table = "".join(
        f'<tr><td>{swatch(colour)}{text(name)}</td><td class="number">{percent(score["mean"])}</td>'
        f'<td class="number">{interval(score)}</td></tr>'
        for name, score, colour in rows
    )
    first = rows[0][1]
    taken = f"{counted(first.get('n', 0), 'problem')}, {counted(first.get('k', 1), 'answer')} each"
    heading = f"<h3>{clip(task, 200)}</h3>" if len(run.tasks) > 1 else ""
    return (
        f'<div>{heading}<div class="scores">{score_chart(rows, title=f"Scores on {task} with intervals")}</div>'
        f'<table><tr><th></th><th class="number">accuracy</th><th class="number">interval</th></tr>{table}</table>'
        f'<p class="note">{clip(task, 200)}: {text(taken)}. Interval ({clip(first.get("ci_method"), 100)}): where the '
        f"accuracy may lie, given that only so many problems were asked.{_about_pairs(run, task)}</p></div>"
    )


def _about_pairs(run: RunData, task: str) -> str:
    """What better, worse and p are, where the page says them."""
    both = paired(run.score(task, "before"), run.score(task, "after"))
    if both is None:
        return ""
    after = "" if run.tasks[0] == task else f" From before to after: {both.words(run.confidence)}."
    return (
        f"{text(after)} Better and worse: by the mean of a problem’s answers. p: how often a coin, thrown for every "
        "problem that changed, would come out at least as uneven (exact sign test); below "
        f"{1 - run.confidence:.2g} it is not called chance."
    )


def _facts(run: RunData) -> str:
    """What it is, and what it cost."""
    summary = run.result or {}
    spent = {key: curve[-1][1] if curve else 0.0 for key, curve in run.spent().items()}
    task = run.tasks[0] if run.tasks else ""
    share, said = gap(run, task)
    facts = [("status", run.status), ("steps", f"{run.steps:,}")]
    if share is not None:
        way = f"none, the student {said}" if share < 0 else f"{said} of the way from the student to its teacher"
        facts.insert(0, ("gap closed", way))
    seconds = summary.get("seconds")
    facts += [
        ("trained tokens", count(spent["tokens"])),
        ("operations", f"{count(spent['flops'])} FLOPs, evaluations not counted"),
        ("time", duration(seconds) if seconds is not None else f"{duration(spent['seconds'])} in steps"),
        ("objective", _objective(run)),
        ("student", public_name(str(run.option("student.model") or "-"))),
        *(scorers_of(run) or [("teacher", "none")]),
    ]
    if summary.get("resumes"):
        facts.insert(2, ("resumed", often(summary["resumes"])))
    return f'<dl class="facts">{"".join(f"<dt>{text(k)}</dt><dd>{clip(v, 400)}</dd>" for k, v in facts)}</dl>'


def scorers_of(run: RunData) -> list[tuple[str, str]]:
    """Name and model of every scorer."""
    config = {name: run.option(name) for name in ("teacher", "scorers")}
    return [(name, public_name(scorer_model(scorer))) for name, scorer in scorers(config).items()]


def _objective(run: RunData) -> str:
    terms = run.option("objective.terms") or []
    formulas = [formula(term) for term in terms]
    preset = run.option("objective.preset")
    return ": ".join(part for part in (preset, " + ".join(formulas)) if part) or "-"


# ---- what happened ------------------------------------------------------------------------------------------------


def _curves(pictures: Sequence[Figure], room: float) -> str:
    if not pictures:
        return "<section><h2>What happened</h2><p>No step has been taken yet.</p></section>"
    note = "" if room == 1 else " Curves are drawn with fewer points to keep the page small."
    return (
        f'<section><h2>What happened</h2><p class="note">Point at a chart, or touch it, to read its numbers.{note}</p>'
        f'<div class="charts">{"".join(figure.html() for figure in pictures)}</div></section>'
    )


def _what(event: Mapping[str, Any]) -> str:
    kind = str(event.get("kind"))
    return EVENTS.get(kind, kind.replace("_", " "))


def _events(run: RunData, room: float) -> str:
    events = [event for event in run.events if event.get("kind") != "start"]
    if not events:
        return "<section><h2>Events</h2><p>None: no guard fired, nothing was resumed.</p></section>"
    most = max(5, round(100 * room))
    rows = "".join(
        f'<tr><td class="number">{clip(event.get("step"), 40)}</td>'
        f"<td>{clip(_what(event), 60)}</td>"
        f"<td>{clip(event.get('message', ''), 500)}</td></tr>"
        for event in events[-most:]
    )
    left = (
        f'<p class="note">The newest {most} of {count(len(events))}; events.jsonl has all.</p>'
        if len(events) > most
        else ""
    )
    return (
        '<section><h2>Events</h2><div class="wide"><table><tr><th class="number">step</th><th>what</th><th></th></tr>'
        f"{rows}</table></div>{left}</section>"
    )
