"""The models of the study, trained from nothing by SFT on worked examples, through `opd.distill` as everything else.

A teacher sees many problems with right answers. A student sees fewer of them, and then some with mistakes: it can do
much of the task, and what it writes is wrong half of the time and more. A user's own student starts from there, too.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))

from across_tokenizers import vocabularies, world

import opd

MAX_TOKENS = 64  # far beyond the longest answer of any of the tokenizers
ONE = (("order", "comma"),)
ALL = ("order", "turn", "down")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one model is made: its tokenizer, its width, and what it is trained on.

    problems   worked examples of each task.
    slips      share of its examples that have a mistake.
    begins_as  the model that it is trained on from, with a vocabulary that may be longer; None: from nothing.
    data       (task, style) of its examples; style None: by chance, row by row.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    problems: int
    steps: int
    lr: float
    seed: int
    batch: int = 64
    slips: float = 0.0
    begins_as: str | None = None
    data: Sequence[tuple[str, str | None]] = ONE


def _teacher(family: str, vocab_size: int, seed: int, **changes: Any) -> Recipe:
    settings = {"width": 128, "layers": 2, "problems": 150_000, "steps": 2400, "lr": 2.5e-3, "seed": seed, **changes}
    return Recipe(family=family, vocab_size=vocab_size, **settings)


def _of_all(style: str | None) -> dict[str, Any]:
    return {"data": tuple((task, style) for task in ALL), "width": 96, "problems": 50_000, "lr": 3e-3}


_SMALL: dict[str, Any] = {"family": "byte_bpe", "vocab_size": 420, "layers": 2}

MODELS = {
    # one task; the teachers are about as good, which takes a larger one and more steps with the Unigram's tokens
    "pupil": Recipe(**_SMALL, width=80, problems=60_000, steps=1300, lr=3e-3, seed=1),
    "student": Recipe(**_SMALL, width=80, problems=20_000, steps=200, lr=1e-3, seed=2, slips=0.45, begins_as="pupil"),
    "unigram_teacher": _teacher("unigram", 520, seed=0),
    "bpe_teacher": _teacher("byte_bpe", 420, seed=0, width=96, problems=60_000, steps=1600, lr=3e-3),
    "near_teacher": _teacher(
        "byte_bpe", 520, seed=6, width=96, problems=30_000, steps=400, lr=2e-3, begins_as="bpe_teacher"
    ),
    # three tasks: each teacher writes its answers in its own style, the student in all three
    "routed_student": Recipe(
        **_SMALL,
        width=64,
        problems=2500,
        steps=1200,
        lr=3e-3,
        seed=1,
        data=tuple((task, None) for task in ALL),
    ),
    "routed_unigram": _teacher("unigram", 520, seed=3, **_of_all("comma")),
    "routed_wordpiece": _teacher("wordpiece", 320, seed=4, **_of_all("arrow")),
    "routed_bpe": _teacher("byte_bpe", 420, seed=5, **_of_all("and")),
}


def make(name: str, folder: Path) -> Path:
    """The folder of the trained model `name`; made when it is not there."""
    recipe, final = MODELS[name], folder / name
    if (final / "config.json").exists():
        return final
    torch.manual_seed(recipe.seed)
    work = folder / f"{name}.work"
    start = work / "start"
    tokenizer = getattr(vocabularies, recipe.family)(recipe.vocab_size)
    if recipe.begins_as is None:
        model = AutoModelForCausalLM.from_config(config(recipe, tokenizer))
    else:
        model = grown(make(recipe.begins_as, folder), tokenizer)
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    rows = [
        row
        for task, style in recipe.data
        for row in world.problems(
            "train", recipe.problems, task=task, style=style, slips=recipe.slips, seed=recipe.seed + 100
        )
    ]
    write(work / "examples.jsonl", rows)
    run = opd.distill(
        student=str(start),
        prompts={
            "sources": [{"kind": "jsonl", "path": str(work / "examples.jsonl"), "name": "examples"}],
            "per_step": recipe.batch,
        },
        objective={"preset": "sft"},
        sampling={"max_tokens": MAX_TOKENS},
        optim={"lr": recipe.lr, "schedule": "cosine", "warmup_steps": 50},
        evals={"tasks": tasks(folder, recipe.data, problems=300), "every": recipe.steps // 4},
        views={"answers": 0},
        run={
            "folder": str(work / "run"),
            "steps": recipe.steps,
            "seed": recipe.seed,
            "threads": 1,
            "log_every": 100,
            "existing": "overwrite",
        },
    )
    shutil.copytree(run.student, final, ignore=shutil.ignore_patterns("README.md"))
    return final


def grown(folder: Path, tokenizer: Any) -> Any:
    """A model with the entries that a tokenizer has beyond its own: each begins as the mean of its parts."""
    model, old = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert names[: len(old)] == old.convert_ids_to_tokens(range(len(old))), "the vocabularies do not begin alike"
    parts = [old.encode(tokenizer.decode([i]), add_special_tokens=False) for i in range(len(old), len(tokenizer))]
    table_VD = model.get_input_embeddings().weight.detach()
    more = [table_VD[ids].mean(0) for ids in parts]
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for i, row_D in enumerate(more):
            model.get_input_embeddings().weight[len(old) + i] = row_D
    return model


def tasks(
    folder: Path, data: Sequence[tuple[str, str | None]], *, problems: int, seed: int = 2
) -> list[dict[str, Any]]:
    """Held-out tasks for a config, one for each (task, style); their files are written beside the models."""
    found = []
    for task, style in data:
        path = folder / f"heldout-{task}-{style}-{problems}-{seed}.jsonl"
        write(path, world.problems("heldout", problems, task=task, style=style, seed=seed))
        source = {"kind": "jsonl", "path": str(path), "name": f"heldout_{task}"}
        found.append({"name": f"{task}_{style}", "source": source, "grader": {"kind": "exact"}, "samples": 1})
    return found


def config(recipe: Recipe, tokenizer: Any) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=3 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=recipe.width // 4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # others may be reading it
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        print(make(wanted, Path(sys.argv[1])))
