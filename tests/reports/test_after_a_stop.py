"""What a real run that was stopped tells its user: the table at the end, and its page."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

import opd
from opd.errors import Interrupted
from tests import tiny


def test_a_stopped_run_says_where_its_student_is(tmp_path: Path, capsys) -> None:
    models = tiny.save(tmp_path / "student", seed=0), tiny.save(tmp_path / "teacher", "llama", seed=1, scale=10.0)
    rows = [{"prompt": f"What is {i} + 2?", "answer": str(i + 2)} for i in range(4)]
    task = {"name": "sums", "source": {"kind": "inline", "name": "sums", "rows": rows}, "grader": {"kind": "exact"}}
    with pytest.raises(Interrupted):
        opd.distill(
            *models,
            prompts=["What is 2 + 2?", "hi"],
            sampling={"max_tokens": 8, "samples_per_prompt": 2},
            evals={"tasks": [task], "every": 1, "teacher": False},
            guards={"window": 4, "policy_gap": {"action": "stop", "nats": 1e-30, "steps": 3}},
            run={"folder": str(tmp_path / "run"), "steps": 40},
        )
    printed = capsys.readouterr().out
    assert re.search(r"student at step \d+ +0\.0 %", printed) and "student after" not in printed
    assert "student: the same on all 4 problems" in printed
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert "Interrupted: " in page and f"opd resume {tmp_path / 'run'}" in page
    assert "no difference shown. It is the same on all 4 problems." in page
