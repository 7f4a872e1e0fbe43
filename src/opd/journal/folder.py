"""The run folder: the record of a run, of which everything shown to a person is a view.

run.lock          says that the folder is ours; locked while a process writes
config.json       the resolved config; `opd train config.json` replays the run
environment.json  versions, threads, device, hash of the config
metrics.jsonl     one line for every step
rollouts/         step_000123.jsonl.gz: what the student wrote
evals.jsonl       one line for every evaluation
dumps/            what a bad step looked like
summary.json      written at the end
final/            the trained model, as transformers loads it
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.errors import ConfigError
from opd.journal.atomic import write_atomic
from opd.journal.records import SCHEMA_VERSION, line, plain, rollout_row, to_json
from opd.types import Rollout

LOCK = "run.lock"
MARK = to_json({"format": "opd-run", "schema_version": SCHEMA_VERSION})
SETTINGS = ("config.json", "environment.json")
RESULTS = ("metrics.jsonl", "evals.jsonl", "summary.json", "rollouts", "dumps", "final")
JOURNAL_BYTES = 64 * 2**20  # room that metrics, evals and some steps of rollouts need in any case


class RunFolder:
    """The one writer of a run folder; a context manager that gives the lock back."""

    def __init__(self, path: Path, lock: int):
        self.path = path
        self._lock: int | None = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        overwrite: bool,
        config: Mapping[str, Any],
        config_hash: str,
        environment: Mapping[str, Any] | None = None,
        needed_bytes: int = 0,
    ) -> RunFolder:
        """Makes the folder, or takes over one whose run wrote no results yet, and writes config and environment.

        With `overwrite` the results of an earlier run are deleted: the names in `RESULTS`, nothing else.
        `environment` is what only the caller knows (opd and torch versions, threads, device); no host or user names.
        `needed_bytes` is what the run will write besides its journal (the final model).
        Raises ConfigError when the folder cannot be used; see `check`.
        """
        folder = Path(path).expanduser()
        check(folder, overwrite=overwrite, config=config, needed_bytes=needed_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"run.folder={folder}: cannot write there ({error.strerror}); choose another") from error
        try:
            _take(lock, folder)
            os.pwrite(lock, MARK, 0)
            if overwrite:
                for name in RESULTS:
                    _delete(folder / name)
            machine = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
            about = {"schema_version": SCHEMA_VERSION, "config_hash": config_hash, **machine, **(environment or {})}
            write_atomic(folder / "environment.json", _pretty(about))
            write_atomic(folder / "config.json", _pretty(config))
        except BaseException:
            os.close(lock)
            raise
        return cls(folder, lock)

    def log_step(self, step: int, policy_version: int, numbers: Mapping[str, float | int | bool | None]) -> None:
        """Appends one line to `metrics.jsonl`: step, the version the student has after it, and plain numbers."""
        assert not {"step", "policy_version"} & numbers.keys()
        self._append("metrics.jsonl", {"step": step, "policy_version": policy_version, **numbers})

    def log_eval(self, record: Mapping[str, Any]) -> None:
        """Appends one line to `evals.jsonl`."""
        self._append("evals.jsonl", record)

    def write_rollouts(
        self, step: int, rollouts_N: Sequence[Rollout], decode: Callable[[NDArray[np.int64]], str]
    ) -> Path:
        """Writes `rollouts/step_000123.jsonl.gz`; `decode` turns token ids into text for people to read."""
        prompts = {rollout.prompt.id: decode(rollout.prompt.ids) for rollout in rollouts_N}
        rows = [rollout_row(r, prompts[r.prompt.id], decode(r.response_ids)) for r in rollouts_N]
        path = self._file("rollouts", f"step_{step:06d}.jsonl.gz")
        # mtime=0: the same rollouts give the same bytes. Level 3: level 9 takes four times as long and saves 6 %.
        write_atomic(path, gzip.compress(b"".join(map(to_json, rows)), compresslevel=3, mtime=0))
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, made by `records.summary_record`."""
        write_atomic(self.path / "summary.json", _pretty(summary))

    def dump(self, step: int, name: str, payload: Mapping[str, Any]) -> Path:
        """Writes `dumps/step_000123_<name>.json`: numbers, texts, arrays or tensors of a step that went wrong."""
        path = self._file("dumps", f"step_{step:06d}_{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json")
        write_atomic(path, _pretty({"schema_version": SCHEMA_VERSION, "step": step, **payload}))
        return path

    @property
    def final(self) -> Path:
        """Where the trained model belongs."""
        return self.path / "final"

    def close(self) -> None:
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing alone would leave it with a forked child
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        assert self._lock is not None, "the folder is closed"
        with open(self.path / name, "ab", buffering=0) as file:
            data = to_json(line(record))
            written = file.write(data)
            if written != len(data):
                raise OSError(f"{self.path / name}: only {written} of {len(data)} bytes fit; is the disk full?")

    def _file(self, folder: str, name: str) -> Path:
        assert self._lock is not None, "the folder is closed"
        (self.path / folder).mkdir(exist_ok=True)
        return self.path / folder / name


def check(path: str | Path, *, overwrite: bool, config: Mapping[str, Any], needed_bytes: int = 0) -> int:
    """Whether a run could be written to `path`; changes nothing. Returns the free bytes there.

    Raises ConfigError when it is no folder, holds files of others, holds another run's results and `overwrite` is
    off, holds a file that `config` reads and that `overwrite` would delete, cannot be written, or is short of space.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.folder={folder} is a file; name a folder")
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run.folder={folder}: {existing} cannot be written to; choose another")

    names = {entry.name for entry in folder.iterdir()} - {LOCK} if folder.exists() else set()
    if names and not is_run_folder(folder):
        some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"run.folder={folder} holds files that are no run of opd ({some}); they are left alone. Name a new folder"
        )
    results = sorted(names & set(RESULTS))
    if results and not overwrite:
        raise ConfigError(
            f"run.folder={folder} already holds a run ({', '.join(results)}). "
            f"Choose another run.folder=..., or delete that run with run.overwrite=true"
        )
    for key, value in _strings(config):
        inside = _inside(value, folder)
        if inside is not None and inside.parts[0] in results:
            raise ConfigError(
                f"{key}={value} is part of the run in run.folder={folder}, which run.overwrite=true would delete. "
                f"Choose another run.folder=..."
            )

    free = shutil.disk_usage(existing).free
    needed = needed_bytes + JOURNAL_BYTES
    if free < needed:
        raise ConfigError(
            f"run.folder={folder}: the run needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            f"make room or choose another folder"
        )
    return free


def is_run_folder(path: str | Path) -> bool:
    """Whether opd made this folder."""
    try:
        return json.loads((Path(path) / LOCK).read_bytes()).get("format") == "opd-run"
    except (OSError, ValueError, AttributeError):
        return False


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"run.folder={folder}: another process is writing there; wait for it or choose another run.folder=..."
        ) from error
    except OSError as error:  # some network file systems have no locks; a run there is better than none
        warnings.warn(f"{folder} cannot be locked ({error.strerror}); start only one run in it", stacklevel=3)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # a link goes, what it points to stays


def _inside(value: str, folder: Path) -> Path | None:
    """The part of path `value` below `folder`, or None when it names nothing there."""
    if not value or not os.path.exists(value):
        return None
    try:
        below = Path(value).resolve().relative_to(folder.resolve())
    except ValueError:
        return None
    return below if below.parts else None


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _strings(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _strings(part, f"{key}.{index}")


def _pretty(value: Mapping[str, Any]) -> bytes:
    return json.dumps(plain(value), indent=2, ensure_ascii=True, allow_nan=False).encode() + b"\n"
