"""A short run with everything in it: several micro-batches, evaluations, views, checkpoints, a schedule."""

from __future__ import annotations

import json
from pathlib import Path


def arguments(world: Path, run: Path, **changes: object) -> list[str]:
    source = {"kind": "jsonl", "path": str(world / "prompts.jsonl")}
    task = {"name": "sums", "grader": {"kind": "exact"}, "source": {**source, "limit": 3}}
    options = {
        "student.model": world / "student",
        "teacher.model": world / "teacher",
        "prompts.sources": json.dumps([source]),
        "prompts.per_step": 4,
        "sampling.samples_per_prompt": 2,
        "sampling.max_tokens": 6,
        "optim.lr": 1e-2,
        "optim.schedule": "cosine",
        "optim.warmup_steps": 2,
        "learner.tokens_per_micro_batch": 64,
        "evals.tasks": json.dumps([task]),
        "evals.every": 2,
        "views.answers": 2,
        "views.every": 3,
        "checkpoints.every": 2,
        "checkpoints.best": "true",
        "run.steps": 6,
        "run.threads": 1,
        "run.folder": run,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return ["train", *(f"{key}={value}" for key, value in options.items())]
