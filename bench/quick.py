"""What our ways of doing things bring, beside the simple ones, in less than three minutes on two cores.

    python bench/quick.py

Sizes are small and a busy machine shows: for figures to quote there is `make bench`. What is printed never makes it
fail; it fails where the code does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import decode
import torch
from growth import Sizes, Update
from kernel.ours import reverse_kl
from kernel.setting import Inputs
from kernel.setting import Sizes as PassSizes
from results import interval, ratio
from rich.console import Console

from opd.config.loading import load_config
from opd.config.schema import Learner
from opd.lab.demo.run import load_recipe, write_data
from opd.wiring.run import execute

PHASES = ("rollout", "scoring", "update", "sync", "journal")


def pass_over_vocabulary(rounds: int) -> str:
    """Tile by tile, and with all logits at once and torch's own gradients."""
    sizes = PassSizes(tokens=512, vocab=32_768, student_width=256, teacher_width=512)
    inputs = Inputs.random(sizes, torch.float32)

    def ours() -> None:
        inputs.forget()
        reverse_kl(inputs, Learner().chunk_tokens).backward()

    def naive() -> None:
        inputs.forget()
        log_p_TV = (inputs.hidden_TD @ inputs.weight_VD.T).log_softmax(-1)
        log_q_TV = (inputs.teacher_TD @ inputs.teacher_VD.T).log_softmax(-1)
        (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean().backward()

    return line("pass over the vocabulary, against all logits at once", *in_turn(ours, naive, rounds))


def writing(rounds: int) -> str:
    """Our decoder, and `generate` of transformers."""
    setting = decode.Setting(vocab=32_768, rows=8, new_tokens=32)
    tokens = setting.rows * setting.new_tokens
    found = decode.measure(setting, runs=rounds, ways=("ours_float32", "theirs_float32"))
    ours, theirs = ([tokens * s for s in found[way]] for way in ("ours_float32", "theirs_float32"))
    return line("8 answers of 32 tokens, against generate of transformers", ours, theirs)


def shared_prompts(rounds: int) -> str:
    """An update on eight answers to each prompt that reads the prompt once, and one that reads it eight times."""
    sizes = Sizes(rows=16, prompt=256, answer=32, vocab=4096)
    ours, naive = (Update(sizes, samples=8, share=share) for share in (True, False))
    times = in_turn(ours.run, naive.run, rounds)
    return line("update on 8 answers to each prompt, against prompts read 8 times", *times)


def record(steps: int) -> str:
    """What a step of the demo's size spends on writing its record."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, quick=True)
        recipe = load_recipe(folder, "full", quick=True)
        recipe["run"]["steps"] = steps
        recipe["optim"]["warmup_steps"] = 0
        del recipe["evals"]
        execute(load_config([], base=recipe).config, console=Console(quiet=True))
        lines = [json.loads(each) for each in (folder / "full" / "metrics.jsonl").read_text().splitlines()]
    # a line is written before the record of its step is: the first has no time for one
    spent = {
        name: [now[f"seconds_{name}"] - then[f"seconds_{name}"] for then, now in pairwise(lines[1:])] for name in PHASES
    }
    whole = [sum(parts) for parts in zip(*spent.values(), strict=True)]
    shares = [100 * part / step for part, step in zip(spent["journal"], whole, strict=True)]
    low, high = interval(shares)
    return (
        f"record of a step: {statistics.median(spent['journal']):.4f} s of {statistics.median(whole):.3f} s, "
        f"{statistics.median(shares):.1f} % ({low:.1f} to {high:.1f} %)"
    )


def in_turn(ours: Callable[[], object], naive: Callable[[], object], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of every round of both; one round before them is not counted."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for work, times in zip((ours, naive), seconds, strict=True):
            began = time.perf_counter()
            work()
            if turn:
                times.append(time.perf_counter() - began)
    return seconds


def line(name: str, ours: Sequence[float], naive: Sequence[float]) -> str:
    found = ratio(ours, naive)
    factor = f"{found['ratio_median']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})"
    return f"{name}: ours {found['ours']:.3f} s, naive {found['peer']:.3f} s, ratio {factor}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for measured in (pass_over_vocabulary, writing, shared_prompts):
        print(measured(args.rounds), flush=True)
    print(record(steps=args.rounds + 3))


if __name__ == "__main__":
    main()
