"""A run in a process of its own that is killed at the n-th event of a kind, and what such a run leaves behind.

Events are calls of the real code, counted in the child; at the chosen one the process sends itself a signal, SIGKILL
unless said otherwise. The processes are forked from one that has torch and transformers loaded.
"""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Where a run can be in the middle of, and the functions that are called there.
PHASES = {
    "rollout": [("opd.rollouts.answers", "Answers.draw")],
    "scoring": [("opd.teachers.panel", "PanelEvidence.pull")],
    "update": [
        ("opd.learner.learner", "LocalLearner._micro_batch"),
        ("torch.nn.utils", "clip_grad_norm_"),
        ("torch.optim", "AdamW.step"),
        ("opd.loop.synchronous", "_bill"),
    ],
    "save": [
        ("os", "fsync"),
        ("os", "replace"),
        ("os", "rename"),
        ("opd.learner.state", "save_file"),
        ("gzip", "compress"),
        ("opd.journal.folder", "RunFolder.log_step"),
        ("opd.wiring.session", "save_model"),
    ],
    "eval": [("opd.wiring.exams", "run_task"), ("opd.evals.tasks", "avg_at_k"), ("opd.teachers.reading", "_read")],
}
SHOWN_ONLY = ("seconds_", "tokens_per_second")  # what a clock says differs from run to run


@contextmanager
def events(phase: str, happened: Callable[[], None]) -> Iterator[None]:
    """Calls `happened` before and after every call of a phase's functions, or of the one that is named as
    `module:function`."""
    import importlib

    undo: list[tuple[Any, str, Any]] = []
    for module, path in PHASES.get(phase) or [phase.split(":")]:
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        whole = getattr(owner, name)

        def noted(*args: Any, whole: Any = whole, **kwargs: Any) -> Any:
            happened()
            result = whole(*args, **kwargs)
            happened()
            return result

        undo.append((owner, name, whole))
        setattr(owner, name, noted)
    try:
        yield
    finally:
        for owner, name, whole in undo:
            setattr(owner, name, whole)


def run_here(arguments: list[str], phase: str | None, at: int, number: int, counted: Any) -> None:
    """In the child: `opd ARGUMENTS`, with the signal at event `at` of `phase` (0: only counted)."""
    from opd.cli import main as cli

    if "OPD_SHOW" not in os.environ:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
    sys.argv = ["opd", *arguments]

    def happened() -> None:
        counted.value += 1
        if counted.value == at:
            os.kill(os.getpid(), number)

    if phase is None:
        cli.main()
    else:
        with events(phase, happened):
            cli.main()


def opd(*arguments: object, phase: str | None = None, at: int = 0, number: int = signal.SIGKILL) -> tuple[int, int]:
    """(exit code, events) of `opd ARGUMENTS` in a process of its own; a killed one has exit code -9."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume.preload"])
    counted = context.Value("l", 0)
    process = context.Process(target=run_here, args=([str(a) for a in arguments], phase, at, number, counted))
    process.start()
    process.join(180)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the run hangs")
    return process.exitcode, counted.value


def record(folder: Path) -> dict[str, Any]:
    """Everything that must be bit for bit the same in an interrupted and in an uninterrupted run."""
    kept: dict[str, Any] = {}
    for name in ("metrics.jsonl", "evals.jsonl"):
        lines = [json.loads(line) for line in (folder / name).read_bytes().splitlines()]
        kept[name] = [_without_clocks(line) for line in lines]
    for path in sorted(folder.glob("rollouts/*.gz")):
        kept[path.name] = gzip.decompress(path.read_bytes())
    for path in sorted(folder.glob("views/*.json")):
        kept[path.name] = path.read_bytes()
    newest = max(
        (folder / "checkpoints").iterdir()
    )  # a clean stop writes one more, so the others may be of other steps
    for path in sorted([*(folder / "final").glob("*.safetensors"), *newest.glob("*.safetensors")]):
        kept[str(path.relative_to(folder))] = path.read_bytes()
    kept["best"] = {p.name: p.read_bytes() for p in sorted((folder / "best").glob("*.safetensors"))}
    summary = json.loads((folder / "summary.json").read_text())
    clocks = {key for key in summary if key.startswith("seconds")} | {"resumes", "limit"}
    kept["summary"] = {k: v for k, v in summary.items() if k not in clocks}
    return kept


def _without_clocks(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(SHOWN_ONLY)}


def assert_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Equal to the bit; says in which part they are not."""
    assert ours.keys() == theirs.keys()
    different = [key for key in ours if ours[key] != theirs[key]]
    assert not different, f"{different[0]} differs (and {len(different) - 1} more)"
