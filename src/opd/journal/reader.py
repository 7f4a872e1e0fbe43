"""Reads run folders, also of runs that are going on or were killed."""

from __future__ import annotations

import gzip
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.journal.lock import is_run_folder
from opd.journal.records import SCHEMA_VERSION


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`: `step`, `policy_version` and numbers; None where one was NaN or infinite.

    An incomplete last line (the run was killed while writing it) is left out with a warning. Raises DataError when
    the folder is no run, another line cannot be read, or a newer opd wrote it.
    """
    return _lines(_run(folder) / "metrics.jsonl")


def read_evals(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `evals.jsonl`; incomplete last line and errors as in `read_metrics`."""
    return _lines(_run(folder) / "evals.jsonl")


def read_events(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of `events.jsonl`: `step`, `kind` (`records.EventKind`), `message` and facts; errors as in
    `read_metrics`. A step may come again: what happened before a run was continued stays."""
    return _lines(_run(folder) / "events.jsonl")


def read_views(folder: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Step and graded record (`journal/graded.py`) of every file in `views/`, in the order of the steps."""
    files = _by_step(_run(folder) / "views", ".json")
    return [(step, _parse(files[step].read_bytes(), files[step], 1)) for step in sorted(files)]


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """`summary.json`, or None when the run has not come to its end."""
    return _object(_run(folder) / "summary.json")


def read_config(folder: str | Path) -> dict[str, Any] | None:
    """`config.json`: the resolved config; None when the run was killed before it was written."""
    return _object(_run(folder) / "config.json", versioned=False)


def read_environment(folder: str | Path) -> dict[str, Any] | None:
    """`environment.json`: versions, threads, device and the config's hash."""
    return _object(_run(folder) / "environment.json")


def read_rollouts(folder: str | Path, step: int | None = None) -> Iterator[dict[str, Any]]:
    """The rollouts of one step, or of all steps in order, one dict each:

    id, prompt_id, domain, policy_version, behaviour, finish_reason   as in `opd.types.Rollout`
    reward                                                            in [0, 1]; absent where nothing graded it
    prompt, response                                                  text, for people
    prompt_ids, response_ids                                          token ids
    behaviour_logprobs                                                one for every response token, None: nobody sampled
    mask                                                              1 where the writer chose the token
    turns                                                             [start, end] of the spans the student wrote
    teacher_logprobs, reverse_kl                                      one for every response token, None: not scored;
                                                                      absent where nothing was, and in older files
    step                                                              the step whose file it stands in

    Raises DataError when the folder is no run, the step was not written, or a line cannot be read.
    """
    files = _by_step(_run(folder) / "rollouts", ".jsonl.gz")
    if step is not None and step not in files:
        there = f"steps {min(files)} to {max(files)}" if files else "none"
        raise DataError(f"{folder}: no rollouts of step {step}; written: {there}")
    for number in sorted(files) if step is None else [step]:
        with gzip.open(files[number], "rb") as file:
            for count, text in enumerate(file, 1):
                yield {"step": number, **_parse(text, files[number], count)}


def recorded_steps(folder: str | Path) -> set[int]:
    """Steps, counted from 1, whose rollouts are there. Raises DataError when the folder is no run."""
    return set(_by_step(_run(folder) / "rollouts", ".jsonl.gz"))


def _by_step(folder: Path, suffix: str) -> dict[int, Path]:
    named = ((re.fullmatch(rf"step_(\d+){re.escape(suffix)}", path.name), path) for path in folder.glob("step_*"))
    return {int(name[1]): path for name, path in named if name}


def _run(folder: str | Path) -> Path:
    path = Path(folder).expanduser()
    if not is_run_folder(path):
        raise DataError(f"{path} is no run folder of opd" if path.exists() else f"{path} does not exist")
    return path


def _object(path: Path, versioned: bool = True) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return _parse(path.read_bytes(), path, 1, versioned)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    texts = path.read_bytes().split(b"\n")
    if texts[-1] == b"":
        texts.pop()
    rows = []
    for count, text in enumerate(texts, 1):
        try:
            rows.append(_parse(text, path, count))
        except _Unreadable:
            if count < len(texts):
                raise
            warnings.warn(f"{path}:{count}: the last line is incomplete and is left out", stacklevel=3)
    return rows


class _Unreadable(DataError):
    pass


def _parse(text: bytes, path: Path, count: int, versioned: bool = True) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise _Unreadable(f"{path}:{count}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _Unreadable(f"{path}:{count}: holds a {type(row).__name__} where an object belongs")
    if versioned and row.get("schema_version", 0) > SCHEMA_VERSION:
        raise DataError(
            f"{path}:{count}: written with schema {row['schema_version']}, this opd reads up to {SCHEMA_VERSION}; "
            f"update opd"
        )
    return row
