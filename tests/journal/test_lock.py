"""One process writes a run folder at a time, and a dead one does not keep it."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.journal import lock as lock_module
from opd.journal.folder import RunFolder
from opd.journal.lock import LOCK, Lock, is_run_folder
from opd.journal.reader import read_metrics, read_summary

WRITER = """
import fcntl, sys
if "no-locks" in sys.argv:
    def flock(*_):
        raise OSError(38, "Function not implemented")
    fcntl.flock = flock
from opd.journal.folder import RunFolder
run = RunFolder.create(sys.argv[1], existing="refuse", config={}, config_hash="x")
print("locked", flush=True)
step = 0
while True:
    step += 1
    run.log_step(step, step, {f"metric_{i}": 1 / step for i in range(300)})
    run.write_summary({"schema_version": 1, "status": "done", "steps": step, "filler": "x" * 20000})
"""
HERE = platform.node()


def start_writer(path: Path, *options: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), *options], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"locked\n"
    return process


def create(path: Path) -> RunFolder:
    return RunFolder.create(path, existing="overwrite", config={}, config_hash="x")


def leave(path: Path, **owner: object) -> None:
    """A folder whose last owner did not give it back."""
    create(path).close()
    found = json.loads((path / LOCK).read_bytes())
    (path / LOCK).write_text(json.dumps({**found, "released": False, "started": None, **owner}))


def not_there(*_):
    raise OSError(38, "Function not implemented")


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr(lock_module.fcntl, "flock", not_there)


def test_second_process_is_refused_and_a_killed_one_leaves_no_lock_and_no_half_line(tmp_path):
    path = tmp_path / "run"
    process = start_writer(path)
    try:
        for take in (create, RunFolder.reopen):
            with pytest.raises(ConfigError, match=rf"another process \(pid {process.pid} on {re.escape(HERE)}\)"):
                take(path)
        while not read_summary(path):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    rows = read_metrics(path)
    summary = read_summary(path)
    assert rows and [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert summary and len(rows) - summary["steps"] in (0, 1)
    RunFolder.reopen(path).close()


def test_where_there_are_no_locks_the_file_says_who_is_alive(tmp_path, no_locks):
    path = tmp_path / "run"
    process = start_writer(path, "no-locks")
    try:
        with pytest.raises(ConfigError, match=rf"pid {process.pid} on {re.escape(HERE)}"):
            create(path)
    finally:
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10  # it has ended, and nobody has waited for it yet
    while "Z" not in Path(f"/proc/{process.pid}/stat").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    RunFolder.reopen(path).close()
    process.communicate()
    RunFolder.reopen(path).close()


@pytest.mark.parametrize("locks", [True, False])
def test_same_process_cannot_open_a_folder_twice(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(lock_module.fcntl, "flock", not_there)
    with create(tmp_path / "run"), pytest.raises(ConfigError, match="another process"):
        create(tmp_path / "run")
    create(tmp_path / "run").close()


def test_pid_that_belongs_to_somebody_else_by_now_does_not_keep_the_folder(tmp_path, no_locks):
    leave(tmp_path / "run", pid=os.getpid(), host=HERE, started="another boot/1")
    create(tmp_path / "run").close()
    leave(tmp_path / "run", pid=os.getpid(), host=HERE, started=lock_module._started(os.getpid()))
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        create(tmp_path / "run")


def test_owner_on_another_machine_is_warned_about_and_without_locks_refused(tmp_path, monkeypatch):
    path = tmp_path / "run"
    leave(path, pid=12, host="elsewhere")
    with pytest.warns(UserWarning, match="process 12 on elsewhere never gave it back"):
        create(path).close()
    leave(path, pid=12, host="elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr(lock_module.fcntl, "flock", not_there)
        with pytest.raises(ConfigError, match=rf"process 12 on elsewhere .* delete {re.escape(str(path / LOCK))}"):
            create(path)
        (path / LOCK).unlink()  # what the message says
        create(path).close()


def test_child_that_holds_the_folder_of_a_dead_process_is_told_apart(tmp_path):
    path = tmp_path / "run"
    with create(path):
        (path / LOCK).write_bytes(lock_module._content({"pid": os.getpid(), "host": HERE, "started": "before/1"}))
        with pytest.raises(ConfigError, match=f"process {os.getpid()} has ended, but another process that it started"):
            create(path)


def test_lock_that_is_given_back_names_nobody(tmp_path):
    with create(tmp_path / "run") as run:
        found = json.loads((run.path / LOCK).read_bytes())
        assert (found["pid"], found["host"], found["released"]) == (os.getpid(), HERE, False)
    assert json.loads((run.path / LOCK).read_bytes()) == {
        "format": "opd-run",
        "schema_version": 1,
        "pid": None,
        "host": None,
        "started": None,
        "released": True,
    }
    run.close()


@pytest.mark.parametrize(
    "torn", [b"", b"\0" * 512, b'{"format":"opd-run","sche', b'{"format":"opd-run","schema_version":1}\n']
)
def test_torn_lock_leaves_the_folder_ours(tmp_path, torn):
    path = tmp_path / "run"
    create(path).close()
    (path / LOCK).write_bytes(torn)
    assert is_run_folder(path)
    with RunFolder.reopen(path) as run:
        run.log_step(1, 1, {})
    assert json.loads((path / LOCK).read_bytes())["released"]


def test_start_of_a_torn_lock_is_enough(tmp_path):
    (tmp_path / LOCK).write_bytes(b'{"format":"opd-run","sche')
    assert is_run_folder(tmp_path)


def test_torn_lock_alone_makes_no_foreign_folder_ours(tmp_path):
    (tmp_path / LOCK).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "environment.json").write_text("[1]")
    assert not is_run_folder(tmp_path)


def test_lock_is_given_back_when_the_folder_cannot_be_used_after_all(tmp_path, monkeypatch):
    def broken(*_):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_config", broken)
        with pytest.raises(ConfigError, match=r"cannot write there \(Permission denied\)"):
            create(path)
    assert json.loads((path / LOCK).read_bytes())["released"]
    lock = Lock.take(path)
    lock.release()
    lock.release()
