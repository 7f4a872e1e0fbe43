"""What test_trl.py runs in an environment with TRL: prints one line of JSON. Models are made on the spot.

PYTHONPATH has to hold src, examples and the folder above tests.
"""

from __future__ import annotations

import json
import tempfile
from typing import Any

import own_loss_in_trl as own
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from trl.experimental.gkd import GKDConfig, GKDTrainer

from opd.config.shapes import JensenShannon
from opd.config.slots import Full, TopK
from opd.objectives.oracle import divergences
from tests import tiny

BETA, K = 0.3, 4
ROWS = (("Sort: hgfe", "efgh"), ("What is 12 + 7?", "12 + 7 = 19"), ("hi", "the quick brown fox jumps"))
FULL = own.TERM.model_copy(update={"shape": JensenShannon(beta=BETA, normalised=False), "support": Full()})
TOP_K = own.TERM.model_copy(update={"support": TopK(kind="teacher_top_k", k=K)})


def trainer(made: type, folder: str, **options: Any) -> Any:
    """A trainer of the class over tiny models, always the same ones, in float64."""
    words = tiny.tokenizer()
    student, teacher = (tiny.model("qwen3", vocab_size=len(words), seed=seed).double() for seed in (0, 1))
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in ROWS]
    settings = {"max_steps": 1, "per_device_train_batch_size": 3, "temperature": 1.0, "max_new_tokens": 8, "beta": BETA}
    settings |= {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    settings |= {"save_strategy": "no", "lmbda": 0.0, "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1}
    return made(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(output_dir=folder, **{**settings, **options}),
        train_dataset=Dataset.from_list([{"messages": m} for m in rows]),
        processing_class=words,
    )


def gradient(of: Any, inputs: dict[str, Tensor], count: Any) -> tuple[float, Tensor]:
    of.model.zero_grad()
    loss = of.compute_loss(of.model, dict(inputs), num_items_in_batch=count)
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten() for p in of.model.parameters() if p.grad is not None])


def naive_top_k(of: Any, inputs: dict[str, Tensor]) -> tuple[float, Tensor]:
    """Mean over trained tokens of the reverse KL over the teacher's k likeliest and the rest, by autograd."""
    of.model.zero_grad()
    reading = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    logp, logq = (m(**reading).logits[:, :-1].log_softmax(-1) for m in (of.model, of.teacher_model))
    value = divergences.bucketed(divergences.reverse_kl)(logp, logq.detach(), divergences.top_k_mask(logq, K))
    loss = value[inputs["labels"][:, 1:] != own.IGNORED].mean()
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten() for p in of.model.parameters() if p.grad is not None])


def apart(ours: tuple[float, Tensor], theirs: tuple[float, Tensor]) -> dict[str, float]:
    gap, size = float((ours[1] - theirs[1]).norm()), float(theirs[1].norm())
    return {"loss": abs(ours[0] - theirs[0]) / abs(theirs[0]), "gradient": gap / size, "size": size}


def after_training(made: type, folder: str, **options: Any) -> tuple[Tensor, list[float]]:
    """The weights after training from the same seed, and the losses that were logged."""
    of = trainer(made, folder, **options)
    of.train()
    logged = [line["loss"] for line in of.state.log_history if "loss" in line]
    return torch.cat([p.detach().flatten() for p in of.model.parameters()]), logged


def counted(folder: str) -> dict[str, float]:
    """What an on-policy step is divided by, the tokens that the data has, and those that the student wrote."""
    seen: dict[str, float] = {"written": 0}

    class Watching(own.OwnLoss, GKDTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            seen["written"] += int((inputs["labels"] != own.IGNORED).sum())
            seen["divisor"] = float(num_items_in_batch)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    of = trainer(Watching, folder, lmbda=1.0, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    seen["data"] = sum(int((batch["labels"] != own.IGNORED).sum()) for batch in of.get_train_dataloader())
    of.train()
    return seen


def main() -> None:
    ours, theirs = own.trainer_class(), GKDTrainer
    found: dict[str, Any] = {"trl": trl.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as folder:
        one, other = trainer(ours, folder), trainer(theirs, folder)
        inputs = next(iter(one.get_train_dataloader()))
        lengths = (inputs["labels"] != own.IGNORED).sum(-1)
        found["prompts_differ"] = len({int(n) for n in inputs["prompt_attention_mask"].sum(-1)}) > 1
        found["answers_differ"] = len({int(n) for n in lengths}) > 1
        own.TERM = FULL
        for name, count in (("jsd", None), ("jsd_by_count", torch.tensor(17))):
            found[name] = apart(gradient(one, inputs, count), gradient(other, inputs, count))
        own.TERM = TOP_K
        found["top_k"] = apart(gradient(one, inputs, None), naive_top_k(one, inputs))
        own.TERM = FULL
        # The same seed draws the same answers, as long as the weights agree.
        for name, options in (
            ("data", {"lmbda": 0.0, "max_steps": 3}),
            ("student", {"lmbda": 1.0, "max_steps": 3}),
            ("accumulated", {"lmbda": 1.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
        ):
            (a, losses), (b, their_losses) = (after_training(made, folder, **options) for made in (ours, theirs))
            start = torch.cat([p.detach().flatten() for p in trainer(theirs, folder).model.parameters()])
            found[f"train_{name}"] = {
                "apart": float((a - b).norm()), "moved": float((b - start).norm()),
                "losses": losses, "their_losses": their_losses,
            }  # fmt: skip
        found["counted"] = counted(folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
