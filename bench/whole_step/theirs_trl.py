"""The other side of a pair: a trainer of TRL, step by step, in an environment of its own. Started by run.py.

As a user would set it up for speed on this machine: no recomputation of activations, no saving, the whole batch in one
micro-batch, reverse KL, all answers by the student, and the same optimiser as opd's. GKDTrainer and GOLDTrainer ask
for data with answers; they get one of a token, which is not read when all answers are the student's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from datasets import Dataset
from gate import Gate, peak_megabytes
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "distillation": (DistillationTrainer, DistillationConfig),
    "gkd": (GKDTrainer, GKDConfig),
    "gold": (GOLDTrainer, GOLDConfig),
}
WORD = 5  # the token of an answer that nobody reads


class TakingTurns(TrainerCallback):
    """A step begins where its batch of prompts is there, before anything is written."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.gate.wait(megabytes=peak_megabytes())


def data(trainer: str, prompts: list[str], tokenizer: Any) -> Dataset:
    """The prompts in the columns that a trainer asks for."""
    if trainer == "distillation":
        return Dataset.from_dict({"prompt": prompts})
    ids_P = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    masks_P = [[0] * len(ids) + [1] for ids in ids_P]
    ids_P = [[*ids, WORD] for ids in ids_P]
    return Dataset.from_dict({"prompt": prompts, "input_ids": ids_P, "completion_mask": masks_P})


def own(trainer: str, case: dict[str, Any]) -> dict[str, Any]:
    """The options that one trainer has, or calls by another name."""
    tokens = case["max_tokens"]
    if trainer == "distillation":
        return {"max_completion_length": tokens, "shuffle_dataset": False}
    longest = case["prompt_tokens"][1] + tokens
    if trainer == "gkd":
        return {"max_new_tokens": tokens, "lmbda": 1.0, "max_length": longest}
    return {"max_completion_length": tokens, "lmbda": 1.0, "max_length": longest, "top_p": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trainer", choices=TRAINERS, default="distillation")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "best"), required=True)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    case = json.loads((args.folder / "case.json").read_text())
    rows = case["prompts"] * case["samples"]
    prompts = [json.loads(line)["prompt"] for line in (args.folder / "prompts.jsonl").read_text().splitlines()]
    best = args.precision == "best"
    tokenizer = AutoTokenizer.from_pretrained(args.folder / "student", padding_side="left")
    gate = Gate()
    kind, config = TRAINERS[args.trainer]
    trainer = kind(
        model=str(args.folder / "student"),
        teacher_model=str(args.folder / "teacher"),
        args=config(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=rows,
            learning_rate=args.lr,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            beta=1.0,
            temperature=1.0,
            gradient_checkpointing=False,
            bf16=best,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            teacher_model_init_kwargs={"dtype": "bfloat16" if best else "float32"},
            model_init_kwargs={"dtype": "float32"},
            **own(args.trainer, case),
        ),
        train_dataset=data(args.trainer, [p for p in prompts for _ in range(case["samples"])], tokenizer),
        processing_class=tokenizer,
        callbacks=[TakingTurns(gate)],
    )
    trainer.train()
    student = args.out / "student"
    trainer.save_model(str(student))
    steps = [line for line in trainer.state.log_history if "loss" in line]
    gate.done(steps=steps, megabytes=peak_megabytes(), student=str(student))


if __name__ == "__main__":
    main()
