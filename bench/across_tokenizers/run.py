"""A student and teachers with other tokenizers, each way to learn from them at the same budget.

    python bench/across_tokenizers/run.py [--work runs/across_tokenizers] [--only models|rates|arms|routed] [arm ...]

Trains the models, chooses a learning rate for each way on a seed that is not reported, runs each way on three seeds,
then one routed run with three teachers. Every run that is done stands in `bench/results/across_tokenizers.json` and is
not done again; `--work` keeps the models. One thread; about two hours on one core.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from across_tokenizers import arms, routed
from across_tokenizers.models import make
from results import record

import opd
from opd.journal.reader import read_evals, read_metrics

RESULTS = Path(__file__).parents[1] / "results" / "across_tokenizers.json"


def have() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def keep(path: Sequence[str], found: Mapping[str, Any]) -> None:
    """Puts `found` at its place in the results. Another process may be at work on other ways: they take turns."""
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record(path, found, file=RESULTS)


def rates(arm: arms.Arm, work: Path) -> float:
    """The learning rate that did best on the tuning seed; of two alike the smaller one."""
    for lr in arm.lrs:
        done = have().get("rates", {}).get(arm.name, {})
        if f"{lr:g}" not in done:
            run = opd.distill(
                **arms.config(
                    arm,
                    work,
                    work / "runs" / arm.name / f"lr-{lr:g}",
                    lr=lr,
                    seed=arms.TUNING_SEED,
                    steps=arms.TUNING_STEPS,
                    tuning=True,
                ),
                quiet=True,
            )
            keep(("rates", arm.name), {**done, f"{lr:g}": run.summary["student_after"]["mean"]})
            print(f"{arm.name}: lr {lr:g}: {run.summary['student_after']['mean']:.1%}", flush=True)
    done = have()["rates"][arm.name]
    return max((score, -float(lr)) for lr, score in done.items())[1] * -1


def once(arm: arms.Arm, work: Path, seed: int) -> None:
    """One run of one way, kept."""
    done = have().get("arms", {}).get(arm.name, {})
    if str(seed) in done:
        return
    lr, folder, start = rates(arm, work), work / "runs" / arm.name / f"seed-{seed}", time.monotonic()
    run = opd.distill(**arms.config(arm, work, folder, lr=lr, seed=seed), quiet=True)
    lines = read_metrics(folder)
    summary = run.summary
    found = {
        "lr": lr,
        "before": summary["student_before"],
        "after": summary["student_after"],
        "teacher": summary["teacher"],
        "curve": {str(line["step"]): line["mean"] for line in read_evals(folder) if line["model"] == "student"},
        "seconds": time.monotonic() - start,
        "tokens": summary["tokens"],
        "scorer": {
            key.rsplit("/", 1)[1]: statistics.fmean(line[key] for line in lines if key in line)
            for key in {key for line in lines for key in line if key.startswith("scorer/")}
        },
    }
    keep(("arms", arm.name), {**done, str(seed): found})
    after, before, teacher = (found[key]["mean"] for key in ("after", "before", "teacher"))
    closed = (after - before) / (teacher - before)
    print(
        f"{arm.name}, seed {seed}, lr {lr:g}: {before:.1%} to {after:.1%} of {teacher:.1%}: {closed:.0%} of the gap, "
        f"{found['seconds']:.0f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="arms; none: all")
    parser.add_argument("--work", type=Path, default=Path("runs/across_tokenizers"))
    parser.add_argument("--only", choices=("models", "rates", "arms", "routed"))
    given = parser.parse_args()
    wanted = [arm for arm in arms.ARMS if not given.names or arm.name in given.names]
    work = given.work.resolve()
    if given.only in (None, "models", "rates", "arms"):
        for name in ("student", *{arm.teacher for arm in wanted}):
            make(name, work)
    if given.only in (None, "models", "routed"):
        for name in ("routed_student", *routed.TEACHERS.values()):
            make(name, work)
    if given.only in (None, "rates"):
        for arm in wanted:
            rates(arm, work)
    if given.only in (None, "arms"):
        for seed in arms.SEEDS:
            for arm in wanted:
                once(arm, work, seed)
    if given.only in (None, "routed") and "routed" not in have():
        keep(("routed",), routed.measure(work))


if __name__ == "__main__":
    main()
