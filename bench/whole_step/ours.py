"""One side of a pair: `opd.distill`, step by step. Started by run.py."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gate import Gate, peak_megabytes

import opd
from opd.loop.synchronous import PromptSource, Rooms, train
from opd.types import Prompt
from opd.wiring import session


class Prompts:
    """The loop's own prompts: to ask for them is the first thing that a step does. What a session looks at before its
    loop begins does not pass through here, and is no step."""

    def __init__(self, given: PromptSource, gate: Gate) -> None:
        self._given, self._gate = given, gate

    def batch(self, step: int) -> list[Prompt]:
        self._gate.wait(megabytes=peak_megabytes())
        return self._given.batch(step)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--precision", choices=("fp32", "best"), required=True)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    case = json.loads((args.folder / "case.json").read_text())
    gate = Gate()
    assert session.train is train, "a session runs another loop now"

    def taking_turns(rooms: Rooms, **more: Any) -> None:
        train(replace(rooms, prompts=Prompts(rooms.prompts, gate)), **more)

    session.train = taking_turns
    fast = {"dtype": "bfloat16"} if args.precision == "best" else {}
    run = opd.distill(
        student={"model": str(args.folder / "student"), **fast},
        teacher={"model": str(args.folder / "teacher"), **fast},
        prompts={
            "sources": [{"kind": "jsonl", "path": str(args.folder / "prompts.jsonl"), "name": "prompts"}],
            "per_step": case["prompts"],
            "shuffle": False,
        },
        sampling={"samples_per_prompt": case["samples"], "max_tokens": case["max_tokens"]},
        objective={"preset": "reverse_kl"},
        optim={"lr": args.lr},
        run={"folder": str(args.out), "steps": args.steps, "existing": "overwrite", "log_every": 10**6},
        quiet=True,
    )
    steps = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    gate.done(steps=steps, megabytes=peak_megabytes(), student=str(run.student))


if __name__ == "__main__":
    main()
