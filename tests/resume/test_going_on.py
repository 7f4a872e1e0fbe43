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


@pytest.mark.parametrize("made", [False, True])
def test_the_first_of_a_schedulers_calls_begins_the_run(world, killed, tmp_path: Path, made: bool) -> None:
    run = tmp_path / "run"
    if made:
        run.mkdir()
    assert opd(*arguments(world, run, run__existing="resume"))[0] == 0
    assert_same(record(run), killed[1])


def test_another_recipe_is_not_told_that_the_run_in_its_folder_is_done(world, run, capsys) -> None:
    assert opd("resume", run)[0] == 0
    said = refused(capsys, *arguments(world, run, run__existing="resume", optim__warmup_steps=1))
    assert "optim.warmup_steps=1" in said and "started with 2" in said


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


@pytest.mark.parametrize("gone", [True, False])
def test_a_trained_student_is_not_deleted_to_begin_again(run, capsys, gone: bool) -> None:
    """Checkpoints of a run that is done are what people delete first."""
    assert opd("resume", run)[0] == 0
    for folder in (run / "checkpoints").iterdir():
        flip(folder / "student.safetensors")
    if gone:
        shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != "run.lock"}
    said = refused(capsys, "resume", run, "run.steps=8")
    assert "final/" in said and ("there is none" if gone else "passed over") in said
    assert all(path.read_bytes() == data for path, data in before.items())


def test_fewer_steps_than_there_are_is_no_way_to_end_a_run(run, capsys) -> None:
    """Its last evaluation would be of a step that is not its last."""
    assert "has 4 steps behind it" in refused(capsys, "resume", run, "run.steps=3")


def test_a_changed_option_is_no_second_resume(run) -> None:
    for n, option in enumerate(("run.log_every=2", "run.steps=7", "run.steps=8"), 1):
        assert opd("resume", run, option)[0] == 0
        assert read_summary(run)["resumes"] == n


def test_the_best_student_is_of_the_steps_that_are_in_the_record(world, tmp_path: Path) -> None:
    """Steps that a kill took back are done again with another rate: what they had kept is not theirs any more."""
    run, plain = tmp_path / "run", {"checkpoints__every": 3, "checkpoints__weights_every": 2, "evals__every": 2}
    assert opd(*arguments(world, run, **plain), phase="update", at=10**6)[0] == 0
    shutil.rmtree(run / "checkpoints" / "step_000006")
    shutil.rmtree(run / "final")  # as if killed after the evaluation of step 4
    (run / "summary.json").unlink()
    mark = {"step": 4, "task": "sums", "mean": 0.0}
    shutil.copytree(run / "weights" / "step_000004", run / "best", dirs_exist_ok=True)
    (run / "best" / "opd.json").write_text(json.dumps(mark))
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    for line in lines:  # step 4 is going to be the best again
        line["mean"] = -1.0 if line["step"] == 2 else line["mean"]
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert opd("resume", run, "optim.lr=1e-3")[0] == 0
    best = json.loads((run / "best" / "opd.json").read_text())["step"]
    same = [(run / kept / "model.safetensors").read_bytes() for kept in ("best", f"weights/step_{best:06d}")]
    assert best == 4 and same[0] == same[1]


def test_a_run_goes_on_where_its_own_checkpoints_fill_the_disk(run, monkeypatch, capsys) -> None:
    from opd.journal import folder
    from opd.wiring.run import needed_bytes
    from opd.wiring.starting import stored
    from tests.cli.test_train import opd as here

    kept = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
    needed = folder.JOURNAL_BYTES + needed_bytes(stored(run))
    usage = shutil.disk_usage(run)
    for free in (needed - kept - 1, needed - kept):
        monkeypatch.setattr(folder.shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free < needed - kept:
            assert "make room" in refused(capsys, "resume", run)
    assert here("resume", str(run)) == 0


def test_options_that_the_steps_so_far_depend_on_must_stay(run, capsys) -> None:
    said = refused(capsys, "resume", run, "sampling.temperature=0.7")
    assert "sampling.temperature=0.7" in said and "1.0" in said
    assert (run / "checkpoints" / "step_000004").exists(), "nothing was touched"
    said = refused(capsys, "resume", run, "objective.preset=forward_kl")
    assert "objective.preset=forward_kl" in said and "reverse_kl" in said, "as it was typed, not what follows from it"


def test_options_for_a_run_that_is_done_are_named(run, capsys) -> None:
    from tests.cli.test_train import opd as here

    assert opd("resume", run)[0] == 0
    assert here("resume", str(run), "checkpoints.keep=5") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "checkpoints.keep: not looked at" in printed and "all 6 steps are done" in printed


def test_R_3_other_data_or_another_teacher_is_refused(world, run, tmp_path: Path, capsys) -> None:
    prompts = world / "prompts.jsonl"
    text = prompts.read_text()
    try:
        prompts.write_text(text.replace("What is 0 + 0?", "What is 0 - 0?"))
        assert "training prompts changed" in refused(capsys, "resume", run)
    finally:
        prompts.write_text(text)
    about = (run / "config.json").read_bytes()
    try:
        prompts.write_text(text.replace("What is 0 + 0?", "What is 0 - 0?"))
        assert "training prompts changed" in refused(capsys, "resume", run, "run.steps=9")
        assert (run / "config.json").read_bytes() == about, "who is refused has changed nothing"
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
