"""Pairs of a student and a teacher for which the right advice is known, made on the spot from the demo's models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from opd.config.loading import load_config
from opd.config.schema import Config
from opd.lab.worlds import sorting

MODELS = Path(str(files("opd.lab.demo").joinpath("models")))
STUDENT, TEACHER = MODELS / "student", MODELS / "teacher"


def changed(folder: Path, start: Path, change: Callable[[Any], None], *, seed: int = 0) -> Path:
    """A copy of a model with its weights changed by hand."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        change(model)
    return saved(folder, start, model)


def saved(folder: Path, start: Path, model: Any) -> Path:
    shutil.copytree(start, folder)
    model.save_pretrained(folder)
    return folder


def another_order(model: Any) -> None:
    """Sorts as well as before, by another alphabet: every letter takes the place of another, on its way in and out."""
    weight_VD = model.get_input_embeddings().weight
    first = sorting.ALPHABET.index("a")
    weight_VD[first:] = weight_VD[first:][torch.randperm(len(weight_VD) - first)]


def random_weights(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)


def permuted_head(model: Any) -> None:
    _untie(model)
    weight = model.lm_head.weight
    weight.copy_(weight[torch.randperm(len(weight))])


def nearly_uniform(model: Any) -> None:
    _untie(model)
    model.lm_head.weight.mul_(0.05)


def not_a_number(model: Any) -> None:
    """One weight, another one for every seed."""
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.view(-1)[torch.randint(weight.numel(), ())] = torch.nan


def _untie(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    model.config.tie_word_embeddings = False


def foreign(folder: Path, start: Path, change: Callable[[Any], None] | None = None, *, seed: int = 0) -> Path:
    """The same model with another tokenizer: other ids, another end token, and seven digits that the world has not.

    Digits get the row of the colon, which nobody writes: what the model says about letters is as it was.
    """
    if change is not None:
        start = changed(folder.with_name(f"{folder.name}-before"), start, change, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(start)
    own = ["[END]", *sorting.ALPHABET[1:]]
    torch.manual_seed(seed)
    order = torch.randperm(len(own)).tolist()
    names = [*(own[n] for n in order), *"0123456"]
    rows = [*order, *[sorting.ALPHABET.index(":")] * 7]
    with torch.no_grad():
        weight = model.get_input_embeddings().weight[rows].clone()
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(weight)
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(names)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", pad_token="[END]")
    end = tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder: Path, student: Path, teacher: Path, *, seed: int = 0, graded: bool = True, **changes: Any) -> Config:
    """The demo's run between two models, with held-out problems where `graded`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": row["prompt"]} for row in sorting.problems("train", 600, seed=seed + 10)]
    held = [{"prompt": r["prompt"], "answer": r["answer"]} for r in sorting.problems("heldout", 64, seed=seed + 10)]
    _write(folder / "prompts.jsonl", rows)
    _write(folder / "heldout.jsonl", held)
    base: dict[str, Any] = {
        "student": {"model": str(student)},
        "teacher": {"model": str(teacher)},
        "prompts": {"per_step": 32, "sources": [_jsonl(folder / "prompts.jsonl", "sorting")]},
        "sampling": {"samples_per_prompt": 1, "max_tokens": 10},
        "objective": {"preset": "reverse_kl"},
        "optim": {"lr": 5e-4},
        "run": {"folder": str(folder / "run"), "steps": 200, "threads": 1, "seed": seed},
    }
    if graded:
        task = {"name": "sorting", "grader": {"kind": "exact"}, "source": _jsonl(folder / "heldout.jsonl", "heldout")}
        base["evals"] = {"tasks": [task], "workers": 1}
    for name, section in changes.items():  # teacher_={...} adds to the section teacher
        name = name.rstrip("_")
        base[name] = {**base.get(name, {}), **section}
    return load_config([], base=base).config


def _jsonl(path: Path, name: str) -> dict[str, str]:
    return {"kind": "jsonl", "path": str(path), "name": name}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
