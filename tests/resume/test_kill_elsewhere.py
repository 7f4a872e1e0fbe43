"""Killed runs of other kinds than the plain one, and runs that are killed where they end or stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from opd.journal.reader import read_events, read_metrics, read_summary
from tests import crossing, tiny
from tests.resume.killed import assert_same, opd, record
from tests.resume.runs import arguments

LORA = {"student__lora": '{"rank": 4}'}
KINDS = {
    "several updates on a batch": {"objective__preset": "tml", "learner__updates_per_batch": 2},
    "qlora": {**LORA, "student__quantisation": "int4"},
    "mixture of experts": {"student__model": "qwen3_moe"},
    "gpt2": {"student__model": "gpt2"},
    "gradient checkpointing": {"student__gradient_checkpointing": "true"},
    "bfloat16": {"student__dtype": "bfloat16", "teacher__dtype": "bfloat16"},
    "fewer prompts than a step asks": {"prompts__sources": "short"},
    "a teacher with other tokens": {"teacher__model": "unigram", "objective__preset": "gold"},
}
SLOW = ("qlora", "gpt2", "gradient checkpointing", "bfloat16", "fewer prompts than a step asks")
SLOW += ("a teacher with other tokens",)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k in SLOW)) for k in KINDS])
def test_R_1_a_killed_run_of_another_kind_goes_on_bit_for_bit(world: Path, tmp_path: Path, kind: str) -> None:
    changes = dict(KINDS[kind])
    if "student__quantisation" in changes:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
    if "student__model" in changes:
        changes["student__model"] = tiny.save(tmp_path / "student", changes["student__model"])
    if "teacher__model" in changes:
        changes["teacher__model"] = crossing.save(tmp_path / "teacher", changes["teacher__model"], seed=1)
    if "prompts__sources" in changes:
        changes["prompts__sources"] = f'[{{"kind": "jsonl", "path": "{world}/prompts.jsonl", "limit": 3}}]'
    code, total = opd(*arguments(world, tmp_path / "whole", **changes), phase="update")
    assert code == 0
    run = tmp_path / "run"
    assert opd(*arguments(world, run, **changes), phase="update", at=5 * total // 6)[0] == -signal.SIGKILL
    assert opd("resume", run)[0] == 0
    assert_same(record(run), record(tmp_path / "whole"))


def test_a_run_killed_between_its_summary_and_its_page_gets_its_page(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = "opd.journal.folder:RunFolder.write_summary"
    assert opd(*arguments(world, run), phase=summary, at=2)[0] == -signal.SIGKILL
    assert read_summary(run)["status"] == "done" and not (run / "report.html").exists()
    assert opd("resume", run)[0] == 0
    page = (run / "report.html").read_bytes()
    (run / "report.html").write_text("of a stop before")
    os.utime(run / "report.html", (0, 0))
    assert opd("resume", run)[0] == 0
    assert (run / "report.html").read_bytes() == page


# A gap that rounding makes: a guard with this bound speaks in the second step.
GUARD = {"guards__window": 4, "guards__policy_gap__nats": "1e-12", "guards__policy_gap__steps": 2}


def told(run: Path) -> list[int]:
    return [event["step"] for event in read_events(run) if event["kind"] == "guard"]


def test_a_guard_speaks_once_of_a_step_that_is_done_again(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = arguments(world, run, **GUARD, checkpoints__every=3)
    assert opd(*options, phase="opd.loop.synchronous:_bill", at=5)[0] == -signal.SIGKILL
    assert told(run) == [2] and not (run / "checkpoints").exists()
    assert opd("resume", run)[0] == 0
    assert told(run) == [2] and len(read_metrics(run)) == 6


@pytest.mark.parametrize("every", [2, 4], ids=["behind its checkpoint", "before any checkpoint"])
def test_a_guard_that_stops_is_heeded_after_a_kill_and_only_once(world: Path, tmp_path: Path, every: int) -> None:
    run = tmp_path / "run"
    options = arguments(world, run, **GUARD, guards__policy_gap__action="stop", checkpoints__every=every)
    assert opd(*options, phase="opd.wiring.session:Session._end", at=1)[0] == -signal.SIGKILL
    assert told(run) == [2] and read_summary(run) is None
    assert opd("resume", run)[0] == 75
    summary = read_summary(run)
    assert summary["status"] == "interrupted" and summary["steps"] == 2 and "policy_gap" in summary["stopped_by"]
    assert opd("resume", run)[0] == 0, "who goes on has been told"
    assert told(run) == [2] and read_summary(run)["steps"] == 6
