"""Every recipe runs: as it is, but with tiny models and rows, small sizes and its own scorers and objective."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd.config.loading import load_config
from opd.config.naming import source_name
from opd.config.reads import scorers
from opd.journal.reader import read_metrics
from tests import tiny
from tests.cli.test_train import opd

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_runs_in_tiny_sizes(path: Path, tmp_path: Path) -> None:
    config = load_config([path]).config
    options = [f"student.model={tiny.save(tmp_path / 'student', scale=1.0)}"]
    own = [name for name, (_, scorer) in scorers(config).items() if scorer.weights == "model"]
    for seed, name in enumerate(own, start=1):
        where = scorers(config)[name][0]
        options.append(f"{where}.model={tiny.save(tmp_path / name, 'llama', seed=seed, scale=6.0)}")
        options += [f"{where}.offload=none"] if scorers(config)[name][1].offload == "cpu" else []
    rows = ["What is 2 + 2?", "hi"]
    sources = [{"kind": "inline", "rows": rows, "name": source_name(s)} for s in config.prompts.sources]
    small = ["prompts.per_step=2", "sampling.max_tokens=8", "run.steps=2", "run.threads=1", "optim.lr=1e-2"]
    small += [f"prompts.sources={json.dumps(sources)}", f"run.folder={tmp_path / 'run'}"]
    assert opd("train", str(path), *options, *small) == 0
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2 and all(line["applied"] and line["loss"] != 0 for line in lines)
    for name in scorers(config):
        assert any(f"scorer/{name}/logprob" in line for line in lines), name
