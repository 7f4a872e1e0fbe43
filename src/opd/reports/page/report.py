"""`report.html`: one run as one page, in the order in which a person asks. A view of the run folder, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.objective import FORMULAS
from opd.errors import BadInput
from opd.journal.atomic import write_atomic
from opd.journal.records import gap_closed
from opd.reports.figures import count, counted, duration, interval, percent
from opd.reports.model_card import public_name
from opd.reports.page.answers import changed_answers, clip, sample_answers
from opd.reports.page.base import asset, page, text
from opd.reports.page.charts import score_chart, swatch
from opd.reports.page.curves import Figure, figures
from opd.reports.page.record import config, costs, every_metric
from opd.reports.page.tokens import token_view
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
    assets = sum(len(asset(name).encode()) for name in ("tokens.css", "tokens.js"))
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
    body = [_head(run), _scores(run), _curves(pictures, room), _events(run, room), costs(run)]
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


def _head(run: RunData) -> str:
    parts = [
        f"<h1>{clip(run.name, 300)}</h1>",
        f'<p class="lead">{_verdict(run)}</p>',
    ]
    if run.status != "done":
        parts.append(f'<p class="warning">{text(_status(run))}</p>')
    parts += [f'<p class="warning">{clip(problem, 500)}</p>' for problem in run.problems[:5]]
    warned = _warnings(run)
    if warned:
        items = "".join(f"<li>{clip(item, 300)}</li>" for item in warned)
        parts.append(f'<div class="warning"><b>Look at this first</b><ul>{items}</ul></div>')
    return "\n".join(parts)


def _verdict(run: RunData) -> str:
    """Whether it worked, in one sentence a newcomer understands."""
    task = run.tasks[0] if run.tasks else None
    if task is None:
        return "No held-out task was taken, so nothing says whether the student got better: add evals.tasks."
    before, after, teacher = (run.score(task, when) for when in ("before", "after", "teacher"))
    name = f"<b>{clip(task, 200)}</b>"
    if before is None and after is None:
        return f"No answer to {name} has been graded yet."
    if before is None or after is None:
        only = before or after
        assert only is not None
        when = "before training" if before is not None else f"at step {only['step']:,}"
        return (
            f"The student gets <b>{percent(only['mean'])}</b> of {name} right {when}; there is no second measurement."
        )
    said = f"The student got <b>{percent(before['mean'])}</b> of {name} right before, and "
    said += f"<b>{percent(after['mean'])}</b> after {_steps(after['step'])}"
    if after["low"] > before["high"]:
        said += ": clearly better"
    elif after["high"] < before["low"]:
        said += ": clearly worse"
    else:
        said += ". The intervals overlap, so no difference is shown"
    closed = _gap(run, task)
    if teacher is not None:
        said += f". Its teacher gets {percent(teacher['mean'])}"
        if closed is not None:
            grew = f"; the gap between them grew by {-100 * closed:.0f} %"
            said += grew if closed < 0 else f"; {100 * closed:.0f} % of the gap is closed"
    return f"{said}."


def _gap(run: RunData, task: str) -> float | None:
    """As in summary.json, from the evaluations so far."""
    rows = [run.score(task, when) for when in ("before", "after", "teacher")]
    return gap_closed(*(None if row is None else row["mean"] for row in rows))


def _status(run: RunData) -> str:
    planned = run.option("run.steps")
    so_far = f"{run.steps:,} of {planned:,} steps" if isinstance(planned, int) else _steps(run.steps)
    if run.status == "not finished":
        return f"This run has not come to its end: it goes on, or it was killed. The page shows {so_far}."
    why = f" by {run.summary['stopped_by']}" if run.summary and run.summary.get("stopped_by") else ""
    return f"This run was {run.status}{why} after {so_far}."


def _warnings(run: RunData) -> list[str]:
    made = []
    if skipped := [row["step"] for row in run.metrics if row.get("applied") is False]:
        made.append(
            f"{counted(len(skipped), 'step')} changed nothing, because loss or gradient was not finite: {_few(skipped)}"
        )
    if invalid := [row["step"] for row in run.metrics if (row.get("invalid_scores") or 0) > 0]:
        made.append(
            f"{counted(len(invalid), 'step')} had tokens without a finite score, which were masked: {_few(invalid)}"
        )
    guards: dict[str, list[Mapping[str, Any]]] = {}
    for event in run.events:
        if event.get("kind") == "guard":
            guards.setdefault(str(event.get("guard", "")), []).append(event)
    for found in guards.values():
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        made.append(f"step {found[0].get('step')}: {found[0].get('message', '')}{more}")
    return made if len(made) <= 6 else [*made[:5], f"and {len(made) - 5} more, see Events"]


def _steps(number: int) -> str:
    return f"{number:,} step" + ("" if number == 1 else "s")


def _few(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")


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
        f"accuracy may lie, given that only so many problems were asked.</p></div>"
    )


def _facts(run: RunData) -> str:
    """What it is, and what it cost."""
    summary = run.summary or {}
    spent = {key: curve[-1][1] if curve else 0.0 for key, curve in run.spent().items()}
    task = run.tasks[0] if run.tasks else ""
    closed = _gap(run, task)
    facts = [("status", run.status), ("steps", f"{run.steps:,}")]
    if closed is not None:
        facts.insert(0, ("gap closed", f"{100 * closed:.0f} % of the way from the student to its teacher"))
    seconds = summary.get("seconds") if run.status != "not finished" else None
    facts += [
        ("trained tokens", count(spent["tokens"])),
        ("operations", f"{count(spent['flops'])} FLOPs, evaluations not counted"),
        ("time", duration(seconds) if seconds is not None else f"{duration(spent['seconds'])} in steps"),
        ("objective", _objective(run)),
        ("student", public_name(str(run.option("student.model") or "-"))),
        ("teacher", public_name(str(run.option("teacher.model") or "none"))),
    ]
    if summary.get("resumes"):
        facts.insert(2, ("resumed", f"{summary['resumes']} times"))
    return f'<dl class="facts">{"".join(f"<dt>{text(k)}</dt><dd>{clip(v, 400)}</dd>" for k, v in facts)}</dl>'


def _objective(run: RunData) -> str:
    terms = run.option("objective.terms") or []
    formulas = [
        "cross-entropy on the data"
        if term.get("target") == "data"
        else f"{FORMULAS.get(term['shape']['kind'], term['shape']['kind'])}"
        + (" at the drawn tokens" if term.get("support") == "sampled" else " over the whole vocabulary")
        for term in terms
    ]
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


def _events(run: RunData, room: float) -> str:
    events = [event for event in run.events if event.get("kind") != "start"]
    if not events:
        return "<section><h2>Events</h2><p>None: no guard fired, nothing was resumed.</p></section>"
    most = max(5, round(100 * room))
    rows = "".join(
        f'<tr><td class="number">{clip(event.get("step"), 40)}</td>'
        f"<td>{clip(str(event.get('kind')).replace('_', ' '), 60)}</td>"
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
