"""The pass over the vocabulary, from hidden states to loss and gradients, beside TRL's and Liger's.

    python bench/kernel/run.py --peer-python .envs/trl/bin/python

Reverse KL over the full vocabulary, in float32 and in bfloat16. Every pass has a process of its own; they take turns,
in an order that changes from round to round. Liger is taken at two chunk sizes, and counted by the faster one. Its
code is compiled, which is not counted. Every pass says how far it is from float64, on a slice of the tokens.
Figures go to bench/results/latest.json under `kernel` and `memory.kernel`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gate import Worker, in_turn
from kernel.setting import DTYPES, Sizes
from results import LATEST, not_measured, ratio, record

from opd.config.schema import Learner

HERE = Path(__file__).parent
PEERS = ("trl", "liger")
LIGER_CHUNKS = (1024, 256)  # its default, and what is fastest for it on a CPU


def sides(sizes: Sizes, dtype: str, peer_python: str | None) -> dict[str, Worker]:
    """Ours and, where there is an environment of theirs, those of the peers; Liger's are named by their chunks."""
    given = [f"--dtype={dtype}"]
    made = {"ours": Worker([sys.executable, str(HERE / "ours.py"), *given, *sizes.arguments()])}
    if peer_python is None:
        return made
    theirs = [peer_python, str(HERE / "theirs.py"), *given]
    made["trl"] = Worker([*theirs, "--peer=trl", *sizes.arguments()])
    for chunk in LIGER_CHUNKS:
        made[f"liger {chunk}"] = Worker([*theirs, "--peer=liger", *replace(sizes, chunk=chunk).arguments()])
    return made


def measure(sizes: Sizes, dtype: str, peer_python: str | None, pairs: int) -> dict[str, dict[str, Any]]:
    """Per side: seconds of every round, and the facts of its worker."""
    workers = sides(sizes, dtype, peer_python)
    seconds = in_turn(workers, rounds=pairs)
    found = {name: {**side.last, "seconds": seconds[name]} for name, side in workers.items()}
    for side in workers.values():
        side.stop()
    return found


def against(found: dict[str, dict[str, Any]], peer: str) -> dict[str, Any]:
    """Ours beside one peer, of whose settings the fastest counts."""
    settings = {name: side for name, side in found.items() if name.split()[0] == peer}
    best = min(settings, key=lambda name: statistics.median(settings[name]["seconds"]))
    ours, theirs = found["ours"], settings[best]
    made = ratio(ours["seconds"], theirs["seconds"]) | {
        "ours_mb": ours["megabytes"],
        "peer_mb": theirs["megabytes"],
        "loss_error": ours["loss_error"],
        "peer_loss_error": theirs["loss_error"],
        "gradient_error": ours["gradient_error"],
        "peer_gradient_error": theirs["gradient_error"],
        "seconds": {"ours": ours["seconds"], "peer": theirs["seconds"]},
    }
    if len(settings) > 1:
        made["chunk"] = int(best.split()[1])
        made["seconds_by_chunk"] = {name.split()[1]: statistics.median(s["seconds"]) for name, s in settings.items()}
    return made


def line(peer: str, dtype: str, found: dict[str, Any]) -> str:
    cells = [
        f"{peer} {found['chunk']}" if "chunk" in found else peer,
        dtype,
        f"{found['peer']:.2f}",
        f"{found['ours']:.2f}",
        f"{found['ratio_median']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})",
        f"{found['peer_mb']:.0f}",
        f"{found['ours_mb']:.0f}",
        f"{found['peer_gradient_error']:.1e}",
        f"{found['gradient_error']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in vars(Sizes(chunk=Learner().chunk_tokens)).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--peer-python", help="python of an environment with TRL and Liger; without it: not measured")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--file", type=Path, default=LATEST, help="where the figures are kept")
    args = parser.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    print("| peer | dtype | peer, s | ours, s | peer / ours | peer, MB | ours, MB | error of its gradient | of ours |")
    print("|---|---|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        found = measure(sizes, dtype, args.peer_python, args.pairs)
        peaks = {name: side["megabytes"] for name, side in found.items()}
        record(("memory", "kernel", dtype), peaks, file=args.file)
        for peer in PEERS:
            if args.peer_python is None:
                reason = "no environment of the peer was given (--peer-python)"
                record(("kernel", peer, dtype), not_measured(reason), file=args.file)
                continue
            beside = against(found, peer)
            record(("kernel", peer, dtype), beside, file=args.file)
            print(line(peer, dtype, beside), flush=True)


if __name__ == "__main__":
    main()
