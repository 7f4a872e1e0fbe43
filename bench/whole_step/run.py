"""Seconds of a whole step, ours and a peer's, in pairs that take turns.

    python bench/whole_step/run.py --peer-python .envs/trl/bin/python
    python bench/whole_step/run.py --cases v408 ragged --precision fp32 --pairs 5

Both sides run as their users run them, each in its own process and environment. They wait for each other at the
beginning of every step, so that only one works at a time; the order changes from pair to pair, the first step of each
is thrown away. Figures go to bench/results/latest.json. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from gate import Worker, in_turn
from results import not_measured, ratio, record
from whole_step.cases import CASES, Case, make

HERE = Path(__file__).parent
WORKERS = {
    "ours": ("ours.py",),
    "trl": ("theirs_trl.py",),
    "trl_gkd": ("theirs_trl.py", "--trainer=gkd"),
    "trl_gold": ("theirs_trl.py", "--trainer=gold"),
}
WARM_UP = 1


def start(side: str, python: str, folder: Path, out: Path, *, steps: int, precision: str, lr: float = 1e-5) -> Worker:
    """A worker of at most `steps` steps on what `cases.make` wrote into `folder`; its run goes to `out`."""
    script, *options = WORKERS[side]
    command = [python, str(HERE / script), str(folder), *options, "--steps", str(steps), "--precision", precision]
    return Worker([*command, "--lr", str(lr), "--out", str(out)])


def compare(case: Case, precision: str, peer: str, python: str, pairs: int, work: Path) -> dict[str, Any]:
    """The figures of one case: seconds of both, their ratio, and the peaks of memory."""
    folder = work / case.name
    if not folder.exists():
        make(case, folder)
    steps = WARM_UP + pairs + 1  # what comes after the last step belongs to no step
    sides = {
        "ours": start("ours", sys.executable, folder, work / "ours", steps=steps, precision=precision),
        "peer": start(peer, python, folder, work / "peer", steps=steps, precision=precision),
    }
    seconds = in_turn(sides, rounds=pairs, warm_up=WARM_UP)
    memory = {name: side.last["megabytes"] for name, side in sides.items()}
    for side in sides.values():
        side.stop()
    found = ratio(seconds["ours"], seconds["peer"])
    return found | {"ours_mb": memory["ours"], "peer_mb": memory["peer"], "seconds": seconds}


def line(case: Case, precision: str, found: dict[str, Any]) -> str:
    cells = [
        f"{case.name}: {case.says}",
        precision,
        f"{found['peer']:.2f}",
        f"{found['ours']:.2f}",
        f"{found['ratio_median']:.2f} ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})",
        f"{found['peer_mb']:.0f}",
        f"{found['ours_mb']:.0f}",
        f"{found['ours_mb'] / found['peer_mb']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "best"), default=["fp32", "best"])
    parser.add_argument("--peer", choices=[name for name in WORKERS if name != "ours"], default="trl")
    parser.add_argument("--peer-python", help="python of the peer's environment; without it: not measured")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where models and runs are written; none: a temporary folder")
    args = parser.parse_args()
    print("| case | precision | peer, s | ours, s | peer / ours | peer, MB | ours, MB | of its memory |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for name in args.cases:
            for precision in args.precision:
                main_peer = args.peer == "trl"
                place = ("whole_step", name, precision) if main_peer else ("peers", args.peer, name, precision)
                if args.peer_python is None:
                    record(place, not_measured("no environment of the peer was given (--peer-python)"))
                    continue
                found = compare(CASES[name], precision, args.peer, args.peer_python, args.pairs, work)
                record(place, found)
                print(line(CASES[name], precision, found), flush=True)


if __name__ == "__main__":
    main()
