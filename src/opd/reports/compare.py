"""Several runs side by side: which is better, at what cost, and why their configs differ. Numbers, and the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.errors import BadInput
from opd.journal.records import gap_closed
from opd.reports.figures import count, duration, interval, percent
from opd.reports.options import MISSING, differences
from opd.reports.progress import say
from opd.reports.run_data import RunData, read_run
from opd.reports.table import draw, strip

MOST = 12  # runs that one picture can hold
NAME = 18  # characters of a name on the terminal
VALUE = 22  # and of an option's value


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of a comparison.

    letter        how tables and charts call it: A, B, ...
    before        the student's score before training; `after` its newest one; `teacher`. None where not measured.
    gap_closed    as in summary.json.
    tokens        trained on; `flops` of training without evaluations; `seconds` of rollout, scoring, update and sync.
    reached       what it had spent when an evaluation first reached the level of the comparison: `step`, `tokens`,
                  `flops`, `seconds`; None when there is no such level.
    """

    letter: str
    run: RunData
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    teacher: Mapping[str, Any] | None
    gap_closed: float | None
    tokens: float
    flops: float
    seconds: float
    reached: Mapping[str, float] | None

    @property
    def name(self) -> str:
        return f"{self.letter} {self.run.name}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What several runs say together.

    task         the held-out task that is compared; None when they share none.
    level        the best score that every run reached: what it cost each is compared; None without one.
    best         letters of the runs with the highest score, and of those whose intervals overlap with it.
    cheapest     letter of the run that reached the level with the fewest FLOPs.
    verdict      which is better, in a sentence.
    per_cost     which is cheaper, in a sentence; None when nothing can be said.
    caveats      why the runs might not be comparable.
    differences  (dotted option, its value in each run).
    """

    arms: Sequence[Arm]
    task: str | None
    level: float | None
    best: Sequence[str]
    cheapest: str | None
    verdict: str
    per_cost: str | None
    caveats: Sequence[str]
    differences: Sequence[tuple[str, Sequence[str]]]


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """The runs of a comparison. Raises BadInput for fewer than two, too many, or one named twice; DataError for a
    folder that is no run."""
    if len(folders) < 2:
        raise BadInput(f"compare needs two runs or more, and got {len(folders)}: opd compare RUN RUN ...")
    if len(folders) > MOST:
        raise BadInput(f"compare takes up to {MOST} runs, and got {len(folders)}; leave some out")
    places = [Path(folder).expanduser().resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise BadInput(f"{place} is named twice; a run compared with itself says nothing")
    return [read_run(folder) for folder in folders]


def compare(runs: Sequence[RunData]) -> Comparison:
    """Puts runs side by side. Nothing is measured again."""
    shared = [task for task in runs[0].tasks if all(task in run.tasks for run in runs)]
    task = shared[0] if shared else None
    level = _level(runs, task)
    arms = [_arm(chr(ord("A") + i), run, task, level) for i, run in enumerate(runs)]
    best, verdict = _best(arms, task)
    reached = [arm for arm in arms if arm.reached is not None]
    cheapest, per_cost = None, None
    if level is not None and len(reached) > 1:
        order = sorted(reached, key=lambda arm: arm.reached["flops"] if arm.reached else 0.0)
        cheapest, per_cost = order[0].letter, _per_cost(order, level)
    return Comparison(
        arms=arms,
        task=task,
        level=level,
        best=best,
        cheapest=cheapest,
        verdict=verdict,
        per_cost=per_cost,
        caveats=_caveats(arms, task),
        differences=differences([run.config for run in runs]),
    )


def show_comparison(made: Comparison, console: Console | None = None) -> None:
    """Prints scores, costs, the verdict, caveats and differences of the configs; 80 columns."""
    console = console or Console()
    scored = [score for arm in made.arms for score in (arm.after,) if score is not None]
    low, high = min((s["low"] for s in scored), default=0.0), max((s["high"] for s in scored), default=1.0)
    start, end = int(10 * low) / 10, min(1.0, int(10 * high + 1) / 10)
    rows = []
    for arm in made.arms:
        if arm.after is None:
            rows.append((_short(arm.name, NAME), "-", "-", "-", ""))
            continue
        mark = "*" if arm.letter in made.best else " "
        closed = "-" if arm.gap_closed is None else f"{100 * arm.gap_closed:.0f} %"
        cells = (f"{percent(arm.after['mean'])}{mark}", interval(arm.after), closed)
        rows.append((_short(arm.name, NAME), *cells, strip(arm.after, start, end)))
    header = ("", "accuracy ", "interval", "gap closed", f"{100 * start:.0f} % to {100 * end:.0f} %")
    notes = ["* highest, and what cannot be told from it"] if len(made.best) > 1 else []
    draw(console, f"{made.task or 'no shared task'}: scores after training", header, rows, notes)
    say(console, "")
    to_level = "" if made.level is None else f"FLOPs to {percent(made.level)}"
    costs = []
    for arm in made.arms:
        mark = "*" if arm.letter == made.cheapest else " "
        own = (f"{arm.run.steps:,}", count(arm.tokens), count(arm.flops), duration(arm.seconds))
        reached = "-" if arm.reached is None else f"{count(arm.reached['flops'])}{mark}"
        costs.append((_short(arm.name, NAME), *own, *([reached] if to_level else [])))
    draw(console, "", ("", "steps", "tokens", "FLOPs", "time", *([f"{to_level} "] if to_level else [])), costs, [])
    say(console, "")
    say(console, made.verdict, "bold")
    if made.per_cost:
        say(console, made.per_cost)
    for caveat in made.caveats:
        say(console, f"note: {caveat}", "yellow")
    if made.differences:
        say(console, "")
        cells = [(name, *(_short(value, VALUE) for value in values)) for name, values in made.differences]
        draw(console, "configs differ in", ("", *(arm.letter for arm in made.arms)), cells, [])
    elif all(arm.run.config for arm in made.arms):
        say(console, "The configs are the same.")


# ---- what is compared ---------------------------------------------------------------------------------------------


def _arm(letter: str, run: RunData, task: str | None, level: float | None) -> Arm:
    before, after, teacher = (None if task is None else run.score(task, w) for w in ("before", "after", "teacher"))
    spent = run.spent()
    reached = None
    if task is not None and level is not None:
        rows = [row for row in run.scores(task) if row["step"] > 0 and row["mean"] >= level]
        if rows:
            step = rows[0]["step"]
            at = {key: dict(curve).get(step) for key, curve in spent.items()}
            reached = {"step": step, **at} if all(value is not None for value in at.values()) else None
    return Arm(
        letter=letter,
        run=run,
        before=before,
        after=after,
        teacher=teacher,
        gap_closed=gap_closed(*(None if row is None else row["mean"] for row in (before, after, teacher))),
        tokens=_last(spent["tokens"]),
        flops=_last(spent["flops"]),
        seconds=_last(spent["seconds"]),
        reached=reached,
    )


def _level(runs: Sequence[RunData], task: str | None) -> float | None:
    """The lowest of the runs' best scores, when it lies above where they all started."""
    if task is None:
        return None
    scores = [[row["mean"] for row in run.scores(task) if row["step"] > 0] for run in runs]
    starts = [row["mean"] for run in runs if (row := run.score(task, "before")) is not None]
    if not all(scores):
        return None
    level = min(max(row) for row in scores)
    return level if all(level > start for start in starts) else None


def _best(arms: Sequence[Arm], task: str | None) -> tuple[list[str], str]:
    scored = sorted((arm for arm in arms if arm.after is not None), key=lambda a: -_mean(a))
    if task is None:
        return [], "The runs share no held-out task, so nothing says which is better."
    if len(scored) < 2:
        return [], f"Fewer than two runs have a score on {task} after training, so nothing says which is better."
    top = scored[0]
    assert top.after is not None
    equal = [arm for arm in scored[1:] if arm.after is not None and arm.after["high"] >= top.after["low"]]
    said = f"{top.name}: {percent(_mean(top))} {interval(top.after)}"
    if not equal:
        return [top.letter], f"Best is {said}; its interval lies above every other."
    names = ", ".join(arm.name for arm in equal)
    others = "" if len(equal) == len(scored) - 1 else " The others are clearly lower."
    return (
        [top.letter, *(arm.letter for arm in equal)],
        f"Highest is {said}, but the intervals overlap with {names}: no difference shown.{others}",
    )


def _per_cost(order: Sequence[Arm], level: float) -> str:
    first, last = order[0], order[-1]
    assert first.reached is not None and last.reached is not None
    said = f"To reach {percent(level)} on the way, {first.name} took {count(first.reached['flops'])} FLOPs"
    said += f" and {count(first.reached['tokens'])} trained tokens"
    if first.reached["flops"] > 0:
        ratio = last.reached["flops"] / first.reached["flops"]
        said += f"; {last.name} took {ratio:.2g} times the FLOPs" if ratio >= 1.05 else "; the others took as many"
    return said + ". That is the first evaluation at or above it: more evaluations (evals.every) make it sharper."


def _caveats(arms: Sequence[Arm], task: str | None) -> list[str]:
    made = []
    for arm in arms:
        if arm.run.status != "done":
            made.append(f"{arm.name} is {arm.run.status}: {arm.run.steps:,} steps are in its record.")
        if task is not None and arm.after is not None and arm.after["step"] < arm.run.steps:
            made.append(f"{arm.name}: its newest score is that of step {arm.after['step']:,}.")
    if task is None:
        named = "; ".join(f"{arm.letter}: {', '.join(arm.run.tasks) or 'none'}" for arm in arms)
        made.append(f"Their held-out tasks are different ones ({named}).")
    else:
        taken = [(arm.after or arm.before or {}).get("n") for arm in arms]
        if len({n for n in taken if n is not None}) > 1:
            made.append(f"They were asked different numbers of problems of {task}: {_by_letter(arms, taken)}.")
        setups = [_task_setup(arm.run, task) for arm in arms]
        if len(set(setups)) > 1:
            made.append(f"The task {task} is set up differently (its source, grader or sampling: see the differences).")
    for option, what in (("student.model", "students"), ("teacher.model", "teachers")):
        values = {value for arm in arms if (value := arm.run.option(option)) is not None}  # sft has no teacher
        if len(values) > 1:
            made.append(f"They start from different {what}: a better score may be theirs, not the method's.")
    seeds = [arm.run.option("run.seed") for arm in arms]
    if len(set(seeds)) > 1:
        made.append(f"Their seeds differ: {_by_letter(arms, seeds)}.")
    else:
        made.append("One seed each: the intervals hold the luck of the problems, not that of the training.")
    machines = [_machine(arm.run) for arm in arms]
    if len(set(machines)) > 1:
        made.append("They ran on different hardware, threads or versions: compare their times with care.")
    return made


def _task_setup(run: RunData, task: str) -> str:
    tasks = run.option("evals.tasks") or []
    return json.dumps([one for one in tasks if isinstance(one, Mapping) and one.get("name") == task], sort_keys=True)


def _machine(run: RunData) -> str:
    environment = run.environment or {}
    kept = ("machine", "torch", "threads", "cpu_capability", "cuda", "device", "opd")
    return json.dumps({key: environment.get(key) for key in kept}, sort_keys=True, default=str)


def _by_letter(arms: Sequence[Arm], values: Sequence[Any]) -> str:
    pairs = zip(arms, values, strict=True)
    return ", ".join(f"{arm.letter} {MISSING if value is None else value}" for arm, value in pairs)


def _mean(arm: Arm) -> float:
    return arm.after["mean"] if arm.after is not None else 0.0


def _last(curve: Sequence[tuple[float, float | None]]) -> float:
    return (curve[-1][1] or 0.0) if curve else 0.0


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2]}.."
