"""The ledger of a run against what the run did."""

from __future__ import annotations

from pathlib import Path

import opd
from opd.journal.reader import read_metrics
from tests import tiny

SHORT = {"prompts": ["What is 2 + 2?", "hi"], "sampling": {"max_tokens": 8, "samples_per_prompt": 2}}


def test_E_05_every_update_on_a_batch_is_billed(tmp_path: Path) -> None:
    models = tiny.save(tmp_path / "student", seed=0), tiny.save(tmp_path / "teacher", "llama", seed=1)
    lines = []
    for n in (1, 2):
        run = {"folder": str(tmp_path / str(n)), "steps": 1}
        made = opd.distill(
            *models, **SHORT, objective={"preset": "tml"}, learner={"updates_per_batch": n}, run=run, quiet=True
        )
        lines += read_metrics(made.folder)
    for part in ("teacher_scoring", "student_training"):
        assert lines[1][f"flops_{part}"] == 2 * lines[0][f"flops_{part}"] > 0
    assert lines[1]["flops_student_sampling"] == lines[0]["flops_student_sampling"]
