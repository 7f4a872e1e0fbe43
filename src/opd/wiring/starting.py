"""Where a run begins: in a new folder, or where an earlier process of the same run left off."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.config.loading import changeable, config_hash, differences, load_config, resolved
from opd.config.problems import shown
from opd.config.schema import Config
from opd.config.schema_walk import value_at
from opd.errors import ConfigError
from opd.journal.checkpoints import Checkpoints, Found, Nothing
from opd.journal.folder import Existing, RunFolder, holds_results
from opd.journal.lock import is_run_folder
from opd.journal.reader import read_config, read_environment, read_events, read_summary
from opd.reports.progress import say

IDENTITY = ("data", "student", "scorers")  # what must not change under a run; fingerprints in its start event
MACHINE = ("opd", "torch", "transformers", "threads", "cpu_capability", "cuda")


@dataclass(frozen=True)
class Start:
    """A folder that is ours, and what is known of the run's past.

    found      the checkpoint to go on from; None: the first step.
    resumes    how often the run has been taken up again, this time included; 0: it is new.
    identity   fingerprints of data and models when the run began; None: it is new, or was killed before it began.
    skipped    sentences about checkpoints that were passed over.
    notes      sentences about options and machines that changed.
    events     what its earlier processes wrote to `events.jsonl`.
    about      the environment to be written with the config, once the run is known to be the same; None: both stay.
    """

    folder: RunFolder
    found: Found | None = None
    resumes: int = 0
    identity: Mapping[str, Any] | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    about: Mapping[str, Any] | None = None


def existing(config: Config, console: Console) -> Existing:
    """What `run.existing` means here: `ask` asks where somebody can answer and there is something to ask about."""
    wanted = config.run.existing
    if wanted != "ask":
        return wanted
    there = holds_results(Path(config.run.folder).expanduser())
    if not there or not (console.is_terminal and sys.stdin.isatty()):
        return "refuse"
    say(console, f"{config.run.folder} already holds a run ({', '.join(there)}).")
    answer = console.input("[r]esume it, [o]verwrite it, or stop? ").strip().lower()
    return "resume" if answer in ("r", "resume") else "overwrite" if answer in ("o", "overwrite") else "refuse"


def stored(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of the run in `path`, with options changed that may be changed on the way."""
    config = read_config(path)
    if config is None:
        raise ConfigError(f"{path}: the run was killed before it wrote its config; start it again with opd train")
    for item in overrides:
        option, _, value = item.removeprefix("--").partition("=")
        if not changeable(option):
            raise _fixed(path, option, value_at(config, tuple(option.split("."))), value)
    here = [f"run.folder={path}", "run.existing=resume"]
    return load_config([], [*overrides, *here], base=config).config


def finished(config: Config) -> bool:
    """Whether the run in the config's folder has come to its end, and the config asks for no further steps."""
    folder = Path(config.run.folder).expanduser()
    summary = read_summary(folder) if holds_results(folder) else None
    return summary is not None and summary["status"] == "done" and summary["steps"] >= config.run.steps


def changes(config: Config) -> dict[str, tuple[Any, Any]]:
    """Options in which the config differs from the one in its folder; ConfigError for one that must not change."""
    folder = Path(config.run.folder).expanduser()
    before = read_config(folder) if is_run_folder(folder) else None  # a first start has nothing to differ from
    if before is None:
        return {}
    changed = differences(before, resolved(config))
    for option, (old, new) in changed.items():
        if not changeable(option):
            raise _fixed(folder, option, old, shown(new))
    quiet = ("run.folder", "run.existing")
    return {option: pair for option, pair in changed.items() if option not in quiet}


def _fixed(folder: str | Path, option: str, old: Any, new: str) -> ConfigError:
    return ConfigError(
        f"{option}={new}, but the run in {folder} was started with {shown(old)}, and its steps so far depend on it. "
        f"Leave it out, or start another run in another folder."
    )


def begin(config: Config, how: Existing, environment: Mapping[str, Any], needed_bytes: int) -> Start:
    """Takes the folder: a new one, or with `how` "resume" one that holds a run, if it does."""
    path = Path(config.run.folder).expanduser()
    if how == "resume" and holds_results(path):
        return _resume(config, path, environment, needed_bytes)
    folder = RunFolder.create(
        path,
        existing=how,
        config=resolved(config),
        config_hash=config_hash(config),
        environment=environment,
        needed_bytes=needed_bytes,
    )
    return Start(folder)


def _resume(config: Config, path: Path, environment: Mapping[str, Any], needed_bytes: int) -> Start:
    there = sum(f.stat().st_size for name in ("checkpoints", "final") for f in (path / name).rglob("*") if f.is_file())
    folder = RunFolder.reopen(path, needed_bytes=max(0, needed_bytes - there))  # what is there makes room for the next
    try:
        changed = changes(config)
        before = read_environment(path) or {}
        events = read_events(path)
        newest = Checkpoints(folder.checkpoints).newest_good()
        _check_place(config, folder, newest)
    except BaseException:
        folder.close()
        raise
    moved = [(key, before[key], environment[key]) for key in MACHINE if before.get(key) != environment[key]]
    notes = [f"{option} changes from {shown(old)} to {shown(new)}" for option, (old, new) in changed.items()]
    notes += [
        f"{key} was {old} when the run began and is {new} now: it goes on, but not bit for bit"
        for key, old, new in moved
        if before
    ]
    starts = [event for event in events if event["kind"] == "start"]
    identity = {key: starts[-1].get(key) for key in IDENTITY} if starts else None
    return Start(
        folder=folder,
        found=newest if isinstance(newest, Found) and identity is not None else None,
        resumes=1 + sum(event["kind"] == "resume" for event in events),
        identity=identity,
        skipped=newest.skipped,
        notes=tuple(notes),
        events=tuple(events),
        about=environment if changed else None,
    )


def _check_place(config: Config, folder: RunFolder, newest: Found | Nothing) -> None:
    """ConfigError when going on would throw away a trained student, or end before the step where the run is."""
    if isinstance(newest, Nothing) and folder.final.exists():
        why = "; ".join(newest.skipped) or "there is none"
        raise ConfigError(
            f"{folder.path}: without a good checkpoint ({why}) the run would begin again and delete its student in "
            f"final/. Begin again with opd train and run.existing=overwrite, or train on from final/ in another folder "
            f"(student.model={folder.final})."
        )
    if isinstance(newest, Found) and newest.step > config.run.steps:
        raise ConfigError(
            f"run.steps={config.run.steps}, but the run in run.folder={folder.path} has {newest.step} steps behind it. "
            f"Ask for {newest.step} or more."
        )


def same_run(start: Start, now: Mapping[str, Any]) -> None:
    """ConfigError when data or models are not those that the run began with."""
    if start.identity is None:
        return
    then, scorers = start.identity, start.identity["scorers"] or {}
    named = [
        ("the training prompts", "prompts and the files they name", then["data"], now["data"]),
        ("the student's first weights", "student.model", then["student"], now["student"]),
        *(
            (_scorer(name), _weights_of(name), scorers.get(name), now["scorers"].get(name))
            for name in sorted({*scorers, *now["scorers"]})
        ),
    ]
    for what, option, before, found in named:
        if before != found:
            raise ConfigError(
                f"{start.folder.path}: {what} changed since the run began (fingerprint {before} then, {found} now). "
                f"Put back what was there ({option}), or start another run."
            )


def _scorer(name: str) -> str:
    return "the teacher" if name == "teacher" else f"the scorer {name}"


def _weights_of(name: str) -> str:
    return "teacher.model" if name == "teacher" else f"scorers.{name}.model"
