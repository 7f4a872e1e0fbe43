"""`opd train` runs every named method: the config that `opd objectives show` prints, word for word, in tiny sizes.

The folder in which it is started holds models and files of the names that the examples make up, so that nothing of the
config is replaced; sizes are options on the command line. Teachers are random models, each another one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.config.catalogue import example
from opd.config.loading import load_config
from opd.config.naming import source_name
from opd.config.presets import METHODS, expand
from opd.config.reads import evidence, needs_reward, scorers
from opd.config.schema import Config
from opd.config.slots import Schedule
from opd.journal.reader import read_metrics, read_rollouts, read_summary
from tests import tiny
from tests.cli.test_train import opd

STEPS, ANSWERS, TOKENS = 2, 4, 8
ALL = list(METHODS)
TEACHERS = ("TEACHER", "MATH_TEACHER", "CODE_TEACHER", "REFERENCE", "WEAK", "OTHER")
COLUMNS = {  # what rows hold besides their prompt, and what another person might have written there
    "completion": ("The answer is 19.", "abcdefgh"),
    "answer": ("19", "efgh"),
    "solution": ("4 - 1 = 3, 3 * 3 = 9.", "the quick brown fox"),
    "feedback": ("again and again", "step by step"),
}
# Methods that learn from nobody else: there is nothing to exchange but the student.
ALONE = {"self_sft", "no_teacher", "grpo"}
# Another setting of a slot that `gold` and `lsm` have as well.
SLOW = {"uld", "shared_top_k"}

pytestmark = pytest.mark.filterwarnings("ignore::opd.config.checks.ConfigWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Every model and file that an example names. The student is nearly uniform, so that its rewards differ."""
    folder = tmp_path_factory.mktemp("presets")
    tiny.save(folder / "STUDENT", seed=0, scale=1.0)
    for seed, name in enumerate(TEACHERS, start=1):
        tiny.save(folder / name, "llama", seed=seed, scale=6.0)
    asked = [f"What is {i} + {j}?" for i in range(3) for j in range(3)]
    for name in ("prompts", "math", "code"):
        for which, ending in enumerate((".jsonl", "_other.jsonl")):
            told = {column: values[which] for column, values in COLUMNS.items()}
            rows = [{"prompt": prompt, **told} for prompt in asked]
            (folder / f"{name}{ending}").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def small(name: str) -> list[str]:
    """Options that make a run of a method small."""
    preset = expand(name, METHODS[name].example)
    rewarded = any(map(needs_reward, preset.terms))
    per_prompt = ANSWERS if rewarded else ANSWERS // 2
    options = [
        f"prompts.per_step={ANSWERS // 2}",
        f"sampling.samples_per_prompt={per_prompt}",
        f"sampling.max_tokens={TOKENS}",
        "optim.lr=1e-2",
        f"run.steps={STEPS}",
        "run.threads=1",
        "views.answers=2",
    ]
    if rewarded:  # a number is right, whichever
        options += ["rewards.grader.kind=numeric", "rewards.grader.tolerance=1.0"]
    if isinstance(preset.sampling.get("horizon"), Schedule):
        options += ["sampling.horizon.start=4", f"sampling.horizon.end={TOKENS}", f"sampling.horizon.steps={STEPS}"]
    return options


def written(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(example(name), encoding="utf-8")
    return path


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((after[key].double() - before[key].double()).square().sum()) for key in before))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def exchanges(name: str, config: Config) -> list[list[str]]:
    """For each thing that a method learns from, the options that put another in its place."""
    own = [path for path, scorer in scorers(config).values() if scorer.weights == "model"]
    if own:
        return [[f"{path}.model=OTHER"] for path in own]
    if name in ALONE:
        return []
    names = [source_name(source) for source in config.prompts.sources]
    return [[f"prompts.sources.{i}.path={source}_other.jsonl" for i, source in enumerate(names)]]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ALL])
def test_O_19_every_preset_trains_and_what_it_learns_from_is_in_the_weights(
    name: str, world: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(world)
    recipe, options = written(tmp_path, name), small(name)
    run = tmp_path / "run"
    assert opd("train", str(recipe), *options, f"run.folder={run}") == 0

    config = load_config([recipe], options).config
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2] and all(line["applied"] for line in lines)
    assert all(math.isfinite(line["loss"]) and line["trained_tokens"] > 0 for line in lines)
    for term in config.objective.terms:
        values = [line[f"term/{term.name}"] for line in lines if f"term/{term.name}" in line]
        assert values and all(map(math.isfinite, values)), term.name
        for scorer in evidence(term):
            assert any(math.isfinite(line.get(f"scorer/{scorer}/logprob", math.nan)) for line in lines), scorer
    assert sum(1 for _ in read_rollouts(run, 1)) == lines[0]["rollouts"]

    summary = read_summary(run)
    assert summary is not None and (summary["status"], summary["preset"]) == ("done", name)
    assert (run / "report.html").stat().st_size > 10_000
    card = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert f"Objective: `{name}`, minimised on" in card

    before, after = weights(world / "STUDENT"), weights(run / "final")
    distance = moved(before, after)
    assert math.isfinite(distance) and distance > 0
    for i, other in enumerate(exchanges(name, config)):
        folder = tmp_path / f"other_{i}"
        assert opd("train", str(recipe), *options, *other, "views.answers=0", f"run.folder={folder}") == 0
        assert moved(after, weights(folder / "final")) > 0.05 * distance, other


def test_the_same_run_twice_gives_the_same_weights(world: Path, tmp_path: Path, monkeypatch) -> None:
    """Without this, a difference after an exchange would say nothing."""
    monkeypatch.chdir(world)
    recipe, options = written(tmp_path, "minillm"), small("minillm")
    for folder in ("one", "two"):
        assert opd("train", str(recipe), *options, f"run.folder={tmp_path / folder}") == 0
    assert moved(weights(tmp_path / "one" / "final"), weights(tmp_path / "two" / "final")) == 0
