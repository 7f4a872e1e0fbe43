"""The tables of docs/benchmarks.md, from bench/results/latest.json: what is between `<!-- name -->` and `<!-- end -->`.

python bench/page.py            writes the page
python bench/page.py --check    fails where the page is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from results import LATEST

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BLOCK = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)
SAYS = {
    "v408": "8 x 128 new tokens, V = 408",
    "v32k": "8 x 128 new tokens, V = 32,768",
    "v152k": "8 x 128 new tokens, V = 151,936",
    "ragged": "64 prompts, answers of 1 to 256 tokens, V = 408",
    "grouped": "8 answers of 64 tokens to each of 4 prompts of 512, V = 408",
}  # the cases of whole_step/cases.py, which needs torch
PRECISIONS = ("fp32", "best")
DTYPES = ("fp32", "bf16")
PEERS = {"trl": "TRL", "liger": "Liger"}
TERMS = {
    "reverse": "reverse KL, full vocabulary",
    "forward": "forward KL, full vocabulary",
    "jsd": "JSD, full vocabulary",
    "sampled": "reverse KL, drawn tokens",
    "teacher_top_k": "reverse KL, teacher's top 32, bucket",
}
STEP_PEERS = {"trl_gkd": "TRL, GKDTrainer", "trl_gold": "TRL, GOLDTrainer"}
STEP_CASES = ("v408", "v32k")
PARTS = {
    "scoring.v408": "scoring 8 answers of 128 tokens, V = 408",
    "scoring.v32k": "the same, V = 32,768",
    "scoring.grouped": "scoring 8 answers of 64 tokens to each of 4 prompts of 512, V = 408",
    "sampler.408": "drawing a token for 8 rows, V = 408",
    "sampler.32768": "the same, V = 32,768",
    "sampler.151936": "the same, V = 151,936",
}
GROWTH = {"pass": ("tokens", "vocab", "teachers", "k"), "update": ("answer", "rows", "vocab", "teachers")}
ERRORS = ("peer_loss_error", "loss_error", "peer_gradient_error", "gradient_error")
GPU_PARTS = ("decode", "scoring", "training", "step", "step_against_trl", "step_against_trl_vllm")
GROWTH_OF = {"pass": "pass over the vocabulary", "update": "whole update"}

Found = Mapping[str, Any]
Row = Sequence[str]


def filled(page: str, results: Found) -> str:
    """The page with every block made anew; ValueError for a block that nobody makes, or one that is not there."""
    named = [match["name"] for match in BLOCK.finditer(page)]
    if sorted(named) != sorted(BLOCKS):
        raise ValueError(
            f"the page has blocks {sorted(named)}; made are {sorted(BLOCKS)}: add or take away its markers"
        )
    return BLOCK.sub(lambda m: f"<!-- {m['name']} -->\n{BLOCKS[m['name']](results)}<!-- end -->", page)


def whole_step(results: Found) -> str:
    def rows() -> Iterator[Row]:
        for name, says in SAYS.items():
            for precision in PRECISIONS:
                found = at(results, "whole_step", name, precision)
                yield f"{name}: {says}", precision, *measured(found, beside, 5)

    return table(("case", "precision", "TRL, s", "opd, s", "TRL / opd", "TRL, MB", "opd, MB"), rows())


def kernel(results: Found) -> str:
    def cells(found: Found) -> Row:
        seconds = (
            two(found["peer"]),
            two(found["ours"]),
            factor(found),
            whole(found["peer_mb"]),
            whole(found["ours_mb"]),
        )
        return *seconds, *(f"{found[name]:.0e}" for name in ERRORS)

    def rows() -> Iterator[Row]:
        for peer, called in PEERS.items():
            for dtype in DTYPES:
                found = at(results, "kernel", peer, dtype)
                name = f"{called}, {found['chunk']} tokens at a time" if "chunk" in found else called
                yield name, dtype, *measured(found, cells, 9)

    head = ("peer", "dtype", "peer, s", "opd, s", "peer / opd", "peer, MB", "opd, MB")
    return table((*head, "loss off, peer", "opd", "gradient off, peer", "opd"), rows())


def products(results: Found) -> str:
    def cells(found: Found) -> Row:
        spread = f"({found['ratio_least']:.2f} to {found['ratio_most']:.2f})"
        ratio = f"{found['ratio_median']:.2f} {spread}"
        return two(found["products"]), two(found["pass"]), ratio, two(found["of_cpu_time"]), whole(found["extra_mb"])

    rows = [(says, *measured(at(results, "products", name), cells, 5)) for name, says in TERMS.items()]
    head = ("term", "products alone, s", "pass, s", "ratio", "of CPU time", "extra memory, MB")
    return table(head, rows)


def decode(results: Found) -> str:
    def cells(found: Found) -> Row:
        return f"{found['peer']:,.0f}", f"{found['ours']:,.0f}", factor(found)

    rows = [
        (name, dtype, *measured(at(results, "decode", name, dtype), cells, 3))
        for name in results.get("decode", {"all": {}})
        for dtype in DTYPES
    ]
    return table(("setting", "dtype", "generate, tokens/s", "opd, tokens/s", "ratio"), rows)


def efficiency(results: Found) -> str:
    def rows() -> Iterator[Row]:
        for precision in PRECISIONS:
            found = at(results, "efficiency", precision)
            if "status" in found:
                yield precision, *measured(found, lambda f: (), 4)
                continue
            for floor in ("own_shapes", "peak_rate"):
                one = found[floor]
                yield precision, f"step, {floor}", two(one["floor"]), two(one["step"]), part(one)
            for name, one in found["parts"].items():
                yield precision, name, two(one["floor"]), two(one["measured"]), part(one)
            yield precision, "everything else", "-", two(found["rest"]), "-"

    return table(("precision", "part", "products alone, s", "measured, s", "share"), rows())


def parts(results: Found) -> str:
    def cells(found: Found) -> Row:
        return small(found["peer"]), small(found["ours"]), factor(found)

    def rows() -> Iterator[Row]:
        for name, says in PARTS.items():
            yield says, *measured(at(results, "parts", *name.split(".")), cells, 3)
        found = at(results, "parts", "record", "demo")
        if "status" in found:
            yield "record of a step", *measured(found, cells, 3)
        else:
            share = f"{found['share']:.3f} ({found['low']:.3f} to {found['high']:.3f}) of the step"
            yield "record of a step, the quick demo's size", "-", small(found["record"]), share

    return table(("part", "the simple way, s", "opd, s", "ratio"), rows())


def peers(results: Found) -> str:
    def rows() -> Iterator[Row]:
        for peer, called in STEP_PEERS.items():
            for case in STEP_CASES:
                for precision in PRECISIONS:
                    found = at(results, "peers", peer, case, precision)
                    yield called, SAYS[case], precision, *measured(found, beside, 5)

    return table(("trainer", "case", "precision", "its, s", "opd, s", "its / opd", "its, MB", "opd, MB"), rows())


def growth(results: Found) -> str:
    def cells(found: Found) -> Row:
        slope = found["seconds_slope"]
        seconds = f"{power(slope['slope'])} ({power(slope['low'])} to {power(slope['high'])})"
        span = f"{found['x'][0]:,} to {found['x'][-1]:,}"
        memory = power(found["megabytes_law"]), power(found["megabytes_slope"])
        return span, power(found["seconds_law"]), seconds, *memory

    rows = [
        (GROWTH_OF[name], found.get("label", size), *measured(found, cells, 5))
        for name, sizes in GROWTH.items()
        for size in sizes
        for found in [at(results, "growth", name, size)]
    ]
    return table(("of", "size", "from, to", "seconds: expected", "found", "memory: expected", "found"), rows)


def gpu(results: Found) -> str:
    """Pairs of models that gpu_step.py measured, part by part."""
    rows = []
    for name, found in results.get("gpu", {}).items():
        if not isinstance(found, Mapping) or "setting" not in found:
            continue
        for part_name in GPU_PARTS:
            rows.append((name, part_name, on_device(at(found, part_name))))
    return table(("models", "part", "found"), rows or [("all", "all", reason(NOTHING))])


def on_device(found: Found) -> str:
    if "status" in found:
        return reason(found)
    if "ratio_median" in found:
        return f"{found['ours']['median']:,.0f} {found['unit']}, {factor(found)} times {found['peer_is']}"
    for name in ("tokens_per_second", "response_tokens_per_second"):
        if name in found:
            return f"{found[name]['median']:,.0f} tokens/s"
    return "measured"


def machine(results: Found) -> str:
    if "machine" not in results:
        return f"{reason(NOTHING)}\n"
    found = results["machine"]
    return f"{found['cpu']}, {found['cores']} cores; last measured {found['date']}.\n"


NOTHING = {"status": "not_measured", "reason": "nobody has run it yet"}
BLOCKS: Mapping[str, Callable[[Found], str]] = {
    "machine": machine,
    "whole_step": whole_step,
    "peers": peers,
    "kernel": kernel,
    "products": products,
    "decode": decode,
    "parts": parts,
    "efficiency": efficiency,
    "growth": growth,
    "gpu": gpu,
}


def at(results: Found, *path: str) -> Found:
    """What stands at a place of the results, or that nothing does."""
    found: Any = results
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
        if found is None:
            return NOTHING
    return found


def measured(found: Found, cells: Callable[[Found], Row], number: int) -> Row:
    """The cells of a row, or why there are none."""
    return (reason(found), *[""] * (number - 1)) if "status" in found else cells(found)


def reason(found: Found) -> str:
    return f"not measured: {found['reason']}"


def table(head: Row, rows: Iterator[Row] | Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def beside(found: Found) -> Row:
    """Seconds, their ratio, and memory of two sides."""
    seconds = two(found["peer"]), two(found["ours"])
    return *seconds, factor(found), whole(found["peer_mb"]), whole(found["ours_mb"])


def two(value: float) -> str:
    """Seconds."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def small(value: float) -> str:
    """Seconds, or fractions of one."""
    return f"{value:.2f}" if value >= 0.1 else f"{1e3 * value:.2f} ms"


def power(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def whole(value: float) -> str:
    return f"{value:,.0f}"


def factor(found: Found) -> str:
    return f"{found['ratio_median']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"


def part(found: Found) -> str:
    return f"{found['share']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    results = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    there = PAGE.read_text(encoding="utf-8")
    made = filled(there, results)
    if args.check and made != there:
        raise SystemExit(f"{PAGE.name} is not what the results say: run python bench/page.py")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
