"""The record of a run goes back to where a checkpoint stands, so that the run can go on from there."""

from __future__ import annotations

import re
from pathlib import Path

from opd.journal.atomic import TEMPORARY, discard, write_atomic
from opd.journal.checkpoints import Checkpoints
from opd.journal.reader import read_evals, read_metrics

ENDINGS = ("summary.json", "final", "final.tmp")
BY_STEP = ("rollouts", "views", "dumps", "weights")


def rewind(folder: Path, step: int) -> None:
    """Removes what a run wrote after `step`. Killed half-way, the same call does the rest.

    Raises DataError when a line of metrics or evals cannot be read; an incomplete last one is removed.
    """
    for name in ENDINGS:
        discard(folder / name)
    Checkpoints(folder / "checkpoints").drop_after(step)  # before the lines: none may be ahead of its record
    for name in BY_STEP:
        for path in (folder / name).glob("step_*"):
            found = re.match(r"step_(\d+)", path.name)
            if path.name.endswith(TEMPORARY) or (found is not None and int(found[1]) > step):
                discard(path)
    _keep(folder / "metrics.jsonl", [row["step"] <= step for row in read_metrics(folder)])
    _keep(folder / "evals.jsonl", [row["step"] <= step for row in read_evals(folder)])


def _keep(path: Path, kept: list[bool]) -> None:
    """Keeps the lines that are marked, as they are, and none behind the marks."""
    if path.exists():
        before = path.read_bytes()
        lines = before.split(b"\n")[: len(kept)]
        after = b"".join(line + b"\n" for line, keep in zip(lines, kept, strict=True) if keep)
        if after != before:
            write_atomic(path, after)
