"""Makes the demo's teacher and student from nothing: `make demo-models`. Minutes on two cores; the result is shipped.

Both learn to sort by SFT on worked examples, through the same `opd train` path as everything else. The teacher is wider
and sees many problems. The student is smaller and sees a few hundred over and over: it knows those by heart and gets
a good part of the new ones wrong, which is where a user's own student starts from, too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from opd.lab.worlds import sorting

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Recipe:
    """How one of the two is trained: `problems` worked examples, `steps` updates of `batch` of them."""

    config: Qwen3Config
    problems: int
    steps: int
    batch: int
    lr: float
    seed: int


RECIPES = {
    "teacher": Recipe(sorting.teacher_config(), problems=100_000, steps=800, batch=128, lr=3e-3, seed=0),
    "student": Recipe(sorting.student_config(), problems=700, steps=800, batch=128, lr=2e-3, seed=1),
}


def main() -> None:
    """Trains both and replaces the shipped folders."""
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as work:
            final = train(name, recipe, Path(work))
            shutil.rmtree(MODELS / name, ignore_errors=True)
            shutil.copytree(final, MODELS / name, ignore=shutil.ignore_patterns("README.md"))


def train(name: str, recipe: Recipe, work: Path) -> Path:
    """The folder of the trained model."""
    import opd

    torch.manual_seed(recipe.seed)
    start = work / f"{name}-start"
    AutoModelForCausalLM.from_config(recipe.config).save_pretrained(start)
    sorting.tokenizer().save_pretrained(start)
    _write(work / "examples.jsonl", sorting.problems("train", recipe.problems, seed=recipe.seed + 100))
    _write(work / "heldout.jsonl", sorting.problems("heldout", 1000, seed=2))
    task = {"name": "sorting", "grader": {"kind": "exact"}}
    task["source"] = {"kind": "jsonl", "path": str(work / "heldout.jsonl"), "name": "heldout"}
    run = opd.distill(
        student=str(start),
        prompts={
            "sources": [{"kind": "jsonl", "path": str(work / "examples.jsonl"), "name": "examples"}],
            "per_step": recipe.batch,
        },
        objective={"preset": "sft"},
        sampling={"max_tokens": sorting.LETTERS + 2},
        engine={"slots": 256},
        optim={"lr": recipe.lr, "schedule": "cosine", "warmup_steps": 20},
        evals={"tasks": [task]},
        run={"folder": str(work / name), "steps": recipe.steps, "seed": recipe.seed, "threads": 1, "log_every": 100},
    )
    return run.student


def _write(path: Path, rows: list[sorting.Problem]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
