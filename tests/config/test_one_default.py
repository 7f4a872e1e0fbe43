"""Every option has one default, in the schema: no part has its own, and every way of making a config gives it."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from opd.config.checks import check
from opd.config.loading import load_config, resolved
from opd.config.schema import Config, Engine, Learner, Sampling
from opd.learner.learner import LocalLearner
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from opd.rollouts.engine import EmbeddedEngine
from opd.teachers.local import LocalTeacher
from opd.types import SamplingParams
from tests.config.recipes import BASE, load

PLAIN = {
    "student": {"model": "small"},
    "teacher": {"model": "big"},
    "prompts": {"sources": [{"kind": "jsonl", "path": "a.jsonl"}]},
}
FLAT = ["student.model=small", "teacher.model=big", "prompts.sources.0.kind=jsonl", "prompts.sources.0.path=a.jsonl"]


@pytest.mark.parametrize("preset", ["reverse_kl", "tml", "jsd", "grpo"])
def test_O_26_a_file_a_mapping_and_the_command_line_give_one_config(tmp_path, preset) -> None:
    rewards = "rewards: {grader: {kind: exact}}\n" if preset == "grpo" else ""
    text = BASE.replace("teacher: {model: big}\n", "") if preset == "grpo" else BASE
    loaded = load(tmp_path, text + rewards + f"objective: {{preset: {preset}}}\n").config
    data = {key: value for key, value in PLAIN.items() if preset != "grpo" or key != "teacher"}
    data |= {"objective": {"preset": preset}} | ({"rewards": {"grader": {"kind": "exact"}}} if rewards else {})
    flat = [item for item in FLAT if preset != "grpo" or not item.startswith("teacher")]
    flat += [f"objective.preset={preset}", *(["rewards.grader.kind=exact"] if rewards else [])]
    assert check(Config.model_validate(data)) == loaded == load_config([], flat).config
    assert resolved(loaded)["objective"]["terms"], "what is written down has the defaults in it"


@pytest.mark.parametrize("part", [LocalLearner, LocalTeacher, EmbeddedEngine, tiled_loss, tiled_look])
def test_O_26_parts_are_told_their_options_and_have_no_defaults_for_them(part) -> None:
    options = {
        "temperature",
        "student_temperature",
        *Learner.model_fields,
        *Engine.model_fields,
        *Sampling.model_fields,
    }
    options |= {"optim", "spec", "objective"}
    own = [
        name
        for name, parameter in inspect.signature(part).parameters.items()
        if name in options and parameter.default is not parameter.empty
    ]
    assert not own


def test_O_26_the_samplers_own_type_draws_as_the_schema_says() -> None:
    ours, schema = {f.name: f.default for f in dataclasses.fields(SamplingParams)}, Sampling()
    for name in ("temperature", "top_p", "top_k"):
        assert ours[name] == getattr(schema, name)
