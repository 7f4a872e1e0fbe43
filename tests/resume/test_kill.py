"""A run that is killed at any moment ends as if it had never stopped: losses, rollouts, weights, all to the bit."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from tests.resume.killed import PHASES, assert_same, opd, record
from tests.resume.runs import arguments

POINTS = 20  # over five phases; six of them in `make test`


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory) -> tuple[dict, dict[str, int]]:
    """The record of the run that nobody disturbs, and how many events each phase has in it."""
    totals = {}
    records = []
    for phase in PHASES:
        run = tmp_path_factory.mktemp("whole") / "run"
        code, totals[phase] = opd(*arguments(world, run), phase=phase)
        assert code == 0
        records.append(record(run))
    for other in records[1:]:
        assert_same(other, records[0])
    return records[0], totals


def points() -> list:
    draw = random.Random(20260)
    made = []
    for n in range(POINTS):
        phase = list(PHASES)[n % len(PHASES)]
        marks = [] if n < 6 else [pytest.mark.slow]
        made.append(pytest.param(phase, draw.random(), id=f"{n}-{phase}", marks=marks))
    return made


@pytest.mark.parametrize(("phase", "share"), points())
def test_R_1_a_killed_run_goes_on_bit_for_bit(world, tmp_path: Path, whole, phase: str, share: float) -> None:
    undisturbed, totals = whole
    run = tmp_path / "run"
    at = 1 + int(share * totals[phase])
    assert opd(*arguments(world, run), phase=phase, at=at)[0] == -signal.SIGKILL
    assert opd("resume", run)[0] == 0
    assert_same(record(run), undisturbed)


@pytest.mark.slow
def test_R_1_a_run_that_is_killed_again_and_again_gets_there(world, tmp_path: Path, whole) -> None:
    undisturbed, totals = whole
    run, draw = tmp_path / "run", random.Random(7)
    code, _ = opd(*arguments(world, run), phase="update", at=totals["update"] // 2)
    for n in range(8):
        phase = list(PHASES)[n % len(PHASES)]
        code, _ = opd("resume", run, phase=phase, at=1 + draw.randrange(totals[phase] // 2))
        assert code in (0, -signal.SIGKILL)
    assert opd("resume", run)[0] == 0
    assert_same(record(run), undisturbed)
    assert json.loads((run / "summary.json").read_text())["resumes"] >= 5


@pytest.mark.parametrize("phase", PHASES)
def test_R_6_sigterm_in_every_phase_stops_cleanly_and_the_run_goes_on(world, tmp_path, whole, phase: str) -> None:
    undisturbed, totals = whole
    run = tmp_path / "run"
    code, _ = opd(*arguments(world, run), phase=phase, at=2 * totals[phase] // 3, number=signal.SIGTERM)
    assert code == 75
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["stopped_by"]
    newest = max((run / "checkpoints").iterdir()).name
    assert newest == f"step_{summary['steps']:06d}", "the stop wrote a checkpoint of the last whole step"
    assert opd("resume", run)[0] == 0
    assert_same(record(run), undisturbed)
