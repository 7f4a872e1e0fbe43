"""One side: `tiled_loss`. Started by run.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from kernel.setting import DTYPES, Inputs, Sizes, worker
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ReverseKL
from opd.config.slots import Full
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_loss
from opd.types import Head, ScorerRows


def reverse_kl(inputs: Inputs, chunk: int) -> Tensor:
    T, V = len(inputs.hidden_TD), len(inputs.weight_VD)
    ones_T = torch.ones(T)
    term = TermRows(DivergenceTerm(name="x", shape=ReverseKL(), support=Full()), ones_T / T, {"a": ones_T}, True)
    scorer = ScorerRows("a", ones_T.bool(), 1.0, hidden_TD=inputs.teacher_TD, head=Head(inputs.teacher_VD, V))
    rows = TokenRows(torch.zeros(T, dtype=torch.int64), torch.zeros(T))
    loss, _ = tiled_loss(
        inputs.hidden_TD, Head(inputs.weight_VD, V), rows, [term], [scorer], student_temperature=1.0, chunk_tokens=chunk
    )
    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    worker(lambda inputs: reverse_kl(inputs, sizes.chunk), Inputs.random(sizes, DTYPES[args.dtype]))


if __name__ == "__main__":
    main()
