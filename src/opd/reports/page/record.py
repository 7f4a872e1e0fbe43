"""What a run was and what it took, to the last digit: time and operations, its config, every metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from opd.reports.figures import count, duration, number
from opd.reports.options import as_text, changed
from opd.reports.page.answers import clip, option_name
from opd.reports.page.charts import stacked_bar, swatch
from opd.reports.run_data import RunData, parts

PHASES = {  # what a person calls it, and its colour in every bar
    "rollout": ("student writes answers", 1),
    "scoring": ("teacher scores them", 2),
    "update": ("student is trained", 3),
    "eval": ("held-out tasks", 4),
    "load": ("models and data are loaded", 5),
    "prepare": ("models and data are loaded", 5),
    "other": ("saving, and everything else", 6),
    "student_prefill": ("student reads prompts", 4),
    "student_sampling": ("student writes answers", 1),
    "teacher_scoring": ("teacher scores them", 2),
    "student_looking": ("student is trained", 3),
    "student_training": ("student is trained", 3),
    "grading": ("answers are graded", 5),
}


def _phase(name: str) -> tuple[str, int]:
    """The words and colour of a part; those of any scorer but the teacher are named after it."""
    if name in PHASES:
        return PHASES[name]
    who, _, what = name.rpartition("_")
    words = {"scoring": f"{who} scores answers", "sampling": f"{who} writes answers", "prefill": f"{who} reads prompts"}
    return (words[what], 2) if who and what in words else PHASES["other"]


def costs(run: RunData) -> str:
    """Two bars: the seconds of the command and the operations of training, by what they were spent on."""
    last = run.metrics[-1] if run.metrics else {}
    seconds = dict((run.result or {}).get("seconds_by_phase") or {})
    if seconds and run.result is not None:
        seconds["other"] = max(0.0, run.result["seconds"] - sum(seconds.values()))
    bars = [
        _bar("Time", seconds or parts(last, "seconds_"), duration, "Seconds of the whole command by what went on."),
        _bar(
            "Operations", parts(last, "flops_"), count, "FLOPs of training by who worked. Evaluations are not counted."
        ),
    ]
    if not any(bars):
        return ""
    return f'<section><h2>Where time and FLOPs went</h2><div class="pair">{"".join(bars)}</div></section>'


def _bar(title: str, amounts: Mapping[str, float], shown: Callable[[float], str], caption: str) -> str:
    total = sum(amounts.values())
    if total <= 0:
        return ""
    sums: dict[tuple[str, int], float] = {}
    for name, amount in amounts.items():
        key = _phase(name)
        sums[key] = sums.get(key, 0.0) + amount
    rows = [(name, amount, colour) for (name, colour), amount in sorted(sums.items(), key=lambda row: -row[1])]
    table = "".join(
        f'<tr><td>{swatch(colour)}{clip(name, 100)}</td><td class="number">{shown(amount)}</td>'
        f'<td class="number">{100 * amount / total:.0f} %</td></tr>'
        for name, amount, colour in rows[:12]
    )
    bar = stacked_bar(rows, title=title)
    return f'<div><h3>{title}: {shown(total)}</h3><p class="note">{caption}</p>{bar}<table>{table}</table></div>'


def config(run: RunData, room: float) -> str:
    """What is not at its default, every option, the environment, and how to take the run again."""
    parts = ["<section><h2>Config</h2>"]
    if run.config is None:
        return "\n".join([*parts, "<p>config.json is not there.</p></section>"])
    most = max(20, round(120 * room))
    options = list(changed(run.config).items())
    rows = "".join(
        f'<tr><td class="mono name">{option_name(name)}</td><td class="mono">{clip(as_text(value), 300)}</td></tr>'
        for name, value in options[:most]
    )
    left = f" The first {most} of {count(len(options))}." if len(options) > most else ""
    whole = json.dumps(run.config, indent=2, ensure_ascii=False)
    environment = run.environment or {}
    about = "".join(
        f"<dt>{clip(name, 100)}</dt><dd>{clip(as_text(value), 300)}</dd>"
        for name, value in list(environment.items())[:40]
        if name != "schema_version"
    )
    parts += [
        f'<p class="note">What differs from the defaults.{left}</p><div class="wide"><table>{rows}</table></div>',
        f"<details><summary>Every option</summary><pre>{clip(whole, round(40_000 * room))}</pre></details>",
        f"<details><summary>Environment</summary><dl class='facts'>{about}</dl></details>" if about else "",
        "<h3>Do it again</h3><p>From the run folder, which holds the whole config; the same versions on the same CPU "
        "give the same run:</p>",
        "<pre>opd train config.json run.folder=runs/again</pre></section>",
    ]
    return "\n".join(part for part in parts if part)


def every_metric(run: RunData, room: float) -> str:
    """First, last, lowest and highest value of every metric, folded."""
    names = run.metric_names
    if not names:
        return ""
    most = max(20, round(100 * room))
    rows = []
    for name in names[:most]:
        values = [y for _, y in run.curve(name) if y is not None]
        if values:
            cells = "".join(
                f'<td class="number">{number(v)}</td>' for v in (values[0], values[-1], min(values), max(values))
            )
            rows.append(f'<tr><td class="mono">{clip(name, 100)}</td>{cells}</tr>')
    left = f'<p class="note">{most} of {len(names)}; metrics.jsonl has all.</p>' if len(names) > most else ""
    heads = "".join(f'<th class="number">{head}</th>' for head in ("first", "last", "lowest", "highest"))
    return (
        "<section><details><summary>Every metric</summary>"
        f'<div class="wide"><table><tr><th>metric</th>{heads}</tr>{"".join(rows)}</table></div>{left}'
        "</details></section>"
    )
