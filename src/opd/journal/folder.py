"""The run folder: the record of a run, of which everything shown to a person is a view.

run.lock          says that the folder is ours; locked while a process writes
config.json       the resolved config; `opd train config.json` replays the run
environment.json  versions, threads, device, hash of the config
metrics.jsonl     one line for every step
rollouts/         step_000123.jsonl.gz: what the student wrote
evals.jsonl       one line for every evaluation
events.jsonl      one line for everything that is no step: started, continued, a guard that fired
views/            step_000123.json: answers looked at token by token, as `graded.py` describes them
dumps/            what a bad step looked like
checkpoints/      what the run is continued from, see `checkpoints.py`
weights/ best/    models that were kept on the way, as transformers loads them
summary.json      written at the end
report.html       a view of all this
final/            the trained model
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from opd.errors import ConfigError
from opd.journal.atomic import TEMPORARY, append_line, discard, sync, write_atomic
from opd.journal.lock import LOCK, Lock, is_run_folder
from opd.journal.records import SCHEMA_VERSION, EventKind, line, plain, rollout_row, to_json
from opd.journal.rewind import rewind
from opd.types import Rollout, TokenScores

Existing = Literal["resume", "overwrite", "refuse"]
LINES = ("metrics.jsonl", "evals.jsonl", "events.jsonl")
RESULTS = (
    *("metrics.jsonl", "evals.jsonl", "summary.json", "report.html"),
    *("rollouts", "views", "dumps", "checkpoints", "weights", "best", "final"),
)
TRACKERS = ("tracker.json", "tensorboard", "wandb")  # what trackers keep in the folder
# Of a run, too, but nobody would miss them.
TRACES = ("events.jsonl", *TRACKERS, *(name + TEMPORARY for name in RESULTS))
JOURNAL_BYTES = 64 * 2**20  # room that metrics, evals and some steps of rollouts need in any case


class RunFolder:
    """The one writer of a run folder; a context manager that gives the lock back.

    Whatever it writes is there as a whole or not at all; OutOfSpace is raised when it does not fit.
    """

    def __init__(self, path: Path, lock: Lock):
        self.path = path
        self._lock: Lock | None = lock

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        existing: Existing,
        config: Mapping[str, Any],
        config_hash: str,
        environment: Mapping[str, Any] | None = None,
        needed_bytes: int = 0,
    ) -> RunFolder:
        """Makes the folder, or takes over one whose run wrote no results yet, and writes config and environment.

        existing      "overwrite" deletes the results of an earlier run: the names in `RESULTS` and `TRACES`, nothing
                      else. Otherwise results are refused: a run is continued by `reopen`.
        environment   what only the caller knows (opd and torch versions, threads, device); no host or user names.
        needed_bytes  what the run will write besides its journal (checkpoints, the final model).
        Raises ConfigError when the folder cannot be used; see `check`.
        """
        folder = Path(path).expanduser()
        if existing == "resume":
            existing = "refuse"
        check(folder, existing=existing, config=config, needed_bytes=needed_bytes)
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = Lock.take(folder)
        try:
            with _writable(folder):
                # Again, now that nobody else writes: a run may have started and ended since.
                check(folder, existing=existing, config=config, needed_bytes=needed_bytes)
                for name in (*RESULTS, *TRACES):
                    discard(folder / name)
                made = cls(folder, lock)
                made.write_config(config, config_hash, environment)
        except BaseException:
            lock.release()
            raise
        return made

    @classmethod
    def reopen(cls, path: str | Path, *, needed_bytes: int = 0) -> RunFolder:
        """Takes the lock of a run's folder, to continue it; changes nothing else.

        Raises ConfigError when it is no run folder, another process writes there, it cannot be written, or is short of
        space.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir() or not is_run_folder(folder):
            what = "is no run of opd" if folder.exists() else "does not exist"
            raise ConfigError(f"run.folder={folder} {what}; name the folder of a run that is to go on")
        _usable(folder, folder, needed_bytes)
        with _writable(folder):
            return cls(folder, Lock.take(folder))

    def rewind(self, step: int) -> None:
        """The record goes back to what it was after `step`, evaluations at `step` included; -1 is before everything.

        Lines, rollouts, views, dumps, weights and checkpoints of later steps are removed, and what is written at the
        end. `events.jsonl` stays: it is the history. So does `best/`.
        Raises DataError when a line that is not the last one cannot be read.
        """
        assert self._lock is not None, "the folder is closed"
        rewind(self.path, step)

    def write_config(
        self, config: Mapping[str, Any], config_hash: str, environment: Mapping[str, Any] | None = None
    ) -> None:
        """Writes `config.json` and `environment.json`; `environment` as in `create`."""
        machine = {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
        about = {"schema_version": SCHEMA_VERSION, "config_hash": config_hash, **machine, **(environment or {})}
        write_atomic(self.path / "environment.json", _pretty(about))
        write_atomic(self.path / "config.json", _pretty(config))

    def log_step(self, step: int, policy_version: int, numbers: Mapping[str, float | int | bool | None]) -> None:
        """Appends one line to `metrics.jsonl`: step, the version the student has after it, and plain numbers."""
        assert not {"step", "policy_version"} & numbers.keys()
        self._append("metrics.jsonl", {"step": step, "policy_version": policy_version, **numbers})

    def log_eval(self, record: Mapping[str, Any]) -> None:
        """Appends one line to `evals.jsonl`; `record` has a `step`."""
        self._append("evals.jsonl", record)

    def log_event(self, step: int, kind: EventKind, message: str, **facts: Any) -> None:
        """Appends one line to `events.jsonl`: what happened, as a sentence, and the facts as plain values."""
        self._append("events.jsonl", {"step": step, "kind": kind, "message": message, **facts})

    def write_rollouts(
        self,
        step: int,
        rollouts_N: Sequence[Rollout],
        decode: Callable[[NDArray[np.int64]], str],
        scores: Mapping[str, TokenScores] | None = None,
    ) -> Path:
        """Writes `rollouts/step_000123.jsonl.gz`; `decode` turns token ids into text for people to read.

        scores   by rollout id, what the update saw at the tokens; a rollout may have none.
        """
        prompts = {rollout.prompt.id: decode(rollout.prompt.ids) for rollout in rollouts_N}
        scores = scores or {}
        rows = [rollout_row(r, prompts[r.prompt.id], decode(r.response_ids), scores.get(r.id)) for r in rollouts_N]
        path = self._file("rollouts", f"step_{step:06d}.jsonl.gz")
        # mtime=0: the same rollouts give the same bytes. Level 3: level 9 takes four times as long and saves 6 %.
        write_atomic(path, gzip.compress(b"".join(map(to_json, rows)), compresslevel=3, mtime=0))
        return path

    def write_view(self, step: int, record: Mapping[str, Any]) -> Path:
        """Writes `views/step_000123.json`, a graded record."""
        path = self._file("views", f"step_{step:06d}.json")
        write_atomic(path, to_json(plain(record, "", [])))
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`, made by `records.summary_record`."""
        write_atomic(self.path / "summary.json", _pretty(summary))

    def dump(self, step: int, name: str, payload: Mapping[str, Any]) -> Path:
        """Writes `dumps/step_000123_<name>.json`: numbers, texts, arrays or tensors of a step that went wrong."""
        path = self._file("dumps", f"step_{step:06d}_{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json")
        write_atomic(path, _pretty({"schema_version": SCHEMA_VERSION, "step": step, **payload}))
        return path

    def sync(self) -> None:
        """The lines written so far are on the disk, so that no checkpoint is ahead of its record after a power cut."""
        for name in LINES:
            if (self.path / name).exists():
                sync(self.path / name)
        sync(self.path)

    @property
    def checkpoints(self) -> Path:
        """The folder for `Checkpoints`."""
        return self.path / "checkpoints"

    def weights(self, step: int) -> Path:
        """Where the model of a step that stays for good belongs."""
        return self._file("weights", f"step_{step:06d}")

    @property
    def best(self) -> Path:
        """Where the best model so far belongs."""
        return self.path / "best"

    @property
    def final(self) -> Path:
        """Where the trained model belongs."""
        return self.path / "final"

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        assert self._lock is not None, "the folder is closed"
        append_line(self.path / name, to_json(line(record)))

    def _file(self, folder: str, name: str) -> Path:
        assert self._lock is not None, "the folder is closed"
        (self.path / folder).mkdir(exist_ok=True)
        return self.path / folder / name


def check(path: str | Path, *, existing: Existing, config: Mapping[str, Any], needed_bytes: int = 0) -> int:
    """Whether a run could be written to `path`; changes nothing. Returns the free bytes there.

    Raises ConfigError when it is no folder, holds files of others, holds another run's results and `existing` is
    "refuse", holds a file that `config` reads and that "overwrite" would delete, cannot be written, or is short of
    space.
    """
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.folder={folder} is a file; name a folder")
    above = folder
    while not above.exists():
        above = above.parent
    names = {entry.name for entry in folder.iterdir()} - {LOCK} if folder.exists() else set()
    if names and not is_run_folder(folder):
        some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"run.folder={folder} holds files that are no run of opd ({some}); they are left alone. Name a new folder"
        )
    results = holds_results(folder)
    if results and existing == "refuse":
        raise ConfigError(
            f"run.folder={folder} already holds a run ({', '.join(results)}). Go on with it: run.existing=resume, "
            f"delete it: run.existing=overwrite, or choose another run.folder=..."
        )
    for key, value in _strings(config) if existing == "overwrite" else ():
        inside = _inside(value, folder)
        if inside is not None and inside.parts[0] in results:
            raise ConfigError(
                f"{key}={value} is part of the run in run.folder={folder}, which run.existing=overwrite would delete. "
                f"Choose another run.folder=..."
            )
    return _usable(folder, above, needed_bytes)


def holds_results(path: str | Path) -> list[str]:
    """What a run of opd wrote at `path` that somebody may miss, by name; nothing when it came to no result yet."""
    folder = Path(path).expanduser()
    return [name for name in sorted(RESULTS) if os.path.lexists(folder / name)] if is_run_folder(folder) else []


def _usable(folder: Path, above: Path, needed_bytes: int) -> int:
    """The free bytes in `above`, the part of the path that exists; ConfigError when they are too few or read-only."""
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"run.folder={folder}: {above} cannot be written to; choose another")
    free = shutil.disk_usage(above).free
    needed = needed_bytes + JOURNAL_BYTES
    if free < needed:
        raise ConfigError(
            f"run.folder={folder}: the run needs about {_size(needed)} and {_size(free)} are free; "
            f"make room or choose another folder"
        )
    return free


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """A folder that cannot be written is the user's to change."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.folder={folder}: cannot write there ({error.strerror}); choose another") from error


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


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
