"""`opd resume`: damaged checkpoints, what may change and what may not, and who may write."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from opd.journal.reader import read_events, read_metrics, read_rollouts, read_summary
from tests.cli.test_train import refused
from tests.resume.killed import assert_same, opd, record, run_here
from tests.resume.runs import arguments


@pytest.fixture(scope="module")
def killed(world: Path, tmp_path_factory) -> tuple[Path, dict]:
    """A run that was killed in its last step, with checkpoints of steps 2 and 4; and the record of a whole one."""
    folder = tmp_path_factory.mktemp("going_on")
    code, total = opd(*arguments(world, folder / "whole"), phase="update")
    assert code == 0
    assert opd(*arguments(world, folder / "killed"), phase="update", at=total - 1)[0] == -signal.SIGKILL
    assert [p.name for p in sorted((folder / "killed" / "checkpoints").iterdir())] == ["step_000002", "step_000004"]
    return folder / "killed", record(folder / "whole")


@pytest.fixture
def run(killed, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed[0], tmp_path / "run"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped byte": lambda folder: flip(folder / "optimizer.safetensors"),
    "a truncated file": lambda folder: os.truncate(folder / "student.safetensors", 100),
    "a missing file": lambda folder: (folder / "learner.json").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a pickle": lambda folder: (folder / "extra.pt").write_bytes(b"\x80\x04."),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_R_7_a_damaged_checkpoint_is_passed_over_and_the_one_before_gives_the_same_run(killed, run, damage) -> None:
    DAMAGE[damage](run / "checkpoints" / "step_000004")
    assert opd("resume", run)[0] == 0
    (said,) = [event["message"] for event in read_events(run) if event["kind"] == "checkpoint_skipped"]
    assert "step_000004" in said
    assert "checkpoints/step_000002" in [e["message"] for e in read_events(run) if e["kind"] == "resume"][-1]
    assert_same(record(run), killed[1])


def test_R_7_with_every_checkpoint_damaged_the_run_begins_again_and_says_so(killed, run) -> None:
    for step in (2, 4):
        flip(run / "checkpoints" / f"step_{step:06d}" / "student.safetensors")
    assert opd("resume", run)[0] == 0
    assert sum(event["kind"] == "checkpoint_skipped" for event in read_events(run)) == 2
    assert_same(record(run), killed[1])


def test_a_run_killed_before_its_first_checkpoint_begins_again(world, killed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert opd(*arguments(world, run), phase="scoring", at=3)[0] == -signal.SIGKILL
    assert not (run / "checkpoints").exists()
    assert opd("resume", run)[0] == 0
    assert_same(record(run), killed[1])


def test_the_second_start_on_one_folder_is_refused_while_the_first_lives(world, killed, tmp_path: Path) -> None:
    run = tmp_path / "run"
    context = multiprocessing.get_context("forkserver")
    counted = context.Value("l", 0)
    items = [str(a) for a in arguments(world, run)]
    first = context.Process(target=run_here, args=(items, "update", 9, signal.SIGSTOP, counted))
    first.start()
    try:
        while counted.value < 9:
            time.sleep(0.02)
        before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
        assert opd("resume", run)[0] == 2
        assert opd(*arguments(world, run, run__existing="overwrite"))[0] == 2
        assert opd(*arguments(world, run, run__existing="resume"))[0] == 2
        assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert_same(record(run), killed[1])


def test_train_with_existing_resume_is_what_a_scheduler_calls_again_and_again(world, killed, run) -> None:
    again = arguments(world, run, run__existing="resume")
    assert opd(*again)[0] == 0
    assert_same(record(run), killed[1])
    before = (run / "summary.json").read_bytes()
    assert opd(*again)[0] == 0, "a finished run is left as it is"
    assert (run / "summary.json").read_bytes() == before


def test_without_a_terminal_a_run_that_is_there_is_refused_and_the_ways_on_are_named(world, run, capsys) -> None:
    said = refused(capsys, *arguments(world, run))
    assert "run.existing=resume" in said and "overwrite" in said
    assert (run / "checkpoints" / "step_000004").exists()


def test_more_steps_are_as_if_they_had_been_asked_for_at_once(world, tmp_path: Path) -> None:
    plain = {"optim__schedule": "constant", "checkpoints__best": "false"}
    assert opd(*arguments(world, tmp_path / "long", **plain))[0] == 0
    assert opd(*arguments(world, tmp_path / "short", **plain, run__steps=3))[0] == 0
    assert opd("resume", tmp_path / "short", "run.steps=6")[0] == 0
    ours, theirs = record(tmp_path / "short"), record(tmp_path / "long")
    for kept in (ours, theirs):  # the short run looked at its own last step, too
        kept["evals.jsonl"] = [line for line in kept["evals.jsonl"] if line["step"] != 3]
    assert_same(ours, theirs)
    assert json.loads((tmp_path / "short" / "config.json").read_text())["run"]["steps"] == 6
    assert "run.steps changes from 3 to 6" in [event["message"] for event in read_events(tmp_path / "short")]


def test_options_that_the_steps_so_far_depend_on_must_stay(run, capsys) -> None:
    said = refused(capsys, "resume", run, "sampling.temperature=0.7")
    assert "sampling.temperature=0.7" in said and "1.0" in said
    assert (run / "checkpoints" / "step_000004").exists(), "nothing was touched"


def test_R_3_other_data_or_another_teacher_is_refused(world, run, tmp_path: Path, capsys) -> None:
    prompts = world / "prompts.jsonl"
    text = prompts.read_text()
    try:
        prompts.write_text(text.replace("What is 0 + 0?", "What is 0 - 0?"))
        assert "training prompts changed" in refused(capsys, "resume", run)
    finally:
        prompts.write_text(text)
    weights = world / "teacher" / "model.safetensors"
    data = weights.read_bytes()
    try:
        from safetensors.torch import load_file, save_file

        changed = load_file(weights)
        changed["model.norm.weight"] *= 1.01
        save_file(changed, weights, metadata={"format": "pt"})
        assert "the teacher changed" in refused(capsys, "resume", run)
    finally:
        weights.write_bytes(data)
    assert opd("resume", run)[0] == 0


def test_another_machine_is_named_and_does_not_stop_the_run(run, capsys) -> None:
    about = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps({**about, "cpu_capability": "ABACUS"}))
    assert opd("resume", run)[0] == 0
    said = [event["message"] for event in read_events(run)]
    assert any("cpu_capability was ABACUS" in text and "not bit for bit" in text for text in said)


def test_what_came_after_the_checkpoint_is_not_in_the_record_twice(killed, run) -> None:
    assert opd("resume", run)[0] == 0
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    ids = [row["id"] for row in read_rollouts(run)]
    assert len(ids) == len(set(ids)) == 6 * 4 * 2
    summary = read_summary(run)
    assert summary["resumes"] == 1 and summary["status"] == "done"
    assert summary["tokens"] == sum(line["trained_tokens"] for line in read_metrics(run))


def test_resume_takes_no_config_file_and_no_other_folder(world, tmp_path: Path, capsys) -> None:
    assert "no run folder" in refused(capsys, "resume", world)
    assert "does not exist" in refused(capsys, "resume", tmp_path / "nowhere")
    assert "the run's own config" in refused(capsys, "resume", tmp_path, "recipe.yaml")


def test_R_1_no_step_draws_from_a_global_generator(world, killed, tmp_path: Path, monkeypatch) -> None:
    """So that there is no generator whose state a checkpoint would have to hold."""
    import random

    import numpy as np
    import torch

    from opd.loop import synchronous
    from tests.cli.test_train import opd as here

    whole = synchronous.answer_metrics

    def stirred(*args, **kwargs):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(os.getpid() % 1000)
        return whole(*args, **kwargs)

    monkeypatch.setattr(synchronous, "answer_metrics", stirred)
    threads = torch.get_num_threads()
    try:
        assert here(*arguments(world, tmp_path / "run")) == 0
    finally:
        torch.set_num_threads(threads)
    assert_same(record(tmp_path / "run"), killed[1])
