"""Trackers: TensorBoard for real; wandb and trackio against modules that record how they are called (their packages
are not among the tests' own)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

from opd.config.schema import Tracking
from opd.errors import ConfigError
from opd.reports.trackers import check_tracker, open_tracker, public_config
from tests import rooms

NUMBERS = {"loss": 0.5, "applied": True, "bad": math.nan, "none": None, "text": "x", "reverse_kl/position/0-3": 2}
SENT = {"loss": 0.5, "applied": 1.0, "reverse_kl/position/0-3": 2.0}


class Recorder(types.ModuleType):
    """Takes the calls that opd makes of wandb and trackio, and fails where it is told to."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished: list[dict] = []
        self.broken: set[str] = set()

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **given: Any) -> Recorder:
        self._fail("init")
        self.inits.append(given)
        self.id = given.get("id")
        return self

    def log(self, numbers: dict, step: int) -> None:
        self._fail("log")
        self.logged.append((step, numbers))

    def finish(self, **given: Any) -> None:
        self._fail("finish")
        self.finished.append(given)

    def _fail(self, name: str) -> None:
        if name in self.broken:
            raise ConnectionError(f"no route to host \x1b[31m{name}")


@pytest.fixture
def recorded(monkeypatch):
    def install(name: str) -> Recorder:
        monkeypatch.setitem(sys.modules, name, Recorder(name))
        return sys.modules[name]  # type: ignore[return-value]

    return install


def opened(kind: str, folder: Path, **kwargs: Any):
    return open_tracker(Tracking(kind=kind), run_folder=folder, config={"run": {"steps": 3}}, **kwargs)  # type: ignore[arg-type]


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


# ---- none, and what is missing -----------------------------------------------------------------------------------


def test_none_does_nothing(tmp_path):
    tracker = opened("none", tmp_path)
    tracker.log(1, NUMBERS)
    tracker.close("done")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_told_before_the_run(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"tracking.kind={kind} .* pip install 'opd\[{kind}\]'"):
        check_tracker(Tracking(kind=kind))
    with pytest.raises(ConfigError, match="pip install"):
        opened(kind, tmp_path)


def test_the_module_of_trackers_imports_none_of_them():
    code = "import sys, opd.reports.trackers; print({'wandb', 'trackio', 'tensorboard', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_holds_what_was_logged_and_a_resume_purges_what_comes_again(tmp_path):
    tracker = opened("tensorboard", tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, NUMBERS | {"loss": step / 10})
    tracker.close("interrupted")
    tracker.close("interrupted")
    assert points(tmp_path) == {
        "loss": [(1, 0.1), (2, 0.2), (3, 0.3)],
        "applied": [(1, 1.0), (2, 1.0), (3, 1.0)],
        "reverse_kl/position/0-3": [(1, 2.0), (2, 2.0), (3, 2.0)],
    }
    tracker = opened("tensorboard", tmp_path, step=1)
    tracker.log(2, {"loss": 7.0})
    tracker.close("done")
    assert points(tmp_path)["loss"] == [(1, 0.1), (2, 7.0)]


# ---- wandb and trackio -------------------------------------------------------------------------------------------


def test_wandb_gets_numbers_and_a_resumed_run_is_the_same_one(tmp_path, recorded):
    wandb = recorded("wandb")
    folder = tmp_path / "first run"
    folder.mkdir()
    tracker = opened("wandb", folder)
    tracker.log(1, NUMBERS)
    tracker.close("done")
    tracker.log(2, NUMBERS)
    assert wandb.logged == [(1, SENT)] and wandb.finished == [{"exit_code": 0}]
    opened("wandb", folder, step=1).close("failed")
    assert wandb.finished[1] == {"exit_code": 1}
    first, second = wandb.inits
    assert first["project"] == "opd" and first["name"] == "first run" and first["dir"] == str(folder)
    assert first["config"] == {"run": {"steps": 3}}
    assert first["id"] == second["id"] and len(first["id"]) >= 8 and second["resume"] == "allow"
    assert second["allow_val_change"]  # it may have got more steps
    assert (
        first["settings"]["console"] == "off" and first["settings"]["disable_code"] and first["settings"]["disable_git"]
    )
    opened("wandb", folder)  # begun anew in the same folder: another run
    assert wandb.inits[2]["id"] != first["id"]


def test_trackio_runs_are_told_apart_by_name(tmp_path, recorded):
    trackio = recorded("trackio")
    spec = Tracking(kind="trackio", project="p", name="n")
    tracker = open_tracker(spec, run_folder=tmp_path, config={})
    tracker.log(1, NUMBERS)
    tracker.close("done")
    open_tracker(spec, run_folder=tmp_path, config={}, step=1)
    open_tracker(spec, run_folder=tmp_path, config={})
    names = [given["name"] for given in trackio.inits]
    assert names[0] == names[1] != names[2] and all(name.startswith("n-") for name in names)
    assert {given["resume"] for given in trackio.inits} == {"allow"} and trackio.inits[0]["project"] == "p"
    assert trackio.inits[0]["private"] is True
    assert trackio.logged == [(1, SENT)] and trackio.finished == [{}]


@pytest.mark.parametrize("damage", ["", "[]", '{"kind": "trackio", "id": "x"}', '{"kind": "wandb"}'])
def test_a_record_that_cannot_be_read_begins_a_new_run(tmp_path, recorded, damage):
    wandb = recorded("wandb")
    (tmp_path / "tracker.json").write_text(damage)
    opened("wandb", tmp_path, step=5)
    assert wandb.inits[0]["id"] != "x"
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"kind": "wandb", "id": wandb.inits[0]["id"]}


# ---- failures ----------------------------------------------------------------------------------------------------


def test_a_tracker_that_cannot_begin_is_told_before_the_run(tmp_path, recorded):
    recorded("wandb").broken = {"init"}
    with pytest.raises(ConfigError, match=r"cannot begin: ConnectionError: no route to host \\x1b\[31minit. Log in"):
        opened("wandb", tmp_path)


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_a_tracker_that_fails_is_told_once_and_dropped(tmp_path, recorded, kind):
    module, told = recorded(kind), []
    tracker = opened(kind, tmp_path, on_failure=told.append)
    tracker.log(1, NUMBERS)
    module.broken = {"log", "finish"}
    for step in (2, 3):
        tracker.log(step, NUMBERS)
    module.broken = set()
    tracker.log(4, NUMBERS)
    tracker.close("done")
    assert [step for step, _ in module.logged] == [1] and module.finished == []
    assert len(told) == 1 and f"tracking.kind={kind} failed" in told[0] and "\x1b" not in told[0]


def test_a_failure_is_a_warning_when_nobody_listens_and_never_at_the_end_twice(tmp_path, recorded):
    recorded("wandb").broken = {"finish"}
    tracker = opened("wandb", tmp_path)
    with pytest.warns(RuntimeWarning, match="is dropped"):
        tracker.close("done")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.close("done")


# ---- what leaves the machine -------------------------------------------------------------------------------------


def test_the_config_that_is_sent_holds_no_path_and_no_row(tmp_path):
    model = tmp_path / "secret-place" / "student"
    model.mkdir(parents=True)
    source = {"kind": "jsonl", "path": str(tmp_path / "secret-place" / "rows.jsonl")}
    sections = {
        "student": {"model": str(model), "tokenizer": "~/secret-place/words"},
        "teacher": {"model": "org/big"},
        "prompts": {"sources": [source, {"kind": "inline", "rows": ["secret-place"]}]},
        "run": {"folder": str(tmp_path / "secret-place" / "runs" / "a")},
    }
    config = rooms.config(**sections).model_dump(mode="json")
    sent = public_config(config)
    assert "secret-place" not in json.dumps(sent) and str(tmp_path) not in json.dumps(sent)
    assert sent["student"]["model"] == "student" and sent["teacher"]["model"] == "org/big"
    assert sent["prompts"]["sources"][1]["rows"] == "1 row" and sent["run"]["folder"] == "a"
    assert sent["optim"] == config["optim"]
