"""What a run leaves behind: its record in `summary.json`, its page, and what Python is handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.schema import Config
from opd.costs.ledger import Ledger
from opd.errors import OpdError
from opd.journal.records import Status, summary_record
from opd.reports.progress import RunView
from opd.wiring.exams import Exams, interval


@dataclass(frozen=True)
class Run:
    """A finished run.

    folder    everything about it (metrics, rollouts, config, summary).
    student   folder of the trained model, for `AutoModelForCausalLM.from_pretrained`.
    summary   what `summary.json` says.
    """

    folder: Path
    student: Path
    summary: Mapping[str, Any]


def summary_of(
    config: Config,
    exams: Exams,
    ledger: Ledger,
    *,
    status: Status,
    tokens: int,
    steps: int,
    resumes: int,
    stopped_by: str | None,
    limit: dict[str, Any] | None,
) -> dict[str, Any]:
    """See `journal.records.summary_record`. `tokens`: trained ones."""
    before, teacher = exams.of_first(0), exams.of_first(0, "teacher")
    after = exams.of_first(config.run.steps)
    return summary_record(
        status=status,
        preset=config.objective.preset,
        task=exams.first,
        n=None if before is None else before["n"],
        k=None if before is None else before["k"],
        ci_method=None if before is None else before["ci_method"],
        student_before=interval(before),
        student_after=interval(after),
        teacher=interval(teacher),
        seconds=ledger.elapsed,
        seconds_by_phase=ledger.seconds_by_phase,
        tokens=tokens,
        flops=ledger.total().flops,
        steps=steps,
        resumes=resumes,
        stopped_by=stopped_by,
        limit=limit,
    )


def report(folder: Path, view: RunView) -> None:
    """A page about the run; a page that cannot be written is not worth a run."""
    from opd.reports.page.report import write_report

    try:
        view.message(f"report: {write_report(folder)}")
    except (OpdError, OSError, ValueError) as error:
        view.message(f"no report was written: {error}")
