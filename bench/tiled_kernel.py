"""Time and memory of the tiled pass, against its own matrix products, on the CPU.

    python bench/tiled_kernel.py --threads 2 --runs 5

For every case (a shape on a support) two children are started, so that no measurement inherits memory of another:

    memory  the peak of resident memory during loss and backward, above weights, inputs and gradients;
    time    medians of loss plus backward, and of the matrix products alone: the same four of every tile, by the same
            library, into memory that is there already. Both run in turn in one process, so that a busy machine slows
            both. The ratio of processor time stands beside that of wall time: a busy machine changes it least.

Figures are printed as a Markdown table and kept in bench/results/latest.json under `products`. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from results import LATEST, record
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ForwardKL, JensenShannon, ReverseKL, Shape
from opd.config.slots import Full, Sampled, Support, TopK
from opd.objectives.freed_memory import keep_freed_memory
from opd.objectives.kernels.head_gradient import HeadGradient
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_loss
from opd.objectives.product import product_into
from opd.types import Head, ScorerRows

CASES: dict[str, tuple[Shape, Support]] = {
    "reverse": (ReverseKL(), Full()),
    "forward": (ForwardKL(), Full()),
    "jsd": (JensenShannon(), Full()),
    "sampled": (ReverseKL(), Sampled()),
    "teacher_top_k": (ReverseKL(), TopK(kind="teacher_top_k", k=32)),
}
MEGABYTE = 1e6


@dataclass(frozen=True)
class Sizes:
    """tokens T, vocab V, widths D of student and teacher; tile: tokens whose logits exist at the same time."""

    tokens: int = 2048
    vocab: int = 151936
    student_width: int = 256
    teacher_width: int = 512
    tile: int = 512


@dataclass
class Setting:
    """Random float32 models of logits about N(0, 1), and a term of weight 1 / T at every token."""

    sizes: Sizes
    case: str
    hidden_TD: Tensor = field(init=False)
    weight_VD: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        T, V = self.sizes.tokens, self.sizes.vocab
        self.hidden_TD = torch.randn(T, self.sizes.student_width).requires_grad_()
        self.weight_VD = (torch.randn(V, self.sizes.student_width) / self.sizes.student_width**0.5).requires_grad_()
        self.teacher_TD = torch.randn(T, self.sizes.teacher_width)
        self.teacher_VD = torch.randn(V, self.sizes.teacher_width) / self.sizes.teacher_width**0.5
        self.rows = TokenRows(torch.randint(0, V, (T,)), torch.zeros(T))
        ones_T = torch.ones(T)
        shape, support = CASES[self.case]
        self.term = TermRows(
            DivergenceTerm(name=self.case, shape=shape, support=support), ones_T / T, {"a": ones_T}, True
        )
        head = Head(self.teacher_VD, V)
        self.scorer = ScorerRows("a", ones_T.bool(), 1.0, hidden_TD=self.teacher_TD, head=head)

    def loss_and_gradients(self) -> None:
        self.hidden_TD.grad = self.weight_VD.grad = None
        head = Head(self.weight_VD, self.sizes.vocab)
        options = {"student_temperature": 1.0, "chunk_tokens": self.sizes.tile}
        loss, _ = tiled_loss(self.hidden_TD, head, self.rows, [self.term], [self.scorer], **options)
        loss.backward()

    @property
    def gradient_bytes(self) -> int:
        return 4 * (self.hidden_TD.numel() + self.weight_VD.numel())


class Products:
    """The matrix products of the pass alone: 2 T V (3 D_s + D_t) FLOPs."""

    def __init__(self, of: Setting) -> None:
        keep_freed_memory()
        self.of = of
        self.student_CV, self.teacher_CV = (torch.zeros(of.sizes.tile, of.sizes.vocab) for _ in range(2))
        states_TD, shape_VD = of.hidden_TD.detach(), of.weight_VD.shape
        self.gradient = HeadGradient(states_TD, shape_VD, torch.float32, hidden=True, weight=True)

    @torch.no_grad()
    def run(self) -> None:
        of, step = self.of, self.of.sizes.tile
        for start in range(0, of.sizes.tokens, step):
            tile = slice(start, min(start + step, of.sizes.tokens))
            logits_CV = product_into(of.hidden_TD[tile], of.weight_VD, self.student_CV[: tile.stop - start])
            product_into(of.teacher_TD[tile], of.teacher_VD, self.teacher_CV[: tile.stop - start])
            self.gradient.add(tile, logits_CV, of.weight_VD)

    @property
    def flops(self) -> int:
        sizes = self.of.sizes
        return 2 * sizes.tokens * sizes.vocab * (3 * sizes.student_width + sizes.teacher_width)


def measure_memory(sizes: Sizes, case: str) -> dict[str, float]:
    """Megabytes at the peak of the first pass over these tokens, above what has to be there."""
    # Libraries load and threads start before the count begins.
    Setting(replace(sizes, tokens=4, vocab=1000, tile=4), case).loss_and_gradients()
    setting = Setting(sizes, case)
    before = _status("VmRSS")
    _forget_the_peak()
    setting.loss_and_gradients()
    return {"extra_mb": (_status("VmHWM") - before - setting.gradient_bytes) / MEGABYTE}


def measure_time(sizes: Sizes, case: str, runs: int) -> dict[str, list[float]]:
    """Seconds of every run, in turn: of the clock, and of the processor ("cpu_...", all threads)."""
    setting = Setting(sizes, case)
    products = Products(setting)
    setting.loss_and_gradients()
    products.run()
    works = {"products": products.run, "pass": setting.loss_and_gradients}
    found: dict[str, list[float]] = {f"{clock}{name}": [] for clock in ("", "cpu_") for name in works}
    for _ in range(runs):
        for name, work in works.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            work()
            found[name].append(time.perf_counter() - start)
            found[f"cpu_{name}"].append(time.process_time() - cpu_start)
    return found


def _status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _forget_the_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _child(what: str, case: str, args: argparse.Namespace) -> dict:
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    environment.pop("OMP_WAIT_POLICY", None)  # as a user has it; asleep between operations, small ones wait to wake up
    environment["MALLOC_ARENA_MAX"] = "2"  # arenas of idle threads would count as memory of the pass
    given = [f"--{name.replace('_', '-')}={value}" for name, value in vars(_sizes(args)).items()]
    command = [sys.executable, __file__, f"--child={what}", f"--case={case}", f"--runs={args.runs}", *given]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def _sizes(args: argparse.Namespace) -> Sizes:
    return Sizes(**{name: getattr(args, name) for name in vars(Sizes())})


def _summary(memory: dict[str, float], times: dict[str, list[float]]) -> dict[str, float]:
    """What is kept of a case: seconds, their ratio run by run, and memory."""
    ratios = sorted(x / y for x, y in zip(times["pass"], times["products"], strict=True))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "products": medians["products"],
        "pass": medians["pass"],
        "ratio_median": medians["pass"] / medians["products"],
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
        "of_cpu_time": medians["cpu_pass"] / medians["cpu_products"],
        "extra_mb": memory["extra_mb"],
        "runs": len(ratios),
    }


def _line(case: str, memory: dict[str, float], times: dict[str, list[float]]) -> str:
    ours, alone = times["pass"], times["products"]
    ratios = sorted(x / y for x, y in zip(ours, alone, strict=True))
    cells = [
        case,
        f"{statistics.median(alone):.2f} ({min(alone):.2f} to {max(alone):.2f})",
        f"{statistics.median(ours):.2f} ({min(ours):.2f} to {max(ours):.2f})",
        f"{statistics.median(ours) / statistics.median(alone):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{statistics.median(times['cpu_pass']) / statistics.median(times['cpu_products']):.2f}",
        f"{memory['extra_mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--case", choices=CASES, action="append", help="may come several times; all without it")
    parser.add_argument("--file", type=Path, default=LATEST, help="where the figures are kept")
    parser.add_argument("--child", choices=("memory", "time"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = _sizes(args)
    if args.child is not None:
        (case,) = args.case
        found = measure_memory(sizes, case) if args.child == "memory" else measure_time(sizes, case, args.runs)
        print(json.dumps(found))
        return
    print(f"{sizes}; torch {torch.__version__}, {args.threads} threads, median (least to most) of {args.runs} runs")
    print("| term | products alone, s | pass, s | ratio | of CPU time | extra memory, MB |\n|---|---|---|---|---|---|")
    for case in args.case or CASES:
        memory, times = _child("memory", case, args), _child("time", case, args)
        record(("products", case), _summary(memory, times), file=args.file)
        print(_line(case, memory, times), flush=True)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
