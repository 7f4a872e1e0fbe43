"""R-2: scorers that follow the student are part of the checkpoint."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.resume.killed import assert_same, opd, record
from tests.resume.runs import arguments

SCORERS = {
    "average": {"weights": "ema", "ema_rate": 0.3},
    "earlier": {"weights": "past", "every": 4},
    "start": {"weights": "initial"},
}
TERMS = [{"name": "t"}, *({"name": name, "target": name, "coefficient": 0.5} for name in SCORERS)]


@pytest.mark.parametrize("lora", ["null", '{"rank": 2}'])
def test_R_2_a_killed_run_goes_on_with_its_average_bit_for_bit(world: Path, tmp_path: Path, lora: str) -> None:
    """Without its state an average would begin again at the untrained student."""
    changes = {
        "scorers": json.dumps(SCORERS),
        "objective": json.dumps({"behaviour": "student", "terms": TERMS}),
        "student__lora": lora,
    }
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, total = opd(*arguments(world, whole, **changes), phase="torch.optim:AdamW.step")
    assert code == 0
    for at in (total // 2, total - 1):  # in the third and in the last step: behind a checkpoint each time
        first = not run.exists()
        begin = arguments(world, run, **changes) if first else ["resume", run]
        code, _ = opd(*begin, phase="torch.optim:AdamW.step", at=at if first else 3)
        assert code == -signal.SIGKILL
    assert opd("resume", run)[0] == 0
    kept = record(run)
    assert sum("scorer_" in name for name in kept) == 2, "the two that follow the student, and not the one that stays"
    assert_same(kept, record(whole))
