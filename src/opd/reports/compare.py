"""Several runs side by side: which is better, at what cost, and why their configs differ. Numbers, and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.errors import BadInput
from opd.journal.records import gap_closed
from opd.reports.caveats import caveats, only_names
from opd.reports.figures import closed, count, duration, interval, percent
from opd.reports.options import differences
from opd.reports.paired import Paired, paired
from opd.reports.progress import say
from opd.reports.run_data import RunData, read_run
from opd.reports.table import draw, strip

MOST = 12  # runs that one picture can hold
NAME = 14  # characters of a name on the terminal
VALUE = 22  # and of an option's value


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of a comparison.

    letter        how tables and charts call it: A, B, ...
    task          the held-out task of its scores: the one that is compared, or without one its own; None: none.
    before        the student's score before training; `after` its newest one; `teacher`. None where not measured.
    gap_closed    as in summary.json.
    tokens        trained on; `flops` of training without evaluations; `seconds` of rollout, scoring, update and sync.
    reached       what it had spent when an evaluation first reached the level of the comparison: `step`, `tokens`,
                  `flops`, `seconds`; None when there is no such level.
    """

    letter: str
    run: RunData
    task: str | None
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
    level        the best score that every run reached that got better than all began: what it cost each is compared;
                 None with fewer than two such runs.
    best         letters of the run with the highest score, and of those that cannot be told from it.
    pairs        (letter of the highest, letter of another, the two problem by problem): those that were asked the same
                 problems. p is multiplied by the number of pairs among the runs, since the highest is picked of all.
    confidence   of what is called a difference.
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
    pairs: Sequence[tuple[str, str, Paired]]
    confidence: float
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
    confidence = max(run.confidence for run in runs)
    pairs = _pairs(arms, task)
    best, verdict = _best(arms, task, pairs, confidence)
    reached = [arm for arm in arms if arm.reached is not None]
    cheapest, per_cost = None, None
    if level is not None and len(reached) > 1:
        order = sorted(reached, key=lambda arm: arm.reached["flops"] if arm.reached else 0.0)
        cheapest, per_cost = order[0].letter, _per_cost(order, level)
    same = only_names(runs, task)
    return Comparison(
        arms=arms,
        task=task,
        level=level,
        best=best,
        pairs=pairs,
        confidence=confidence,
        cheapest=cheapest,
        verdict=verdict,
        per_cost=per_cost,
        caveats=caveats({arm.letter: arm.run for arm in arms}, task),
        differences=[row for row in differences([run.config for run in runs]) if not same.fullmatch(row[0])],
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
        cells = (f"{percent(arm.after['mean'])}{mark}", interval(arm.after), gap(arm))
        rows.append((_short(arm.name, NAME), *cells, strip(arm.after, start, end)))
    header = ("", "accuracy ", "interval", "gap closed", f"{100 * start:.0f} % to {100 * end:.0f} %")
    notes = ["* highest, and what cannot be told from it"] if len(made.best) > 1 else []
    title = f"{made.task}: scores after training" if made.task else "no shared task: scores after training on their own"
    draw(console, title, header, rows, notes)
    if made.task is None:
        for arm in made.arms:
            say(console, f"{arm.letter} on {arm.task or 'none'}")
    say(console, "")
    to_level = "" if made.level is None else f"FLOPs to {percent(made.level)}"
    costs = []
    for arm in made.arms:
        mark = "*" if arm.letter == made.cheapest else " "
        own = (f"{arm.run.steps:,}", count(arm.tokens), count(arm.flops), duration(arm.seconds))
        reached = "-" if arm.reached is None else f"{count(arm.reached['flops'])}{mark}"
        costs.append((_short(arm.name, NAME), *own, *([reached] if to_level else [])))
    draw(console, "", ("", "steps", "tokens", "FLOPs", "step time", *([f"{to_level} "] if to_level else [])), costs, [])
    say(console, "")
    say(console, made.verdict, "bold")
    for line in (*against(made), correction(made)):
        if line:
            say(console, line)
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


def against(made: Comparison) -> list[str]:
    """The highest against every other, problem by problem, in words; nothing where that cannot be said."""
    names = {arm.letter: arm.name for arm in made.arms}
    return [f"{names[a]} against {names[b]}: {pair.words(made.confidence)}" for a, b, pair in made.pairs]


def correction(made: Comparison) -> str:
    """What was done to p because several runs were compared; empty where nothing was."""
    scored = len(_scored(made.arms))
    pairs = scored * (scored - 1) // 2
    return f"p is multiplied by {pairs}, the number of pairs among the runs." if made.pairs and pairs > 1 else ""


def gap(arm: Arm) -> str:
    """How much of the gap to the teacher is closed, for a narrow column."""
    if arm.before is None or arm.after is None:
        return "-"
    return closed(arm.gap_closed, arm.before["mean"], arm.after["mean"]).replace(" points", " pt")


# ---- what is compared ---------------------------------------------------------------------------------------------


def _arm(letter: str, run: RunData, shared: str | None, level: float | None) -> Arm:
    task = shared or (run.tasks[0] if run.tasks else None)
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
        task=task,
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
    """The lowest of the best scores above where all runs started; a run that never got there has no say."""
    if task is None:
        return None
    starts = [row["mean"] for run in runs if (row := run.score(task, "before")) is not None]
    most = [max((row["mean"] for row in run.scores(task) if row["step"] > 0), default=0.0) for run in runs]
    better = [score for score in most if score > max(starts, default=0.0)]
    return min(better) if len(better) > 1 else None


def _pairs(arms: Sequence[Arm], task: str | None) -> list[tuple[str, str, Paired]]:
    """The arm with the highest score against every other, best first, where both were asked the same problems."""
    scored = _scored(arms) if task is not None else []
    among = len(scored) * (len(scored) - 1) // 2
    both = [(other, paired(other.after, scored[0].after)) for other in scored[1:]]
    return [(scored[0].letter, other.letter, pair.times(among)) for other, pair in both if pair is not None]


def _best(
    arms: Sequence[Arm], task: str | None, pairs: Sequence[tuple[str, str, Paired]], confidence: float
) -> tuple[list[str], str]:
    """Letters of the highest score and of what cannot be told from it, and a sentence about them."""
    scored = _scored(arms)
    if task is None:
        return [], "The runs share no held-out task, so nothing says which is better."
    if len(scored) < 2:
        return [], f"Fewer than two runs have a score on {task} after training, so nothing says which is better."
    top = scored[0]
    assert top.after is not None
    clear = {other: pair.is_clear(confidence) for _, other, pair in pairs}
    equal = []
    for arm in scored[1:]:
        assert arm.after is not None
        if not clear.get(arm.letter, arm.after["high"] < top.after["low"]):
            equal.append(arm)
    said = f"{top.name}: {percent(_mean(top))} {interval(top.after)}"
    names = ", ".join(arm.name for arm in equal)
    if not equal:
        how = "its lead is not chance" if pairs else "its interval lies above every other"
        return [top.letter], f"Best is {said}; {how}."
    others = "" if len(equal) == len(scored) - 1 else " The others are clearly lower."
    why = "that could be chance" if all(arm.letter in clear for arm in equal) else "the intervals overlap"
    return (
        [top.letter, *(arm.letter for arm in equal)],
        f"Highest is {said}, but no difference from {names} is shown: {why}.{others}",
    )


def _scored(arms: Sequence[Arm]) -> list[Arm]:
    """Arms with a score after training, the highest first."""
    return sorted((arm for arm in arms if arm.after is not None), key=lambda arm: -_mean(arm))


def _per_cost(order: Sequence[Arm], level: float) -> str:
    first, last = order[0], order[-1]
    assert first.reached is not None and last.reached is not None
    said = f"To reach {percent(level)} on the way, {first.name} took {count(first.reached['flops'])} FLOPs"
    said += f" and {count(first.reached['tokens'])} trained tokens"
    if first.reached["flops"] > 0:
        ratio = last.reached["flops"] / first.reached["flops"]
        said += f"; {last.name} took {f'{ratio:.2g} times the' if ratio >= 1.05 else 'as many'} FLOPs"
    return said + ". That is the first evaluation at or above it: more evaluations (evals.every) make it sharper."


def _mean(arm: Arm) -> float:
    return arm.after["mean"] if arm.after is not None else 0.0


def _last(curve: Sequence[tuple[float, float | None]]) -> float:
    return (curve[-1][1] or 0.0) if curve else 0.0


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 2]}.."
