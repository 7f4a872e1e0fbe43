"""Time and memory of the pass on a CUDA device: the tiled one, the one with Triton kernels, their matrix products.

    python bench/gpu_kernel.py --runs 20

Every case (a shape on a support) is made by both passes, and by the four matrix products of every tile alone. They run
in turn, timed by CUDA events; memory is the peak of what torch allocates above weights, inputs and gradients. Both
passes are compared once before they are timed. Figures are printed as a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ForwardKL, JensenShannon, ReverseKL, Shape
from opd.config.slots import Full, Sampled, Support, TopK
from opd.errors import ConfigError
from opd.objectives.head import wide_product
from opd.objectives.kernels.choice import TILED, Kernel, choose_kernel
from opd.objectives.kernels.rows import TermRows, TokenRows
from opd.types import Head, ScorerRows

CASES: dict[str, tuple[Shape, Support]] = {
    "reverse": (ReverseKL(), Full()),
    "forward": (ForwardKL(), Full()),
    "jsd": (JensenShannon(), Full()),
    "sampled": (ReverseKL(), Sampled()),
    "teacher_top_k": (ReverseKL(), TopK(kind="teacher_top_k", k=32)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEGABYTE = 1e6
WARM_UP = 3


@dataclass
class Setting:
    """Random models of logits about N(0, 1), and a term of weight 1 / T at every token."""

    tokens: int
    vocab: int
    student_width: int
    teacher_width: int
    tile: int
    dtype: torch.dtype
    case: str
    hidden_TD: Tensor = field(init=False)
    weight_VD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        T, V = self.tokens, self.vocab
        self.hidden_TD = self._random(T, self.student_width).requires_grad_()
        self.weight_VD = self._random(V, self.student_width, self.student_width**-0.5).requires_grad_()
        teacher_TD, teacher_VD = (
            self._random(T, self.teacher_width),
            self._random(V, self.teacher_width, self.teacher_width**-0.5),
        )
        ones_T = torch.ones(T, device="cuda")
        self.rows = TokenRows(torch.randint(0, V, (T,), device="cuda"), torch.zeros(T, device="cuda"))
        shape, support = CASES[self.case]
        self.term = TermRows(DivergenceTerm(name="x", shape=shape, support=support), ones_T / T, {"a": ones_T}, True)
        self.scorer = ScorerRows("a", ones_T.bool(), 1.0, hidden_TD=teacher_TD, head=Head(teacher_VD, V))

    def _random(self, rows: int, width: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(rows, width, device="cuda") * scale).to(self.dtype)

    def run(self, kernel: Kernel) -> None:
        self.hidden_TD.grad = self.weight_VD.grad = None
        loss, _ = kernel.loss(
            self.hidden_TD,
            Head(self.weight_VD, self.vocab),
            self.rows,
            [self.term],
            [self.scorer],
            student_temperature=1.0,
            chunk_tokens=self.tile,
        )
        loss.backward()

    @torch.no_grad()
    def products(self) -> None:
        """The matrix products of the pass alone: 2 T V (3 D_s + D_t) FLOPs."""
        teacher_TD, head = self.scorer.hidden_TD, self.scorer.head
        assert teacher_TD is not None and head is not None
        dweight_VD = torch.zeros(self.weight_VD.shape, device="cuda")
        for start in range(0, self.tokens, self.tile):
            tile = slice(start, min(start + self.tile, self.tokens))
            logits_CV = wide_product(self.hidden_TD[tile], self.weight_VD.T).to(self.dtype)
            wide_product(teacher_TD[tile], head.weight_VD.T)
            logits_CV @ self.weight_VD
            dweight_VD += wide_product(logits_CV.T, self.hidden_TD[tile])

    def gradients(self, kernel: Kernel) -> list[Tensor]:
        self.run(kernel)
        assert self.hidden_TD.grad is not None and self.weight_VD.grad is not None
        return [self.hidden_TD.grad.float(), self.weight_VD.grad.float()]


def milliseconds(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def extra_memory(setting: Setting, kernel: Kernel) -> float:
    """Megabytes at the peak, above weights, inputs and gradients."""
    setting.run(kernel)  # makes the gradients, and what is made once
    there = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    setting.run(kernel)
    return (torch.cuda.max_memory_allocated() - there) / MEGABYTE


def line(setting: Setting, triton: Kernel, runs: int) -> str:
    expected, ours = setting.gradients(TILED), setting.gradients(triton)
    far = max(float((x - y).norm() / y.norm()) for x, y in zip(ours, expected, strict=True))
    works: dict[str, Callable[[], None]] = {
        "products": setting.products,
        "tiled": lambda: setting.run(TILED),
        "triton": lambda: setting.run(triton),
    }
    for work in works.values():
        for _ in range(WARM_UP):
            work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(runs):
        for name, work in works.items():
            found[name].append(milliseconds(work))
    times = {name: statistics.median(values) for name, values in found.items()}
    cells = [setting.case, *(f"{times[n]:.2f} ({min(found[n]):.2f} to {max(found[n]):.2f})" for n in works)]
    cells += [f"{times['tiled'] / times['triton']:.2f}", f"{times['triton'] / times['products']:.2f}"]
    cells += [f"{extra_memory(setting, kernel):.0f}" for kernel in (TILED, triton)]
    return f"| {' | '.join([*cells, f'{far:.1e}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = {"tokens": 4096, "vocab": 151936, "student_width": 1024, "teacher_width": 4096, "tile": 512}
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--case", choices=CASES, action="append", help="may come several times; all without it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench/gpu_kernel.py needs a CUDA device, and torch sees none")
    try:
        triton = choose_kernel("triton", torch.device("cuda"))
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    chosen = {name: getattr(args, name) for name in sizes}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.dtype}, {chosen}, {args.runs} runs")
    print("| term | products, ms | tiled, ms | triton, ms | tiled / triton | triton / products | tiled, MB", end="")
    print(" | triton, MB | gradients apart |\n|---|---|---|---|---|---|---|---|---|")
    for case in args.case or CASES:
        print(line(Setting(**chosen, dtype=DTYPES[args.dtype], case=case), triton, args.runs), flush=True)


if __name__ == "__main__":
    main()
