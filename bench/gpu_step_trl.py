"""TRL's DistillationTrainer on the models and rows of `gpu_step.py`; run by it, in TRL's own environment.

    python bench/gpu_step_trl.py '{"student": {...}, "teacher": {...}, "rows": 64, ...}'

Prints the seconds of every step after the first `warm_up` as JSON. Nothing of opd is imported. Each step writes, scores
and trains all rows; where they do not fit into one micro-batch, `batch` of them at a time. With "vllm": true they are
written by vLLM in the same process (`vllm_mode="colocate"`), which has to be in that environment.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DistillationConfig, DistillationTrainer  # pyright: ignore[reportMissingImports]


class Clock(transformers.TrainerCallback):
    """Seconds of each optimiser step, its rollouts included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._last = _now()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = _now()
        self.seconds.append(now - self._last)
        self._last = now


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def words(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """One token per word; the last two words are padding and the end."""
    pad, end = f"w{vocab - 2}", f"w{vocab - 1}"
    backend = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocab)}, unk_token=pad))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, eos_token=end, padding_side="left"
    )


def model(config: dict, device: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**config), dtype=dtype)


def main() -> None:
    asked = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    narrow = torch.bfloat16 if device == "cuda" else torch.float32
    rng, V, rows = random.Random(0), asked["student"]["vocab_size"], asked["rows"]
    prompts = [" ".join(f"w{rng.randrange(V - 2)}" for _ in range(asked["prompt_tokens"])) for _ in range(rows)]
    steps, clock = asked["warm_up"] + asked["runs"], Clock()
    with tempfile.TemporaryDirectory() as folder:
        student, tokenizer = model(asked["student"], device, torch.float32), words(V)
        how: dict = {"generation_kwargs": {"min_new_tokens": asked["new_tokens"]}}
        if asked["vllm"]:
            student.save_pretrained(f"{folder}/student")  # vLLM reads a model from a folder
            tokenizer.save_pretrained(f"{folder}/student")
            student = type(student).from_pretrained(f"{folder}/student", dtype=torch.float32).to(device)
            how |= {"use_vllm": True, "vllm_mode": "colocate"}
            how["vllm_max_model_length"] = asked["prompt_tokens"] + asked["new_tokens"] + 1
        args = DistillationConfig(
            output_dir=folder,
            per_device_train_batch_size=asked["batch"],
            gradient_accumulation_steps=rows // asked["batch"],
            max_steps=steps,
            max_completion_length=asked["new_tokens"],
            **how,
            beta=1.0,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=model(asked["teacher"], device, narrow),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": prompts * steps}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
    print(json.dumps({"seconds": clock.seconds[asked["warm_up"] :]}))


if __name__ == "__main__":
    main()
