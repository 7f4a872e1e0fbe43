"""The demo in its quick form: every arm runs, is the one that is named, and the table says what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.errors import OpdError
from opd.lab.demo import make_models
from opd.lab.demo.run import load_recipe, run_demo
from opd.lab.worlds import sorting


def test_the_quick_demo_runs_all_arms(tmp_path: Path, capsys) -> None:
    rows = run_demo(tmp_path / "demo", quick=True)
    names = [row["name"] for row in rows]
    assert names[0] == "student before" and names[-1] == "teacher" and len(names) == 5
    before, *arms, teacher = rows
    assert teacher["mean"] - before["mean"] > 0.2, "the student starts at least 20 points below its teacher"
    assert all(0.5 < arm["mean"] <= 1 for arm in arms)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "100 held-out problems" in printed
    presets = {arm: json.loads((tmp_path / "demo" / arm / "summary.json").read_text())["preset"] for arm in ARMS}
    assert presets == ARMS
    AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "full" / "final")
    own = [json.loads(line) for line in (tmp_path / "demo" / "own_answers.jsonl").read_text().splitlines()]
    assert any(row["completion"] != "".join(sorted(row["prompt"][6:14])) for row in own), "they are the student's own"


ARMS = {"full": "reverse_kl", "sampled": "tml", "self_sft": "sft"}


def test_arms_have_the_same_budget_of_answers() -> None:
    spent = {}
    for arm in ARMS:
        recipe = load_recipe(Path("x"), arm, quick=False)
        spent[arm] = recipe["run"]["steps"] * recipe["prompts"]["per_step"]
    assert len(set(spent.values())) == 1, spent


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "heldout.jsonl").write_text("{}")  # a name that other people's data has, too
    with pytest.raises(OpdError, match="no demo of opd"):
        run_demo(tmp_path, quick=True)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("name", make_models.RECIPES)
def test_shipped_models_are_those_of_their_recipes_and_small(name: str) -> None:
    folder = make_models.MODELS / name
    weights = load_file(folder / "model.safetensors")
    config = make_models.RECIPES[name].config
    assert sum(t.numel() for t in weights.values()) == AutoModelForCausalLM.from_config(config).num_parameters()
    assert sum(f.stat().st_size for f in make_models.MODELS.rglob("*")) < 10e6


def test_the_shipped_models_can_be_made_again(tmp_path: Path) -> None:
    """The first updates of the student's recipe, through the same command."""
    import dataclasses

    recipe = dataclasses.replace(make_models.RECIPES["student"], steps=20, problems=200)
    final = make_models.train("student", recipe, tmp_path)
    assert AutoModelForCausalLM.from_pretrained(final).num_parameters() == 108_800
    assert len(sorting.tokenizer()) == 30
