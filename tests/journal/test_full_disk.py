"""A full disk stops a run before anything is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opd.errors import EXIT_INTERRUPTED, Interrupted, OutOfSpace
from opd.journal.checkpoints import Checkpoints, Found
from opd.journal.reader import read_events, read_metrics, read_summary

# Writes until it is told that nothing fits any more, with each of the journal's ways to write in turn.
WRITER = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from opd.errors import OutOfSpace
from opd.journal import folder as module
from opd.journal.checkpoints import Checkpoints

module.JOURNAL_BYTES = 0  # the small disk would be refused at the start
LIMIT = int(sys.argv[2])
run = module.RunFolder.create(sys.argv[1], existing="refuse", config={}, config_hash="x")
made = Checkpoints(run.checkpoints)

def checkpoint(step, size):
    made.write(step, lambda folder: save_file({"a": np.zeros(size, np.uint8)}, folder / "a.safetensors"), {})

def python_checkpoint(step, size):
    made.write(step, lambda folder: (folder / "a.json").write_bytes(bytes(size)), {})

checkpoint(1, 1000)
run.write_summary({"schema_version": 1, "status": "done"})
if len(sys.argv) > 3:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
messages = []
for attempt in (
    lambda: checkpoint(2, 2 * LIMIT),
    lambda: python_checkpoint(2, 2 * LIMIT),
    lambda: checkpoint(1, 2 * LIMIT),
    lambda: run.write_summary({"schema_version": 1, "status": "x" * 2 * LIMIT}),
    lambda: run.write_view(1, {"text": "x" * 2 * LIMIT}),
    lambda: [run.log_step(step, step, {"filler": 1e300}) for step in range(1, LIMIT)],
    lambda: run.log_event(1, "stop", "x" * 2 * LIMIT),
):
    try:
        attempt()
        messages.append(None)
    except OutOfSpace as error:
        messages.append(str(error))
run.close()
print(json.dumps(messages))
"""


def check(path: Path, printed: str, limit: int) -> None:
    messages = json.loads(printed)
    names = ["step_000002", "step_000002", "step_000001", "summary.json", "step_000001.json", "metrics", "events"]
    for message, name in zip(messages, names, strict=True):
        assert message is not None and name in message and "Make room, then go on: opd resume" in message
    assert "File too large" in messages[0] or "No space left" in messages[0]
    made = Checkpoints(path / "checkpoints")
    found = made.newest_good()
    assert isinstance(found, Found) and found.step == 1 and not found.skipped
    assert [p.name for p in made.folder.iterdir()] == ["step_000001"]
    summary = read_summary(path)
    assert summary and summary["status"] == "done" and list((path / "views").iterdir()) == []
    lines = (path / "metrics.jsonl").read_bytes()
    rows = read_metrics(path)
    assert lines.endswith(b"\n") and [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and rows
    assert len(lines) <= limit
    assert (path / "events.jsonl").read_bytes() == b"" and read_events(path) == []
    assert not [p for p in path.rglob("*") if p.name.endswith(".tmp")]


def test_file_size_limit_of_the_system(tmp_path):
    path, limit = tmp_path / "run", 2**14
    command = [sys.executable, "-c", WRITER, str(path), str(limit), "limited"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    check(path, run.stdout, limit)
    assert (path / "metrics.jsonl").stat().st_size > 2**14 - 200, "what fits is written"


def test_disk_that_is_full(tmp_path):
    disk, limit = tmp_path / "disk", 2**18
    disk.mkdir()
    # The mount is the process's own and goes with it, so what is on it is copied before.
    script = (
        'mount -t tmpfs -o size="$3" none "$1" || exit 99; "$2" -c "$4" "$1/run" "$3" && cp -r "$1/run" "$5"; exit $?'
    )
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(disk), sys.executable, str(limit), WRITER]
    try:
        run = subprocess.run([*command, str(tmp_path / "copy")], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if run.returncode == 99 or "unshare" in run.stderr:
        pytest.skip("a disk can be mounted by root alone")
    assert run.returncode == 0, run.stderr
    check(tmp_path / "copy", run.stdout, limit)


def test_it_is_an_interruption_that_can_be_resumed():
    assert issubclass(OutOfSpace, Interrupted) and OutOfSpace("").exit_code == EXIT_INTERRUPTED


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    made = Checkpoints(tmp_path)
    with pytest.raises(PermissionError):
        made.write(1, lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")), {})
    with pytest.raises(RuntimeError, match="space"):
        made.write(1, lambda _: (_ for _ in ()).throw(RuntimeError("a space in the text")), {})
    assert os.listdir(tmp_path) == []
