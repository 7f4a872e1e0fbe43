"""Tokens per second of our decoder, against `generate` of transformers, on the CPU.

    python bench/decode.py --threads 2 --runs 5

Every setting is a random Qwen3 model (hidden 256, 4 layers, tied head) and as many prompts as rows. Both sides sample
at temperature 1, in float32 and in bfloat16, in turn in one process, so that a busy machine slows all of them. Our
times hold everything that a step of training pays: the copy of the weights, the packing, the rollouts with their
recorded log-probabilities. For bfloat16 our engine writes from float32 weights; transformers gets a model of its own
in bfloat16.

In `ragged` settings prompts differ in length, and one token in a hundred ends an answer. There the figures count the
tokens of answers, not the padding behind them.

Figures are printed as a Markdown table and kept in bench/results/latest.json under `decode`; a ratio is the median over
the rounds of one round's seconds per token, theirs over ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from results import LATEST, ratio, record
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.models.causal import CausalLM
from opd.rollouts.engine import EmbeddedEngine
from opd.types import Prompt, Row, SamplingParams

_HAZARD = 0.01  # share of the vocabulary that ends an answer where answers are ragged


@dataclass(frozen=True)
class Setting:
    """vocab V; rows written at the same time; ragged: prompts of 8 to 2 * prompt_tokens - 8 tokens, and answers end."""

    vocab: int
    rows: int = 8
    ragged: bool = False
    prompt_tokens: int = 32
    new_tokens: int = 128


SETTINGS = {
    "v408": Setting(408),
    "v32k": Setting(32_768),
    "v152k": Setting(151_936),
    "ragged": Setting(408, rows=64, ragged=True),
    "ragged_v32k": Setting(32_768, rows=64, ragged=True),
}
KEPT = {"fp32": ("float32", "float32"), "bf16": ("bfloat16", "bfloat16")}  # by name: theirs, ours
WAYS = ("theirs_float32", "theirs_bfloat16", "ours_float32", "ours_bfloat16")


def measure(setting: Setting, *, runs: int, ways: tuple[str, ...] = WAYS) -> dict[str, list[float]]:
    """Seconds per token of an answer, one entry per run, by way; one run of each before them is not counted."""
    works = _works(setting)
    found: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        for way in ways:
            start = time.perf_counter()
            tokens = works[way](run)
            if run:
                found[way].append((time.perf_counter() - start) / tokens)
    return found


def _works(setting: Setting) -> dict[str, Callable[[int], int]]:
    """Per way what writes one batch, from the number of the run to the number of tokens of its answers."""
    torch.manual_seed(0)
    module = _model(setting.vocab)
    half = copy.deepcopy(module).bfloat16()
    causal = CausalLM(module, vocab_size=setting.vocab, compute_dtype=torch.float32, name="student")
    lengths_P = np.full(setting.rows, setting.prompt_tokens)
    if setting.ragged:
        lengths_P = np.linspace(8, 2 * setting.prompt_tokens - 8, setting.rows).astype(np.int64)
    ends = np.arange(1, 1 + max(1, round(_HAZARD * setting.vocab))) if setting.ragged else np.empty(0, np.int64)
    draws = np.random.default_rng(0)
    ids_P = [draws.integers(len(ends) + 1, setting.vocab, length) for length in lengths_P]
    prompts_P = [Prompt(row=Row(id=f"bench/{p}", domain="bench", prompt=""), ids=ids) for p, ids in enumerate(ids_P)]
    params = SamplingParams(max_tokens=setting.new_tokens, stop_ids=tuple(ends.tolist()))

    def ours(dtype: torch.dtype) -> Callable[[int], int]:
        engine = EmbeddedEngine(causal, seed=0, slots=setting.rows, path="lean", compute_dtype=dtype)
        return lambda run: sum(len(r.response_ids) for r in engine.generate(prompts_P, params, tag=f"bench/{run}"))

    return {
        "theirs_float32": lambda _: _generate(module, ids_P, setting, ends),
        "theirs_bfloat16": lambda _: _generate(half, ids_P, setting, ends),
        "ours_float32": ours(torch.float32),
        "ours_bfloat16": ours(torch.bfloat16),
    }


def _model(vocab: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@torch.inference_mode()
def _generate(module: Qwen3ForCausalLM, ids_P: list[np.ndarray], setting: Setting, ends: np.ndarray) -> int:
    """Writes an answer to every prompt with transformers; returns the number of tokens up to each end."""
    longest = max(map(len, ids_P))
    ids_PT = torch.zeros(len(ids_P), longest, dtype=torch.int64)
    attention_PT = torch.zeros_like(ids_PT)
    for row, ids in enumerate(ids_P):
        ids_PT[row, longest - len(ids) :] = torch.from_numpy(ids)
        attention_PT[row, longest - len(ids) :] = 1
    written_PT = module.generate(  # type: ignore[operator]
        input_ids=ids_PT, attention_mask=attention_PT, do_sample=True, use_cache=True,
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=setting.new_tokens,
        eos_token_id=ends.tolist() or None, pad_token_id=0,
    )[:, longest:]  # fmt: skip
    ended_PT = np.isin(written_PT.numpy(), ends)
    return int(np.where(ended_PT.any(1), ended_PT.argmax(1) + 1, written_PT.shape[1]).sum())


def _child(name: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """One setting in a process of its own, so that none inherits another's memory or threads."""
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    environment.pop("OMP_WAIT_POLICY", None)  # as a user has it
    command = [sys.executable, __file__, f"--child={name}", f"--threads={args.threads}", f"--runs={args.runs}"]
    ran = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout)


def beside(found: dict[str, list[float]], *, theirs: str, ours: str) -> dict[str, Any]:
    """Two ways as they are kept: tokens per second, and the ratio of seconds per token."""
    pairs = found[f"ours_{ours}"], found[f"theirs_{theirs}"]
    speeds = {name: 1 / statistics.median(times) for name, times in zip(("ours", "peer"), pairs, strict=True)}
    return {**ratio(*pairs), **speeds, "unit": "tokens/s", "peer_dtype": theirs, "dtype": ours}


def _line(name: str, found: dict[str, list[float]]) -> str:
    cells = [name] + [f"{1 / statistics.median(found[way]):,.0f}" for way in WAYS]
    for theirs, ours in (("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")):
        pairs = zip(found[f"theirs_{theirs}"], found[f"ours_{ours}"], strict=True)
        ratios = sorted(x / y for x, y in pairs)
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="may come several times; all without it")
    parser.add_argument("--file", type=Path, default=LATEST, help="where the figures are kept")
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(SETTINGS[args.child], runs=args.runs)))
        return
    print(f"tokens per second; torch {torch.__version__}, {args.threads} threads, medians of {args.runs} runs")
    print(
        "| setting | theirs, f32 | theirs, bf16 | ours, f32 | ours, bf16 | f32 / f32 | bf16 / bf16 | f32 / our bf16 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.setting or SETTINGS:
        found = _child(name, args)
        for key, (theirs, ours) in KEPT.items():
            record(("decode", name, key), beside(found, theirs=theirs, ours=ours), file=args.file)
        print(_line(name, found), flush=True)
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
