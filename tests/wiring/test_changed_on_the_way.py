"""What may change when a run goes on is the same for every scorer, by whichever name."""

from __future__ import annotations

from pathlib import Path

import pytest

import opd
from opd.errors import ConfigError
from opd.journal.reader import read_config, read_events, read_metrics
from tests import tiny


def test_scorers_may_move_as_the_teacher_may_and_nothing_else_of_them_changes(tmp_path: Path) -> None:
    models = {name: tiny.save(tmp_path / name, seed=i) for i, name in enumerate(("student", "one", "two"))}
    run = opd.distill(
        models["student"],
        models["one"],
        scorers={"other": {"model": models["two"]}},
        prompts=["What is 2 + 2?", "hi"],
        sampling={"samples_per_prompt": 1, "max_tokens": 4},
        objective={"behaviour": "student", "terms": [{"name": "a"}, {"name": "b", "target": "other"}]},
        run={"folder": str(tmp_path / "run"), "steps": 1},
        views={"answers": 0},
        quiet=True,
    )
    for option in ("scorers.other.temperature=2.0", f"scorers.other.model={models['one']}", "teacher.temperature=2.0"):
        with pytest.raises(ConfigError, match=option.split("=")[0]):
            opd.resume(run.folder, [option, "run.steps=2"], quiet=True)
    options = ["run.steps=2", "scorers.other.device=cpu", "teacher.device=cpu"]
    opd.resume(run.folder, options, quiet=True)
    assert len(read_metrics(run.folder)) == 2
    told = [event["message"] for event in read_events(run.folder) if event["kind"] == "changed"]
    for path in ("teacher", "scorers.other"):
        assert f'{path}.device changes from "auto" to "cpu"' in told
    config = read_config(run.folder)
    assert config is not None and config["scorers"]["other"]["device"] == "cpu"
