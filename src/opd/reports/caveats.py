"""Whether runs that stand side by side can be compared: what differs between them besides the method, and what only
seems to.

A file is often named by another path in another run, and a source by another name. So runs are held against each other
by what they read: problems by their prompts, models and data by the fingerprints in the record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opd.reports.crossed import joined
from opd.reports.figures import counted, percent
from opd.reports.options import MISSING
from opd.reports.paired import problems
from opd.reports.run_data import Row, RunData

STATES = {"going on": "goes on", "killed": "was killed", "interrupted": "was interrupted"}
# Options that say where something was read from, and how a run shows that all of them read the same.
READ_FROM = {
    "student": r"student\.model",
    "teacher": r"teacher\.model",
    "data": r"prompts\.sources\.\d+\.(path|name)",
    "problems": r"evals\.tasks\.\d+\.source\.(path|name)",
}


def caveats(runs: Mapping[str, RunData], task: str | None) -> list[str]:
    """Why the runs (by their letters) might not be comparable; `task` is the one they share."""
    made = []
    for letter, run in runs.items():
        if run.status != "done":
            what = STATES.get(run.status, run.status if run.status == "failed" else f"is {run.status}")
            made.append(f"{letter} {run.name} {what}: its record holds {counted(run.steps, 'step', ',')}.")
        after = None if task is None else run.score(task, "after")
        if after is not None and after["step"] < run.steps:
            made.append(f"{letter} {run.name}: its newest score is that of step {after['step']:,}.")
        if any(event.get("kind") == "changed" for event in run.events):
            made.append(f"{letter} {run.name}: options or the machine changed on the way (its report says which).")
    if task is None:
        named = "; ".join(f"{letter}: {', '.join(run.tasks) or 'none'}" for letter, run in runs.items())
        made.append(f"Their held-out tasks are different ones ({named}): each score is of a run's own task.")
    else:
        made += _examined(runs, task)
    for who, what in (("student", "students"), ("teacher", "teachers")):
        # Not said of sft, which has no teacher.
        named = {value for run in runs.values() if (value := run.option(f"{who}.model")) is not None}
        if len(named) > 1 and not _same_model(runs.values(), who):
            made.append(f"They start from different {what}: a better score may be theirs, not the method's.")
    kinds = {letter: _kinds(run) for letter, run in runs.items()}
    if len(set(kinds.values())) > 1:
        made.append(
            "Their teachers' tokens are joined with the student's in different ways: distances to a teacher are of "
            f"different tokens, compare scores ({_by_letter(kinds)})."
        )
    seeds = {letter: run.option("run.seed") for letter, run in runs.items()}
    if len(set(seeds.values())) > 1:
        made.append(f"Their seeds differ: {_by_letter(seeds)}.")
    else:
        made.append("One seed each: intervals and p hold the luck of the problems, not that of the training.")
    if len({_machine(run) for run in runs.values()}) > 1:
        made.append("They ran on different hardware, threads or versions: compare their times with care.")
    return made


def only_names(runs: Sequence[RunData], task: str | None) -> re.Pattern[str]:
    """Matches options in which the runs differ by name alone: what they read there is the same."""
    same = [who for who in ("student", "teacher") if _same_model(runs, who)]
    same = [who for who in same if all(run.option(f"{who}.model") is not None for run in runs)]
    data = [run.identity.get("data") for run in runs]
    same += ["data"] if None not in data and len(set(data)) == 1 else []
    asked = [] if task is None else [_asked(run, task) for run in runs]
    same += ["problems"] if len(runs[0].tasks) == 1 and asked and asked[0] and len(set(asked)) == 1 else []
    return re.compile("|".join(READ_FROM[what] for what in same) or r"\b\B")


def _examined(runs: Mapping[str, RunData], task: str) -> list[str]:
    made = []
    rows = {letter: run.score(task, "after") or run.score(task, "before") for letter, run in runs.items()}
    taken = {letter: None if row is None else row.get("n") for letter, row in rows.items()}
    asked = [problems for run in runs.values() if (problems := _asked(run, task)) is not None]
    known = len(asked) == len(runs)
    if len({n for n in taken.values() if n is not None}) > 1:
        made.append(f"They were asked different numbers of problems of {task}: {_by_letter(taken)}.")
    elif known and any(one != asked[0] for one in asked):
        common, most = len(frozenset.intersection(*asked)), max(map(len, asked))
        made.append(f"They were asked different problems of {task}: {common:,} of {most:,} are the same.")
    if len({_setup(run, task, with_source=not known) for run in runs.values()}) > 1:
        what = "grader, samples or sampling" if known else "source, grader, samples or sampling"
        made.append(f"The task {task} is set up differently ({what}: see the differences).")
    return made


def _asked(run: RunData, task: str) -> frozenset[Any] | None:
    """What the student was asked; None where the record does not say."""
    found = problems(run.score(task, "after") or run.score(task, "before"))
    return None if found is None else frozenset(found)


def _setup(run: RunData, task: str, *, with_source: bool) -> str:
    """Everything that decides a score besides the model and, without `with_source`, the problems."""
    tasks = [one for one in run.option("evals.tasks") or [] if isinstance(one, Mapping) and one.get("name") == task]
    kept = [{key: value for key, value in one.items() if with_source or key != "source"} for one in tasks]
    sampling = [_without_samples(one.get("sampling") or run.option("sampling") or {}) for one in tasks]
    return json.dumps([one | {"sampling": how} for one, how in zip(kept, sampling, strict=True)], sort_keys=True)


def _without_samples(sampling: Row) -> dict[str, Any]:
    return {key: value for key, value in sampling.items() if key != "samples_per_prompt"}  # a task has its own


def _same_model(runs: Iterable[RunData], who: str) -> bool:
    """Whether all runs that have this model began with the same weights; False where one does not say."""
    weights = {
        str(run.identity.get(who) or MISSING).partition("-")[0]
        for run in runs
        if run.option(f"{who}.model") is not None
    }
    return len(weights) == 1 and "" not in weights


def _kinds(run: RunData) -> str:
    """How a run's teachers with another tokenizer are joined."""
    found = sorted({f"{one.alignment}, {percent(one.trained)} of the tokens trained" for one in joined(run)})
    return " and ".join(found) or "the student's own tokenizer"


def _machine(run: RunData) -> str:
    environment = run.environment or {}
    kept = ("machine", "torch", "threads", "cpu_capability", "cuda", "device", "opd")
    return json.dumps({key: environment.get(key) for key in kept}, sort_keys=True, default=str)


def _by_letter(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{letter} {MISSING if value is None else value}" for letter, value in values.items())
