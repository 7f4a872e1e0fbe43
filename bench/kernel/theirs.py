"""The other sides: TRL's chunked divergence, as its trainer calls it, and Liger's chunked fused linear JSD, compiled.
Started by run.py in an environment that has both. In both a beta of 1 is the reverse KL.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from kernel.setting import DTYPES, Inputs, Loss, Sizes, worker


def trl() -> Loss:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    def loss(inputs: Inputs) -> torch.Tensor:
        made, _, _ = _chunked_divergence_loss(
            inputs.hidden_TD[None],
            inputs.teacher_TD[None],
            inputs.weight_VD,
            inputs.teacher_VD,
            torch.ones(1, len(inputs.hidden_TD), dtype=torch.int64),
            1.0,
        )
        return made

    return loss


def liger(chunk: int) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    made = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, chunk_size=chunk)

    def loss(inputs: Inputs) -> torch.Tensor:
        label_T = torch.zeros(len(inputs.hidden_TD), dtype=torch.int64)
        return made(inputs.hidden_TD, inputs.weight_VD, inputs.teacher_TD, inputs.teacher_VD, label_T)

    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", choices=("trl", "liger"), required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    worker(trl() if args.peer == "trl" else liger(sizes.chunk), Inputs.random(sizes, DTYPES[args.dtype]))


if __name__ == "__main__":
    main()
