"""Folders of tiny models with the tokenizers of `tests/text/families.py`, and configs of runs with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.config.loading import load_config
from opd.config.schema import Config
from tests import tiny
from tests.text import families

QUESTIONS = [f"What is {i} + {j}?" for i in range(4) for j in range(4)]


def save(folder: Path, family: str, *, kind: str = "llama", seed: int = 1, **overrides: Any) -> str:
    """A random model whose tokenizer is of another family than `tiny`'s; returns the folder as a string."""
    words = families.hf(family)
    made = tiny.model(kind, vocab_size=max(words.get_vocab().values()) + 1, seed=seed, **overrides)
    made.generation_config.eos_token_id = words.eos_token_id
    made.config.eos_token_id = words.eos_token_id
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def world(folder: Path, *others: str) -> Path:
    """`student` and `own` have one tokenizer; every other folder is named by its family."""
    tiny.save(folder / "student", seed=0)
    tiny.save(folder / "own", "llama", seed=2)
    for seed, family in enumerate(others, start=3):
        save(folder / family, family, seed=seed)
    rows = [{"prompt": question, "completion": "The answer is 19."} for question in QUESTIONS]
    for name in ("math", "code"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, scorers: Mapping[str, Any], *terms: dict[str, Any], **sections: Any) -> Config:
    """A run with scorers by name: the model in a folder of the world, or a section."""
    objective = {
        "behaviour": sections.pop("behaviour", "student"),
        "terms": [{"name": f"t{i}", **t} for i, t in enumerate(terms)],
    }
    sources = [{"kind": "jsonl", "path": str(folder / f"{name}.jsonl")} for name in ("math", "code")]
    given = {
        "student": {"model": str(folder / "student")},
        "scorers": {
            name: {"model": str(folder / said)} if isinstance(said, str) else said for name, said in scorers.items()
        },
        "prompts": {"sources": sources, "per_step": 4},
        "sampling": {"max_tokens": 10, "samples_per_prompt": 2},
        "objective": objective,
    }
    return load_config([{**given, **sections}]).config
