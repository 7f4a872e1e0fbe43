"""The ways that are compared, as configs: the same student start, prompts per step, samples and updates for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from across_tokenizers import world
from across_tokenizers.models import MAX_TOKENS, ONE, tasks, write

STEPS, PER_STEP, SAMPLES = 60, 64, 4
PROBLEMS = 600  # held out
EVALS = 2
TUNING_SEED, TUNING_STEPS = 100, 25  # learning rates are chosen by it alone, at half the budget, on other problems
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Arm:
    """One way to learn from a teacher. lrs: the learning rates that are tried on `TUNING_SEED`."""

    name: str
    shown: str
    teacher: str
    objective: Mapping[str, Any]
    lrs: Sequence[float] = (2e-4, 5e-4, 1e-3)


FAR, NEAR, OWN = "unigram_teacher", "near_teacher", "bpe_teacher"
TEACHERS = {FAR: "a Unigram", NEAR: "another BPE", OWN: "the student's BPE"}
LOW, HIGH = (1e-4, 5e-4), (5e-4, 1e-3, 2e-3)  # for what breaks at the usual three, or wants more
_ALM = {"divergence": "reverse_kl", "tau": 1}
_TEACHER_WRITES = {"kind": "teacher"}
ARMS = (
    Arm("span", "span", FAR, {"preset": "span"}),
    Arm("alm_1", "alm, tau 1, reverse KL", FAR, {"preset": "alm", "parameters": _ALM}),
    Arm("same_full", "full", OWN, {"preset": "reverse_kl"}),
    Arm("same_sampled", "sampled", OWN, {"preset": "tml"}),
    Arm("sft", "SFT on its text", FAR, {"preset": "seqkd"}, HIGH),
    Arm("gold", "gold", FAR, {"preset": "gold"}),
    Arm("alm_text", "alm on its text", FAR, {"preset": "alm", "behaviour": _TEACHER_WRITES}, HIGH),
    Arm("strict_full", "strict, all shared", FAR, {"preset": "reverse_kl"}, LOW),
    Arm("strict_top_k", "strict, top 16", FAR, {"preset": "shared_top_k"}, LOW),
    Arm("near_strict_full", "strict, all shared", NEAR, {"preset": "reverse_kl"}),
    Arm("near_strict_top_k", "strict, top 16", NEAR, {"preset": "shared_top_k"}),
    Arm("near_span", "span", NEAR, {"preset": "span"}),
    Arm("near_gold", "gold", NEAR, {"preset": "gold"}),
    Arm("alm", "alm, tau 100, forward KL", FAR, {"preset": "alm"}, LOW),
    Arm("uld", "uld: by rank alone", FAR, {"preset": "uld"}, LOW),
    Arm("gold_token", "gold, match: token", FAR, {"preset": "gold", "parameters": {"match": "token"}}, LOW),
)


def config(
    arm: Arm, folder: Path, run_folder: Path, *, lr: float, seed: int, steps: int = STEPS, tuning: bool = False
) -> dict[str, Any]:
    """The run as `opd.distill` takes it. `folder` holds the models; data are written there."""
    prompts = folder / f"prompts-{seed}.jsonl"
    rows = world.problems("train", STEPS * PER_STEP, seed=1_000 + seed)
    write(prompts, [{"prompt": row["prompt"]} for row in rows])
    return {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / arm.teacher)},
        "prompts": {
            "sources": [{"kind": "jsonl", "path": str(prompts), "name": "order"}],
            "per_step": PER_STEP,
            "seed": seed,
        },
        "sampling": {"samples_per_prompt": SAMPLES, "max_tokens": MAX_TOKENS},
        "engine": {"slots": PER_STEP * SAMPLES},
        "objective": dict(arm.objective),
        "optim": {"lr": lr, "schedule": "cosine", "warmup_steps": 5},
        "evals": {
            "tasks": tasks(folder, ONE, problems=PROBLEMS, seed=3 if tuning else 2),
            "every": 0 if tuning else steps // EVALS,
            "teacher": not tuning,
        },
        "views": {"answers": 0},
        "run": {
            "folder": str(run_folder),
            "steps": steps,
            "seed": seed,
            "threads": 1,
            "log_every": steps // 4,
            "existing": "overwrite",
        },
    }
