"""One process writes a run folder at a time: `run.lock` says that the folder is ours and who is at work in it.

The lock is an flock, which the kernel gives back however the process ends. What the file says about its owner is for
the message of a refusal, and decides where a file system has no locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from opd.errors import ConfigError
from opd.journal.atomic import room_for, sync
from opd.journal.records import SCHEMA_VERSION, to_json

LOCK = "run.lock"
MARK = b'{"format":"opd-run"'  # first in the file, so that a torn rest leaves the folder ours
SIZE = 512  # written over in place and at once: a rename would leave two processes with a lock each
ENDED = "ended"


class Owner(TypedDict):
    """Who took the lock. `started` tells a process from a later one with the same pid; None where it is not known."""

    pid: int | None
    host: str | None
    started: str | None
    released: bool


class Lock:
    """The right to write one run folder."""

    def __init__(self, opened: int) -> None:
        self._opened: int | None = opened

    @classmethod
    def take(cls, folder: Path) -> Lock:
        """Takes the lock of a folder that exists, also from an owner that died.

        Raises ConfigError when another process holds it, or may hold it where the file system has no locks. Warns when
        the last owner was on another machine and never gave it back.
        """
        path = folder / LOCK
        opened = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            locks = True
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(_held(folder, owner_of(opened))) from error
            except OSError:  # some network file systems have none
                locks = False
            owner = owner_of(opened)
            if owner is not None and not owner["released"]:
                elsewhere = owner["host"] != platform.node()
                if elsewhere and locks:
                    warnings.warn(
                        f"{folder}: process {owner['pid']} on {owner['host']} never gave it back. "
                        f"Make sure that it has ended",
                        stacklevel=3,
                    )
                elif elsewhere:
                    raise ConfigError(
                        f"run.folder={folder}: process {owner['pid']} on {owner['host']} has not given it back, and "
                        f"this file system has no locks. Make sure that it has ended, then delete {path}"
                    )
                elif not locks and is_alive(owner):
                    raise ConfigError(_held(folder, owner))
            _write(opened, path, {"pid": os.getpid(), "host": platform.node(), "started": _started(os.getpid())})
            sync(folder)
        except BaseException:
            os.close(opened)
            raise
        return cls(opened)

    def release(self) -> None:
        """Gives it back; the file stays, without the owner's name. Safe to call twice."""
        if self._opened is not None:
            with suppress(OSError):  # a disk that went away keeps nobody from ending
                os.pwrite(self._opened, _content({}), 0)
                fcntl.flock(self._opened, fcntl.LOCK_UN)  # closing alone would leave it with a forked child
            os.close(self._opened)
            self._opened = None


def is_run_folder(path: str | Path) -> bool:
    """Whether opd made this folder. A lock that is torn or was deleted does not make it foreign."""
    folder = Path(path)
    try:
        if (folder / LOCK).read_bytes().startswith(MARK):
            return True
    except OSError:
        pass
    try:
        about = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(about, dict) and {"schema_version", "config_hash"} <= about.keys()


def _held(folder: Path, owner: Owner | None) -> str:
    if owner is None or owner["released"]:
        return f"run.folder={folder}: another process is writing there; wait for it or choose another run.folder=..."
    if owner["host"] == platform.node() and not is_alive(owner):
        return (
            f"run.folder={folder}: process {owner['pid']} has ended, but another process that it started still holds "
            f"the folder; end that one or choose another run.folder=..."
        )
    return (
        f"run.folder={folder}: another process (pid {owner['pid']} on {owner['host']}) is writing there; "
        f"wait for it or choose another run.folder=..."
    )


def owner_of(opened: int) -> Owner | None:
    try:
        found = json.loads(os.pread(opened, SIZE, 0))
        owner = Owner(pid=found["pid"], host=found["host"], started=found["started"], released=found["released"])
    except (ValueError, KeyError, TypeError):
        return None  # torn, or written before locks had owners
    return owner if owner["released"] or isinstance(owner["pid"], int) else None


def _write(opened: int, path: Path, owner: dict[str, int | str | None]) -> None:
    with room_for(path):
        os.pwrite(opened, _content(owner), 0)
        os.fsync(opened)


def _content(owner: dict[str, int | str | None]) -> bytes:
    """The whole file; without an owner it says that nobody is at work."""
    nobody = {"pid": None, "host": None, "started": None, "released": not owner}
    data = to_json({"format": "opd-run", "schema_version": SCHEMA_VERSION, **nobody, **owner})
    assert data.startswith(MARK) and len(data) <= SIZE
    return data[:-1].ljust(SIZE - 1) + b"\n"


def is_alive(owner: Owner) -> bool:
    """Whether the owner, on this machine, still runs; its pid may belong to somebody else by now."""
    pid = owner["pid"]
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as somebody else
    started = _started(pid)
    return started is None or owner["started"] in (None, started)


def _started(pid: int) -> str | None:
    """When machine and process started, as Linux tells it; ENDED for one that nobody has waited for yet."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The command's name stands in brackets and may hold anything; behind it come the state and 19 more numbers.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return ENDED if fields[0] in "ZX" else f"{boot}/{fields[19]}"
    except (OSError, IndexError):
        return None
