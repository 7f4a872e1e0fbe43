"""The record goes back to where the checkpoint stands."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest

from opd.errors import DataError
from opd.journal import atomic
from opd.journal.checkpoints import Checkpoints, Found
from opd.journal.folder import RunFolder
from opd.journal.reader import read_evals, read_events, read_metrics, read_rollouts, read_summary, read_views
from tests.journal.parts import rollouts


def steps(run: RunFolder, first: int, last: int) -> None:
    """Writes what a run writes: evaluations before the first step and after every second one."""
    made = Checkpoints(run.checkpoints)
    if first == 1:
        evaluate(run, 0)
    for step in range(first, last + 1):
        run.log_step(step, step, {"loss": 1 / step})
        run.write_rollouts(step, rollouts(), str)
        run.write_view(step, {"schema_version": 1, "step": step})
        run.dump(step, "bad", {"loss": 1.0})
        made.write(step, lambda folder, step=step: (folder / "s.json").write_text(str(step)) and None, {"step": step})
        run.weights(step).mkdir()
        (run.weights(step) / "model.safetensors").write_text(str(step))
        if step % 2 == 0:
            evaluate(run, step)
    run.write_summary({"schema_version": 1, "status": "done"})
    run.final.mkdir()
    (run.final / "model.safetensors").write_bytes(b"weights")


def evaluate(run: RunFolder, step: int) -> None:
    for task in ("sort", "sums"):
        run.log_eval({"step": step, "task": task, "mean": step / 10})


def new(path: Path, last: int) -> Path:
    with RunFolder.create(path, existing="refuse", config={}, config_hash="x") as run:
        run.log_event(0, "start", "it starts")
        steps(run, 1, last)
        run.log_event(last, "stop", "it stops")
        run.best.mkdir()
    return path


def content(path: Path) -> dict[str, bytes]:
    names = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name not in ("run.lock", "events.jsonl"))
    return {str(p.relative_to(path)): p.read_bytes() for p in names}


def rewind(path: Path, step: int) -> None:
    with RunFolder.reopen(path) as run:
        run.rewind(step)


def test_rewound_and_gone_on_it_is_the_run_that_never_stopped(tmp_path):
    whole = content(new(tmp_path / "whole", 6))
    path = new(tmp_path / "run", 5)
    with RunFolder.reopen(path) as run:
        run.rewind(3)
        steps(run, 4, 6)
    assert content(path) == whole


def test_what_goes_and_what_stays(tmp_path):
    path = new(tmp_path / "run", 5)
    (path / "final.tmp").mkdir()
    (path / "notes.txt").write_text("mine")
    (path / "rollouts" / "step_000002.jsonl.gz.tmp").write_text("torn")
    (path / "rollouts" / "mine.txt").write_text("mine")
    before = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    rewind(path, 3)
    assert (path / "metrics.jsonl").read_bytes() == b"".join(before[:3]), "the lines that stay are not written anew"
    assert [row["step"] for row in read_evals(path)] == [0, 0, 2, 2]
    assert sorted({row["step"] for row in read_rollouts(path)}) == [1, 2, 3]
    assert [step for step, _ in read_views(path)] == [1, 2, 3]
    for name in ("checkpoints", "weights"):
        assert sorted(p.name for p in (path / name).iterdir()) == [f"step_00000{n}" for n in (1, 2, 3)]
    assert sorted(p.name for p in (path / "rollouts").iterdir())[0] == "mine.txt"
    assert len(list((path / "rollouts").iterdir())) == 4 and len(list((path / "dumps").iterdir())) == 3
    assert read_summary(path) is None and not (path / "final").exists() and not (path / "final.tmp").exists()
    assert (path / "notes.txt").exists() and (path / "best").exists()
    assert [event["kind"] for event in read_events(path)] == ["start", "stop"], "the history stays"


def test_back_to_before_everything(tmp_path):
    path = new(tmp_path / "run", 3)
    rewind(path, -1)
    assert read_metrics(path) == read_evals(path) == read_views(path) == list(read_rollouts(path)) == []
    assert list((path / "checkpoints").iterdir()) == []
    rewind(path, -1)
    assert [event["kind"] for event in read_events(path)] == ["start", "stop"]


def test_torn_last_line_goes_and_a_line_without_its_end_stays(tmp_path):
    path = new(tmp_path / "run", 3)
    file = path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"schema_version":1,"st')
    with pytest.warns(UserWarning, match="incomplete"):
        rewind(path, 3)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])
    rewind(path, 3)
    assert file.read_bytes() == whole


def test_broken_line_in_the_middle_is_not_thrown_away_silently(tmp_path):
    path = new(tmp_path / "run", 3)
    file = path / "metrics.jsonl"
    file.write_bytes(b"{broken\n" + file.read_bytes())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1"):
        rewind(path, 3)


def test_killed_anywhere_the_same_call_does_the_rest(tmp_path, monkeypatch):
    """Interrupted at its n-th change to the disk, for all n, and then called again."""
    start = new(tmp_path / "start", 4)
    done = tmp_path / "done"
    shutil.copytree(start, done)
    rewind(done, 2)
    real = {name: getattr(atomic.os, name) for name in ("replace", "unlink", "rmdir")}
    left = 0

    def change(name, *args, **rest):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real[name](*args, **rest)

    monkeypatch.setattr(atomic.os, "fsync", lambda _: None)
    for at in range(1000):
        path = tmp_path / f"run{at}"
        shutil.copytree(start, path)
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(atomic.os, name, functools.partial(change, name))
            left = at
            try:
                rewind(path, 2)
            except KeyboardInterrupt:
                pass
            else:
                break
        lines, evals = read_metrics(path), read_evals(path)
        newest = Checkpoints(path / "checkpoints").newest_good()
        assert isinstance(newest, Found) and newest.skipped == ()
        assert len(lines) >= newest.step, "no checkpoint is ahead of its record"
        assert len(evals) >= 4
        rewind(path, 2)
        assert {k: v for k, v in content(path).items() if not k.endswith(".tmp")} == content(done)
    assert 20 < at < 999


def test_lines_are_on_the_disk_before_a_checkpoint_is(tmp_path, monkeypatch):
    synced: list[str] = []
    with RunFolder.create(tmp_path / "run", existing="refuse", config={}, config_hash="x") as run:
        run.log_step(1, 1, {})
        run.log_event(1, "guard", "it grows")
        real = atomic.os.fsync
        monkeypatch.setattr(
            atomic.os, "fsync", lambda fd: (synced.append(atomic.os.readlink(f"/proc/self/fd/{fd}")), real(fd))[1]
        )
        run.sync()
        monkeypatch.undo()
    assert synced == [str(run.path / "metrics.jsonl"), str(run.path / "events.jsonl"), str(run.path)]
    assert json.loads((run.path / "metrics.jsonl").read_text())["step"] == 1
