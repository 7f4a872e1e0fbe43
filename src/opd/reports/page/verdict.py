"""The top of a report: whether it worked, how the run ended, and what to look at first."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from opd.journal.records import gap_closed
from opd.reports.crossed import joined
from opd.reports.figures import closed, counted, percent
from opd.reports.page.answers import clip
from opd.reports.page.base import text
from opd.reports.paired import paired
from opd.reports.run_data import RunData

# What a person calls an event, where its kind alone does not say it.
EVENTS = {
    "start": "started",
    "resume": "resumed",
    "changed": "changed on resume",
    "checkpoint_skipped": "checkpoint passed over",
    "bad_step": "step skipped",
    "scorer": "teacher",
    "view": "token view",
    "stop": "ended early",
}


def head(run: RunData) -> str:
    """Heading, verdict, and warnings if there are any."""
    parts = [
        f"<h1>{clip(run.name, 300)}</h1>",
        f'<p class="lead">{_verdict(run)}</p>',
    ]
    if run.status != "done":
        parts.append(f'<p class="warning">{clip(_ending(run), 2000)}</p>')
    parts += [f'<p class="warning">{clip(problem, 500)}</p>' for problem in run.problems[:5]]
    warned = _warnings(run)
    if warned:
        items = "".join(f"<li>{clip(item, 600)}</li>" for item in warned)
        parts.append(f'<div class="warning"><b>Look at this first</b><ul>{items}</ul></div>')
    return "\n".join(parts)


def gap(run: RunData, task: str) -> tuple[float | None, str]:
    """How much of the gap to the teacher is closed, as in summary.json, from the evaluations so far; and in words."""
    rows = [run.score(task, when) for when in ("before", "after", "teacher")]
    before, after, teacher = (None if row is None else row["mean"] for row in rows)
    share = gap_closed(before, after, teacher)
    return share, closed(share, before, after)


def _verdict(run: RunData) -> str:
    """Whether it worked, in words a newcomer understands."""
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
    said += f"<b>{percent(after['mean'])}</b> after {counted(after['step'], 'step', ',')}"
    both = paired(before, after)
    if both is not None:
        better = "clearly better" if both.change > 0 else "clearly worse"
        said += f": {better if both.is_clear(run.confidence) else 'no difference shown'}."
        said += f" It is {text(both.words(run.confidence))}"
    elif after["low"] > before["high"]:
        said += ": clearly better"
    elif after["high"] < before["low"]:
        said += ": clearly worse"
    else:
        said += ". The intervals overlap, so no difference is shown"
    if teacher is not None:
        said += f". Its teacher gets {percent(teacher['mean'])}"
        share, words = gap(run, task)
        if share is not None:
            said += f"; the student {words}" if share < 0 else f"; {words} of the gap is closed"
    return f"{said}."


def _ending(run: RunData) -> str:
    """Why the run is not done, and what to do about it. Foreign text: why it stopped may hold anything."""
    planned = run.option("run.steps")
    total = f"{planned:,} steps" if isinstance(planned, int) else None
    so_far = f"{run.steps:,} of {total}" if total else counted(run.steps, "step", ",")
    again = f"opd resume {shlex.quote(str(run.folder))}"
    if run.config is None:
        again = "start it again with opd train, since its config was not written"
    if run.result is None:
        if_killed = f"To go on with a killed one: {again}"
        return {
            "at work": f"This run is going on: {so_far} so far. opd report writes this page again.",
            "dead": f"This run was killed after {so_far}: its process has ended. To go on: {again}",
            "gone": f"This run ended after {so_far} without a result. To go on: {again}",
            "elsewhere": f"This run goes on on another machine, or it was killed there, after {so_far}. {if_killed}",
            "unknown": f"This run goes on, or it was killed, after {so_far}. {if_killed}",
        }[run.writer]
    status, why = run.status.capitalize(), str(run.result.get("stopped_by") or "")
    if not why:
        return f"{status} after {so_far}. To go on: {again}"
    told = "" if f"{run.steps} of {planned} steps" in why else f" ({so_far} are in the record)"
    told += "" if "opd resume" in why else f". To go on: {again}"
    return f"{status}: {why}{told}"


def _warnings(run: RunData) -> list[str]:
    made = [*_teacher(run), *(one.warning for one in joined(run) if one.warning is not None)]
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
    changed = [event for event in run.events if event.get("kind") == "changed"]
    made += [f"resumed at step {event.get('step')}: {event.get('message', '')}" for event in changed]
    return made if len(made) <= 6 else [*made[:5], f"and {len(made) - 5} more, see Events"]


def _teacher(run: RunData) -> list[str]:
    """Tasks on which the untrained student does better than the one it is to learn from."""
    made = []
    for task in run.tasks:
        before, teacher = run.score(task, "before"), run.score(task, "teacher")
        if before is None or teacher is None or teacher["mean"] >= before["mean"]:
            continue
        said = (
            f"The teacher gets {percent(teacher['mean'])} of {task} right, less than the student before training "
            f"({percent(before['mean'])}): it may have nothing to teach. "
        )
        if (both := paired(teacher, before)) is not None:
            said += f"The student is {both.words(run.confidence)}. "
        bits = run.option("teacher.quantisation")
        if bits not in (None, "none"):
            said += f"It was loaded with teacher.quantisation={bits}, which may be the reason: try none."
        else:
            said += "Look at its answers: a wrong teacher.format, or a limit that cuts them off, looks like this."
        made.append(said)
    return made


def _few(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:6])) + (", ..." if len(steps) > 6 else "")
