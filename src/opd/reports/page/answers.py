"""Answers as text: those of the held-out task that changed, and some rollouts of a run without token views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.reports.figures import count, counted
from opd.reports.page.base import text
from opd.reports.run_data import RunData


@dataclass(frozen=True, kw_only=True)
class Change:
    """One answer to one problem, before training and after."""

    problem: str
    prompt: str
    before: str
    after: str
    reason: str


def option_name(name: str) -> str:
    """A dotted option that may be broken after its dots."""
    return clip(name, 200).replace(".", ".<wbr>")


def changed_answers(run: RunData, *, most: int, size: int) -> str:
    """Held-out answers that became right, and those that became wrong, between the first evaluation and the newest.

    Answers are matched by their ids, which are the same at every step. `most` of each kind, `size` bytes of each text.
    """
    if not run.tasks:
        return ""
    task = run.tasks[0]
    rows = run.scores(task)
    if len(rows) < 2 or not (rows[0].get("answers") and rows[-1].get("answers")):
        return ""
    first, last = rows[0], rows[-1]
    earlier = {answer["id"]: answer for answer in first["answers"]}
    pairs = [(earlier[answer["id"]], answer) for answer in last["answers"] if answer["id"] in earlier]
    pairs = [(a, b) for a, b in pairs if a.get("score") is not None and b.get("score") is not None]
    better = [_change(a, b) for a, b in pairs if a["score"] < 0.5 <= b["score"]]
    worse = [_change(a, b) for a, b in pairs if b["score"] < 0.5 <= a["score"]]
    unchanged = len(pairs) - len(better) - len(worse)
    parts = [
        "<section><h2>Held-out answers that changed</h2>",
        f'<p class="lead">From step {first["step"]:,} to step {last["step"]:,}: '
        f"{counted(len(better), 'answer')} became right, {count(len(worse))} became wrong, {count(unchanged)} stayed "
        f"what they were.</p>",
        '<p class="note">The same problems under the same random numbers, so a difference is the student’s. '
        "A learning student fixes many and breaks few.</p>",
        f'<div class="pair">{_changes("Wrong, then right", better, most, size)}',
        f"{_changes('Right, then wrong', worse, most, size)}</div>",
        "</section>",
    ]
    return "\n".join(parts)


def sample_answers(rows: Sequence[Mapping[str, Any]], *, most: int, size: int) -> str:
    """Rollouts of the first and the last step as they were written."""
    if not rows:
        return ""
    parts = [
        "<section><h2>Sample answers</h2>",
        '<p class="note">What was written in training, at the first step and at the last one whose rollouts are '
        "there. This run kept no token views (views.answers).</p>",
    ]
    for step in dict.fromkeys(row["step"] for row in rows):
        parts.append(f'<h3>Step {step:,}</h3><div class="pair">')
        for row in [row for row in rows if row["step"] == step][:most]:
            end = "" if row.get("finish_reason") == "stop" else ' <span class="cut">cut off at the limit</span>'
            parts.append(
                f'<div class="raised answer"><p class="note">{clip(row.get("id", ""), 300)}{_made(row)}{end}</p>'
                f'<pre class="prompt">{clip(row.get("prompt", ""), size)}</pre>'
                f"<pre>{clip(row.get('response', ''), size)}</pre></div>"
            )
        parts.append("</div>")
    return "\n".join([*parts, "</section>"])


def _made(row: Mapping[str, Any]) -> str:
    """Who wrote an answer, where it was not the student, and how it was graded."""
    writer, reward = row.get("behaviour", "student"), row.get("reward")
    words = [] if writer == "student" else [f"written by: {str(writer).replace('_', ' ')}"]
    words += [] if reward is None else [f"reward {reward:.2g}"]
    return "".join(f", {clip(word, 100)}" for word in words)


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    return Change(
        problem=str(after.get("problem", "")),
        prompt=str(after.get("prompt", "")),
        before=str(before.get("answer", "")),
        after=str(after.get("answer", "")),
        reason=str(after.get("reason") or ""),
    )


def _changes(title: str, changes: Sequence[Change], most: int, size: int) -> str:
    if not changes:
        return f'<p class="note">{text(title)}: none.</p>'
    rows = "".join(
        f'<tr><td><p class="mono">{clip(change.problem, 200)}</p>'
        f'<pre class="prompt">{clip(change.prompt, size // 2)}</pre></td>'
        f"<td><pre>{clip(change.before, size)}</pre></td>"
        f"<td><pre>{clip(change.after, size)}</pre>"
        + (f'<p class="note">{clip(change.reason, 300)}</p>' if change.reason else "")
        + "</td></tr>"
        for change in changes[:most]
    )
    left = f", the first {count(most)}" if len(changes) > most else ""
    return (
        f"<details open><summary>{text(title)}: {count(len(changes))}{left}</summary>"
        f'<div class="wide"><table class="answers"><tr><th>problem</th><th>before</th><th>after</th></tr>{rows}</table>'
        f"</div></details>"
    )


def clip(value: object, size: int) -> str:
    """Foreign text as the content of an element, of at most about `size` bytes; says what was cut."""
    whole = str(value)
    kept = whole[:size]
    while len((shown := text(kept, lines=True)).encode()) > size and kept:  # an escape is up to ten characters
        kept = kept[: len(kept) * 3 // 4]
    if len(kept) == len(whole):
        return shown
    return f'{shown} <span class="cut">… {count(len(whole) - len(kept))} more characters</span>'
