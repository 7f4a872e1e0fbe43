"""Before speed is compared: do both sides do the same thing?

    python bench/whole_step/quality.py --peer-python .env-trl/bin/python

Two things must agree. The loss of the untrained student: the mean over `--same` steps that hardly train, within three
standard errors of the difference (each side draws its own answers). And what is learnt: KL(student || teacher) on
sequences that nobody trained on, after the same number of steps of the same size, within a tenth of what was gained.
Exit status 1 when they do not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from results import record
from transformers import AutoModelForCausalLM
from whole_step.cases import CASES, make
from whole_step.run import start

STANDARD_ERRORS, SHARE = 3.0, 0.1
HARDLY = 1e-9  # a learning rate
SEQUENCES, TOKENS = 64, 64


@torch.no_grad()
def held_out(folder: Path) -> torch.Tensor:
    """[SEQUENCES, prompt + TOKENS] that the untrained student wrote to prompts of its own."""
    student = AutoModelForCausalLM.from_pretrained(folder / "student")
    torch.manual_seed(99)
    ids = torch.randint(2, student.config.vocab_size, (SEQUENCES, 16))
    return student.generate(ids, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS)


@torch.no_grad()
def divergence(student: Path, teacher: Path, ids_NS: torch.Tensor) -> float:
    """KL(student || teacher) per token."""
    logp, logq = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids_NS).logits[:, 15:-1].log_softmax(-1)
        for path in (student, teacher)
    )
    return float((logp.exp() * (logp - logq)).sum(-1).mean())


def losses(side: str, python: str, folder: Path, work: Path, *, steps: int, lr: float, precision: str) -> Any:
    """What a side says at its end."""
    return start(side, python, folder, work / f"{side}-{lr:g}", steps=steps, precision=precision, lr=lr).finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="v408")
    parser.add_argument("--precision", choices=("fp32", "best"), default="fp32")
    parser.add_argument("--peer-python", required=True, help="python of TRL's environment")
    parser.add_argument("--same", type=int, default=12, help="steps that hardly train")
    parser.add_argument("--steps", type=int, default=60, help="steps that train")
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    pythons = {"ours": sys.executable, "trl": args.peer_python}
    with tempfile.TemporaryDirectory() as temporary:
        work, folder = Path(temporary), Path(temporary) / args.case
        make(CASES[args.case], folder)
        first: dict[str, list[float]] = {}
        learnt: dict[str, float] = {}
        ids_NS = held_out(folder)
        before = divergence(folder / "student", folder / "teacher", ids_NS)
        for side, python in pythons.items():
            same = losses(side, python, folder, work, steps=args.same, lr=HARDLY, precision=args.precision)
            first[side] = [step["loss"] for step in same["steps"]]
            told = losses(side, python, folder, work, steps=args.steps, lr=args.lr, precision=args.precision)
            learnt[side] = divergence(Path(told["student"]), folder / "teacher", ids_NS)
    means = {side: statistics.mean(values) for side, values in first.items()}
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in first.values()))
    far, gained = abs(means["ours"] - means["trl"]), before - learnt["trl"]
    found = {
        "loss": means,
        "loss_apart_in_standard_errors": far / error,
        "held_out_kl": {"before": before, **learnt},
        "steps": args.steps,
        "passed": far <= STANDARD_ERRORS * error and abs(learnt["ours"] - learnt["trl"]) <= SHARE * gained,
    }
    record(("quality", args.case, args.precision), found)
    print(f"first loss: ours {means['ours']:.4f}, TRL {means['trl']:.4f}, {far / error:.1f} standard errors apart")
    print(
        f"held-out KL: {before:.4f} before, after {args.steps} steps ours {learnt['ours']:.4f}, TRL {learnt['trl']:.4f}"
    )
    if not found["passed"]:
        raise SystemExit("the two sides do not do the same thing: comparing their speed would say nothing")


if __name__ == "__main__":
    main()
