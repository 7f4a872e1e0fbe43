"""A process that is killed anywhere inside a write leaves a checkpoint to go on from (R_4, R_5)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Forks a child for every place: it is killed before the n-th call that changes the disk, or after half of a write.
KILLER = '''
import builtins, io, json, os, shutil, signal, sys
from pathlib import Path
from opd.journal.checkpoints import Checkpoints, Found

os.fsync = lambda _: None  # a killed process loses nothing that it gave to the kernel; that they are called: elsewhere
CHANGES = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open", "truncate", "ftruncate", "pwrite")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Killer:
    """Counts places and kills at the n-th."""
    def __init__(self, at):
        self.at, self.count = at, 0
    def place(self):
        self.count += 1
        if self.count == self.at:
            die()
    def arm(self):
        for name in CHANGES:
            real = getattr(os, name)
            def killing(*args, _real=real, **rest):
                self.place()
                return _real(*args, **rest)
            setattr(os, name, killing)
        opened = builtins.open
        def opening(path, mode="r", *args, **rest):
            self.place()
            file = opened(path, mode, *args, **rest)
            if "w" in mode:
                whole = file.write
                class Half(io.RawIOBase):
                    def write(_, data):
                        whole(data[: len(data) // 2])
                        file.flush()
                        self.place()
                        return whole(data[len(data) // 2 :])
                    def __enter__(_): return _
                    def __exit__(_, *error): file.close()
                    def flush(_): file.flush()
                    def fileno(_): return file.fileno()
                return Half()
            return file
        builtins.open = opening

def fill(value):
    def inner(folder):
        for name in ("a.safetensors", "b/c.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            with open(folder / name, "wb") as file:
                file.write(str(value).encode() * 50)
    return inner

def started(folder):
    made = Checkpoints(folder)
    made.write(20, fill(20), {"value": 20})
    made.write(40, fill(40), {"value": 40})
    if action == "retain":
        made.write(60, fill(60), {"value": 60})
    return made

ACTIONS = {
    "new": lambda made: made.write(60, fill(60), {"value": 60}),
    "same step": lambda made: made.write(40, fill(41), {"value": 41}),
    "retain": lambda made: made.retain(2),
    "rewind": lambda made: made.drop_after(20),
    "first": lambda made: made.write(20, fill(20), {"value": 20}),
}

def after(folder):
    """What a later process finds: the facts, whether the files are theirs, the reasons; then writes itself."""
    made = Checkpoints(folder)
    found = made.newest_good()
    seen = {"skipped": list(found.skipped), "value": None}
    if isinstance(found, Found):
        seen["value"] = found.facts["value"]
        texts = [(found.path / name).read_text() for name in ("a.safetensors", "b/c.json")]
        seen["whole"] = texts == [str(found.facts["value"]) * 50] * 2
    made.write(80, fill(80), {"value": 80})
    made.retain(2)
    seen["left"] = sorted(path.name for path in folder.iterdir())
    seen["last"] = made.newest_good().facts["value"]
    return seen

root, action = Path(sys.argv[1]), sys.argv[2]
outcomes, at = [], 0
while True:
    at += 1
    folder = root / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    made = Checkpoints(folder) if action == "first" else started(folder)
    child = os.fork()
    if not child:
        Killer(at).arm()
        ACTIONS[action](made)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, status
        break
    outcomes.append(after(folder))
print(json.dumps(outcomes))
'''


@pytest.mark.parametrize(
    ("action", "allowed"),
    [("first", [None, 20]), ("new", [40, 60]), ("same step", [40, 41]), ("retain", [60]), ("rewind", [40, 20])],
)
def test_R_4_killed_anywhere_inside_a_write_a_whole_checkpoint_is_found(tmp_path: Path, action, allowed):
    run = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), action], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)
    assert len(outcomes) >= 10, "places"
    values = [outcome["value"] for outcome in outcomes]
    assert set(values) == set(allowed) and sorted(values, key=allowed.index) == values, "the old one, then the new"
    for outcome in outcomes:
        assert outcome["value"] is None or outcome["whole"], "the files are those of the facts"
        assert outcome["skipped"] == [], "nothing half-written looks like a checkpoint"
        assert outcome["last"] == 80
        assert all(name.startswith("step_0000") and len(name) == 11 for name in outcome["left"]), outcome["left"]
        assert len(outcome["left"]) <= 2
