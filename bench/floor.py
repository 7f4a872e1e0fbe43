"""How close a whole step comes to its own matrix products, each made alone by the fastest product there is.

    python bench/floor.py --case v152k --rounds 5

Counted are the products with weights: the least that a step cannot do without. A prompt is read once, the last token of
an answer never. Attention, norms, softmax, the optimiser and the record are not in the floor. Two floors:

    own_shapes  the sum of seconds of these products at their own shapes, one layer's weights after another's, as a
                model reads them. Products of a few rows are bound by reading weights, and here they may be.
    peak_rate   the FLOPs of the step at the rate of the fastest product of any shape in the same run.

Floor and step are measured in turn, each in a process of its own. What is recorded under `efficiency` is the share of
the step that its floor is, of the whole and of its parts: writing answers, reading them by the teacher, updating.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from gate import Gate, Worker, in_turn
from results import LATEST, interval, record
from torch import Tensor
from whole_step.cases import CASES, SHARED, STUDENT, TEACHER, Case, make
from whole_step.run import start

from opd.config.schema import Learner
from opd.objectives.freed_memory import keep_freed_memory
from opd.objectives.product import HAS_ONEDNN, product, product_into

DTYPES = {"fp32": torch.float32, "best": torch.bfloat16}
PARTS = {"decode": "rollout", "scoring": "scoring", "update": "update"}  # as this file and as a run call them
SAMPLED = 16  # of the steps of decoding: they are all alike
TRIES, LONG = 3, 0.05  # seconds
PACKED_ROWS = 64  # products of so many rows may have their weight packed


@dataclass(frozen=True)
class Shape:
    """left [rows, inner] @ right [outer, inner].T"""

    rows: int
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer


LARGE = (Shape(512, 1024, 1024), Shape(1024, 1024, 1024), Shape(2048, 2048, 2048))  # the fastest may be none of a step


@dataclass(frozen=True)
class Chain:
    """Products that follow each other, `times` times in a step; every one has a weight of its own."""

    part: str
    shapes: Sequence[Shape]
    times: int = 1

    @property
    def flops(self) -> int:
        return self.times * sum(shape.flops for shape in self.shapes)


def body(rows: int, model: dict[str, int]) -> list[Shape]:
    """The forward products of all layers; those with the same input are one."""
    hidden, middle, width = model["hidden_size"], model["intermediate_size"], SHARED["head_dim"]
    heads, kv = model["num_attention_heads"], SHARED["num_key_value_heads"]
    layer = [
        Shape(rows, hidden, (heads + 2 * kv) * width),
        Shape(rows, heads * width, hidden),
        Shape(rows, hidden, 2 * middle),
        Shape(rows, middle, hidden),
    ]
    return layer * model["num_hidden_layers"]


def backward(shapes: Sequence[Shape]) -> Iterator[Shape]:
    """The gradients of both factors."""
    for shape in shapes:
        yield Shape(shape.rows, shape.outer, shape.inner)
        yield Shape(shape.outer, shape.rows, shape.inner)


def chains(case: Case, tile: int) -> list[Chain]:
    """The products of one step; tile: tokens at a time in the pass over the vocabulary."""
    prompt = (case.prompt_tokens[0] + case.prompt_tokens[1]) // 2
    student, teacher, V = STUDENT["hidden_size"], TEACHER["hidden_size"], case.vocab
    asked = case.prompts * prompt
    read = asked + case.rows * (case.max_tokens - 1)
    forward = body(read, STUDENT)
    made = [
        Chain("decode", [*body(asked, STUDENT), Shape(case.prompts, student, V)]),
        Chain("decode", [*body(case.rows, STUDENT), Shape(case.rows, student, V)], case.max_tokens - 1),
        Chain("scoring", body(read, TEACHER)),
        Chain("update", [*forward, *backward(forward)]),
    ]
    whole, rest = divmod(case.rows * case.max_tokens, tile)
    for tokens, times in ((tile, whole), (rest, 1)):
        if tokens and times:
            logits = Shape(tokens, student, V)
            made.append(Chain("update", [logits, Shape(tokens, teacher, V), *backward([logits])], times))
    return made


class Products:
    """The products of a step, with numbers to multiply."""

    def __init__(self, listed: Sequence[Chain], dtype: torch.dtype) -> None:
        keep_freed_memory()
        self._chains, self._dtype = listed, dtype
        self._best: dict[Shape, int] = {}
        self._random = torch.Generator().manual_seed(0)
        self._works = [[self._fastest(shape) for shape in chain.shapes] for chain in listed]
        self._large = [(shape, self._fastest(shape)) for shape in LARGE]
        self.flops = sum(chain.flops for chain in listed)
        self.rate = 0.0  # FLOP/s of the fastest product so far

    def seconds(self) -> dict[str, float]:
        """Of every part, in one step."""
        found = dict.fromkeys(PARTS, 0.0)
        for chain, works in zip(self._chains, self._works, strict=True):
            tries = min(chain.times, SAMPLED)
            for _ in range(tries):
                for shape, work in zip(chain.shapes, works, strict=True):
                    spent = _seconds(work)
                    self.rate = max(self.rate, shape.flops / spent)
                    found[chain.part] += spent * chain.times / tries
        for shape, work in self._large:
            self.rate = max(self.rate, shape.flops / min(_seconds(work) for _ in range(TRIES)))
        return found

    def _fastest(self, shape: Shape) -> Callable[[], object]:
        """The best of what is there, found by trying where this shape is new."""
        works = list(self._ways(shape))
        if shape not in self._best:
            self._best[shape] = min(range(len(works)), key=lambda n: _tried(works[n]))
        return works[self._best[shape]]

    def _ways(self, shape: Shape) -> Iterator[Callable[[], object]]:
        left, right = self._matrix(shape.rows, shape.inner), self._matrix(shape.outer, shape.inner)
        into = torch.zeros(shape.rows, shape.outer, dtype=self._dtype)
        yield lambda: left @ right.T
        yield lambda: torch.mm(left, right.T, out=into)
        if self._dtype == torch.float32:
            yield lambda: product(left, right)
            yield lambda: product_into(left, right, into)
        if HAS_ONEDNN and shape.rows <= PACKED_ROWS:
            packed = torch.ops.mkldnn._reorder_linear_weight(right, shape.rows)
            yield lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")

    def _matrix(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=self._random).to(self._dtype)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _tried(work: Callable[[], object]) -> float:
    """Seconds of the best try behind one that is not counted; one try will do where it takes long."""
    work()
    first = _seconds(work)
    return first if first > LONG else min(first, *(_seconds(work) for _ in range(TRIES)))


def worker(case: Case, precision: str) -> None:
    """The floor as a side that takes turns: every step of it times all products once."""
    gate = Gate()
    products = Products(chains(case, Learner().chunk_tokens), DTYPES[precision])
    with torch.inference_mode():
        products.seconds()
        gate.wait()
        while True:
            found = products.seconds()
            gate.wait(parts=found, flops=products.flops, rate=products.rate)


def measure(case: Case, precision: str, rounds: int, work: Path) -> dict[str, Any]:
    """What is recorded under `efficiency.<precision>`."""
    folder = work / case.name
    if not folder.exists():
        make(case, folder)
    floor = Worker([sys.executable, __file__, "--worker", "--case", case.name, "--precision", precision])
    step = start("ours", sys.executable, folder, work / "run", steps=rounds + 2, precision=precision)
    said, seconds = [], []
    in_turn({"floor": floor, "step": step}, rounds=0)
    for _ in range(rounds):
        floor.step()
        said.append(floor.last)
        seconds.append(step.step())
    for side in (floor, step):
        side.stop()
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    spent = {
        name: [now[f"seconds_{phase}"] - then[f"seconds_{phase}"] for then, now in pairwise(lines[: rounds + 1])]
        for name, phase in PARTS.items()
    }
    own = [sum(one["parts"].values()) for one in said]
    parts = {name: share([one["parts"][name] for one in said], spent[name], measured="measured") for name in PARTS}
    rest = [whole - sum(one) for whole, *one in zip(seconds, *spent.values(), strict=True)]
    return {
        "case": case.name,
        "own_shapes": share(own, seconds),
        "peak_rate": share([one["flops"] / one["rate"] for one in said], seconds),
        "parts": parts,
        "rest": statistics.median(rest),
        "flops": said[-1]["flops"],
        "best_product_flops_per_second": said[-1]["rate"],
        "rounds": rounds,
    }


def share(floor: Sequence[float], spent: Sequence[float], *, measured: str = "step") -> dict[str, float]:
    """Medians, and of floor / step the median with its interval."""
    shares = [least / whole for least, whole in zip(floor, spent, strict=True)]
    low, high = interval(shares)
    medians = {"floor": statistics.median(floor), measured: statistics.median(spent)}
    return medians | {"share": statistics.median(shares), "low": low, "high": high}


def line(name: str, floor: float, spent: float, found: dict[str, float]) -> str:
    return f"| {name} | {floor:.2f} | {spent:.2f} | {found['share']:.2f} ({found['low']:.2f} to {found['high']:.2f}) |"


def main() -> None:
    fixed = [name for name, case in CASES.items() if not case.hazard]  # of the others the lengths are not known before
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=fixed, default="v152k")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--file", type=Path, default=LATEST, help="where the figures are kept")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = CASES[args.case]
    if args.worker:
        worker(case, *args.precision)
    print(f"{case.name}: {case.says}\n\n| part | products alone, s | measured, s | share |\n|---|---|---|---|")
    for precision in args.precision:
        with tempfile.TemporaryDirectory() as work:
            found = measure(case, precision, args.rounds, Path(work))
        record(("efficiency", precision), found, file=args.file)
        for name, one in {"own_shapes": found["own_shapes"], "peak_rate": found["peak_rate"]}.items():
            print(line(f"{precision}, {name}", one["floor"], one["step"], one))
        for name, one in found["parts"].items():
            print(line(f"{precision}, {name}", one["floor"], one["measured"], one), flush=True)


if __name__ == "__main__":
    main()
