"""Everything a page or a table shows about one run, read once. Runs that go on, were killed or are old are fine."""

from __future__ import annotations

import os
import platform
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opd.errors import DataError
from opd.journal.folder import is_run_folder
from opd.journal.graded import GradedRecord, check
from opd.journal.lock import LOCK, is_alive, owner_of
from opd.journal.reader import (
    read_config,
    read_environment,
    read_evals,
    read_events,
    read_metrics,
    read_rollouts,
    read_summary,
    read_views,
)
from opd.reports.paired import CONFIDENCE

# dead: it ended without giving the lock back. gone: it gave it back. elsewhere: on another machine, so who knows.
Writer = Literal["at work", "dead", "gone", "elsewhere", "unknown"]
WORK = ("rollout", "scoring", "update", "sync")  # phases of a step; the others are not the method's

Row = Mapping[str, Any]
Curve = list[tuple[float, float | None]]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run folder as plain values.

    name      the folder's own name.
    config    resolved; None when the run was killed before it was written. So are environment and summary.
    metrics   one line a step, in the order of steps; a step that was taken again after a resume counts once.
    evals     one line an evaluation, likewise.
    events    as they were written.
    summary   None as long as the run goes on, and for a run that was killed.
    writer    what the folder's lock says of the process that writes it.
    views     graded records, oldest first.
    samples   rollouts of the first and of the last step that has any, a few of each; read only without views.
    problems  what could not be read, in words.
    """

    name: str
    folder: Path
    config: Row | None
    environment: Row | None
    metrics: Sequence[Row]
    evals: Sequence[Row]
    events: Sequence[Row]
    summary: Row | None
    writer: Writer
    views: Sequence[GradedRecord]
    samples: Sequence[Row]
    problems: Sequence[str]

    @property
    def steps(self) -> int:
        """Steps that are in the record."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def result(self) -> Row | None:
        """The summary, unless it is one of before the run was continued."""
        return None if self.summary is None or self.summary.get("steps", 0) < self.steps else self.summary

    @property
    def status(self) -> str:
        """done, interrupted or failed; "going on", "killed", or "not finished" where nobody knows which of the two."""
        if self.result is not None:
            return str(self.result["status"])
        return {"at work": "going on", "dead": "killed"}.get(self.writer, "not finished")

    @property
    def confidence(self) -> float:
        """Of the intervals, and of what counts as a difference."""
        return _confidence(self.config)

    @property
    def identity(self) -> Row:
        """Fingerprints of `data`, `student` (untrained) and `teacher`; empty for a run that did not begin."""
        starts = [event for event in self.events if event.get("kind") == "start"]
        return starts[-1] if starts else {}

    @property
    def tasks(self) -> list[str]:
        """Names of the held-out tasks, the main one first."""
        return list(dict.fromkeys(str(row["task"]) for row in self.evals))

    def option(self, path: str) -> Any:
        """The value of a dotted option, None where there is none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def curve(self, key: str) -> Curve:
        """(step, value) of a metric; None where it was not finite. Steps that do not report it are left out."""
        return [(row["step"], _number(row[key])) for row in self.metrics if key in row]

    @property
    def metric_names(self) -> list[str]:
        """Names of all metrics, in the order of their first appearance."""
        own = ("schema_version", "step", "policy_version", "non_finite")
        return [key for key in dict.fromkeys(key for row in self.metrics for key in row) if key not in own]

    def scores(self, task: str, model: str = "student") -> list[Row]:
        """The evaluations of a task that have a score."""
        rows = [r for r in self.evals if r["task"] == task and r.get("model", "student") == model]
        return [row for row in rows if row.get("mean") is not None]

    def score(self, task: str, when: str) -> Row | None:
        """The score `before` training, `after` it (the newest one, with its step) or of the `teacher`."""
        rows = self.scores(task, "teacher" if when == "teacher" else "student")
        if when == "before":
            rows = [row for row in rows if row["step"] == 0]
        elif when == "after":
            rows = [row for row in rows if row["step"] > 0]
        return rows[-1] if rows else None

    def spent(self) -> dict[str, Curve]:
        """What had been spent after each step: `tokens` that were trained on, `flops` of the ledger's parts, and
        `seconds` of rollout, scoring, update and sync."""
        tokens = 0.0
        made: dict[str, Curve] = {"tokens": [], "flops": [], "seconds": []}
        for row in self.metrics:
            tokens += _number(row.get("trained_tokens")) or 0.0
            made["tokens"].append((row["step"], tokens))
            made["flops"].append((row["step"], sum(parts(row, "flops_").values())))
            made["seconds"].append((row["step"], sum(parts(row, "seconds_").get(phase, 0.0) for phase in WORK)))
        return made


def read_run(folder: str | Path) -> RunData:
    """Reads a run folder. What is damaged is left out and named under `problems`.

    Raises DataError when the folder does not exist or is no run.
    """
    path = Path(folder).expanduser()
    if not is_run_folder(path):
        raise DataError(f"{path} is no run folder of opd" if path.exists() else f"{path} does not exist")
    problems: list[str] = []
    metrics = _try(lambda: read_metrics(path), [], problems)
    views = _try(lambda: read_views(path), [], problems)
    return RunData(
        name=path.resolve().name,
        folder=path,
        config=_try(lambda: read_config(path), None, problems),
        environment=_try(lambda: read_environment(path), None, problems),
        metrics=list({row["step"]: row for row in metrics if "step" in row}.values()),
        evals=_latest(_try(lambda: read_evals(path), [], problems)),
        events=_try(lambda: read_events(path), [], problems),
        summary=_try(lambda: read_summary(path), None, problems),
        writer=writer_of(path),
        views=[record for _, view in views if (record := _try(lambda v=view: check(v), None, problems)) is not None],
        samples=[] if views else _try(lambda: _samples(path), [], problems),
        problems=problems,
    )


class Measured(NamedTuple):
    """The student on one task: before training, and its newest score with the step; None where it has none."""

    before: Row | None
    latest: Row | None
    confidence: float


def measured(folder: str | Path, task: str) -> Measured:
    """What `evals.jsonl` says of the student. What cannot be read counts as not there."""
    path, problems = Path(folder).expanduser(), []
    rows = _latest(_try(lambda: read_evals(path), [], problems))
    rows = [row for row in rows if row["task"] == task and row.get("model", "student") == "student"]
    rows = [row for row in rows if row.get("mean") is not None]
    before, after = ([row for row in rows if (row["step"] > 0) == later] for later in (False, True))
    return Measured(
        before=before[-1] if before else None,
        latest=after[-1] if after else None,
        confidence=_confidence(_try(lambda: read_config(path), None, problems)),
    )


def writer_of(folder: Path) -> Writer:
    """Whether a process is at work in a run folder, from what `run.lock` says of it.

    The lock itself is not tried: a reader that holds it for a moment would keep a run from beginning.
    """
    try:
        opened = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return "unknown"
    try:
        owner = owner_of(opened)
    finally:
        os.close(opened)
    if owner is None:
        return "unknown"
    if owner["released"]:
        return "gone"
    if owner["host"] != platform.node():
        return "elsewhere"
    return "at work" if is_alive(owner) else "dead"


def parts(row: Row, prefix: str) -> dict[str, float]:
    """The metrics of a line that begin with `prefix`, without it; those that are not finite are left out."""
    found = {key.removeprefix(prefix): _number(value) for key, value in row.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if value is not None}


def _try(read: Callable[[], Any], otherwise: Any, problems: list[str]) -> Any:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            value = read()
        except (DataError, OSError, EOFError, zlib.error) as error:  # the last two: a damaged compressed file
            problems.append(str(error))
            value = otherwise
    problems += [str(warning.message) for warning in said]
    return value


def _latest(rows: Sequence[Row]) -> list[Row]:
    """One line for each task, model and step: the last that was written, at the place of the first."""
    known = [row for row in rows if "task" in row and "step" in row]
    return list({(row["task"], row.get("model", "student"), row["step"]): row for row in known}.values())


def _confidence(config: Row | None) -> float:
    evals = (config or {}).get("evals")
    value = evals.get("confidence") if isinstance(evals, Mapping) else None
    return value if isinstance(value, float) and 0 < value < 1 else CONFIDENCE


def _samples(folder: Path, each: int = 4) -> list[Row]:
    """The first rollouts of the first and of the last step whose file is there."""
    steps = sorted(int(path.name[5:].split(".")[0]) for path in (folder / "rollouts").glob("step_*.jsonl.gz"))
    made: list[Row] = []
    for step in dict.fromkeys(steps[:1] + steps[-1:]):
        for count, row in enumerate(read_rollouts(folder, step)):
            if count == each:
                break
            made.append(row)
    return made


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
