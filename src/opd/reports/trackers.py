"""Optional trackers: the step's numbers are sent to trackio, wandb or TensorBoard as well. The run folder stays the
record; this is the one file that imports these packages, and only the one that was asked for.

A tracker never ends a run: the first failure is told and the tracker is dropped. What leaves the machine is numbers and
the config, in which paths are reduced to their last part; no code, no console, no facts about the machine.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from opd.config.schema import Tracking
from opd.errors import ConfigError, OpdError
from opd.journal.atomic import write_atomic
from opd.reports.figures import counted
from opd.reports.model_card import public_name
from opd.reports.printable import printable

RECORD = "tracker.json"  # how the tracker calls this run, so that a resumed one goes on with it
_NAMES_OF_PLACES = {"model", "tokenizer", "path", "folder"}


class Tracker(Protocol):
    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Sends what is a finite number (true and false as 1 and 0), and nothing else. Never raises."""
        ...

    def close(self, status: str) -> None:
        """Ends the run there; "done" is a success. Never raises; a second call does nothing."""
        ...


def check_tracker(spec: Tracking) -> None:
    """Raises ConfigError when the tracker's package is missing. Imports nothing of it."""
    needed = {"none": None, "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}[spec.kind]
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise ConfigError(
            f"tracking.kind={spec.kind} needs the package {needed}, which is not installed: "
            f"pip install 'opd[{spec.kind}]', or take tracking.kind=none"
        )


def open_tracker(
    spec: Tracking,
    *,
    run_folder: Path,
    config: Mapping[str, Any],
    step: int = 0,
    on_failure: Callable[[str], None] = lambda message: warnings.warn(message, RuntimeWarning, stacklevel=3),
) -> Tracker:
    """The tracker of a run.

    run_folder   exists; TensorBoard and wandb write below it, and `tracker.json` remembers how the run is called there.
    config       the resolved config as a plain dict.
    step         steps done so far; 0 begins a new run, more goes on with the one that `tracker.json` names.
    on_failure   called once, with what went wrong, when the tracker is dropped.

    Raises ConfigError when the package is missing or cannot begin a run.
    """
    check_tracker(spec)
    opened = {"none": None, "tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}[spec.kind]
    if opened is None:
        return _Nothing()
    try:
        return _Guarded(spec.kind, opened(spec, run_folder, public_config(config), step), on_failure)
    except OpdError:
        raise
    except Exception as error:
        raise ConfigError(
            f"tracking.kind={spec.kind} cannot begin: {_said(error)}. Log in there, work offline (WANDB_MODE=offline), "
            "or take tracking.kind=none"
        ) from error


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as it may leave the machine: of models, tokenizers, files and folders only the last part of the path,
    of rows written in the config only how many there are."""
    return {key: _public(key, value) for key, value in config.items()}


def _public(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_config(value)
    if key == "rows" and isinstance(value, (list, tuple)):
        return counted(len(value), "row")
    if isinstance(value, (list, tuple)):
        return [_public("", item) for item in value]
    return public_name(value) if key in _NAMES_OF_PLACES and isinstance(value, str) else value


# ---- one class for each ------------------------------------------------------------------------------------------


class _Nothing:
    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        pass

    def close(self, status: str) -> None:
        pass


class _Guarded:
    """Keeps a tracker's failures away from the run."""

    def __init__(self, kind: str, tracker: Tracker, on_failure: Callable[[str], None]) -> None:
        self._kind, self._on_failure = kind, on_failure
        self._tracker: Tracker | None = tracker

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        self._try(lambda tracker: tracker.log(step, _finite(numbers)))

    def close(self, status: str) -> None:
        self._try(lambda tracker: tracker.close(status))
        self._tracker = None

    def _try(self, act: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            act(self._tracker)
        except Exception as error:
            dropped, self._tracker = self._tracker, None
            with suppress(Exception):  # what it holds may still be given back
                dropped.close("failed")
            self._on_failure(
                f"tracking.kind={self._kind} failed and is dropped, the run goes on: {_said(error)}. "
                "The numbers are in metrics.jsonl"
            )


class _TensorBoard:
    """Event files in `tensorboard/`. Points after `step`, of a try that was cut off, are purged."""

    def __init__(self, spec: Tracking, run_folder: Path, config: Mapping[str, Any], step: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run_folder / "tensorboard"), purge_step=step + 1)
        if not step:
            self._writer.add_text("config", "    " + json.dumps(config, indent=2).replace("\n", "\n    "), 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.close()


class _Wandb:
    """https://docs.wandb.ai/models/ref/python/functions/init: a run of its own beside any that the program has open.
    Points that a resumed run takes again are ignored by wandb: its steps only go up."""

    _PRIVACY: Mapping[str, Any] = {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "x_disable_meta": True,
        "x_disable_machine_info": True,
    }

    def __init__(self, spec: Tracking, run_folder: Path, config: Mapping[str, Any], step: int) -> None:
        wandb = importlib.import_module("wandb")
        name = spec.name or run_folder.resolve().name
        made = _remembered(run_folder, "wandb") if step else None
        self._run = wandb.init(
            project=spec.project,
            name=name,
            id=made or uuid.uuid4().hex[:12],
            resume="allow",
            reinit="create_new",
            dir=str(run_folder),
            config=dict(config),
            allow_val_change=True,  # a resumed run may have got more steps
            settings=wandb.Settings(**self._PRIVACY),
        )
        _remember(run_folder, "wandb", self._run.id)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


class _Trackio:
    """https://huggingface.co/docs/trackio: runs are told apart by name, so the name gets a few letters of its own.
    Where TRACKIO_SPACE_ID sends them to a Space that is made anew, it is a private one."""

    def __init__(self, spec: Tracking, run_folder: Path, config: Mapping[str, Any], step: int) -> None:
        trackio = importlib.import_module("trackio")
        made = _remembered(run_folder, "trackio") if step else None
        name = made or f"{spec.name or run_folder.resolve().name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            project=spec.project, name=name, resume="allow", config=dict(config), private=True, embed=False
        )
        _remember(run_folder, "trackio", name)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, status: str) -> None:
        self._run.finish()


# ---- small things ------------------------------------------------------------------------------------------------


def _finite(numbers: Mapping[str, Any]) -> dict[str, float]:
    floats = {k: float(v) for k, v in numbers.items() if isinstance(v, (bool, int, float))}
    return {key: value for key, value in floats.items() if math.isfinite(value)}


def _remember(run_folder: Path, kind: str, run_id: str) -> None:
    write_atomic(run_folder / RECORD, json.dumps({"kind": kind, "id": run_id}).encode() + b"\n")


def _remembered(run_folder: Path, kind: str) -> str | None:
    """The run's id there; None where another tracker or none was used, or the file is damaged."""
    try:
        record = json.loads((run_folder / RECORD).read_bytes())
        return str(record["id"]) if record["kind"] == kind else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _said(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {error}")[:500].rstrip(". ")
