"""How the sides of a comparison take turns: a worker waits at the beginning of every step until it is told to go on.

A worker prints one JSON object a line, each behind a mark: `ready` when a step is about to begin, and `done` with its
facts. What is measured is the time from `go` to the next `ready`, in the worker's own clock: one whole step, whatever
the library does in it. Other lines of a worker's output are passed over.

`Gate` is the worker's end; it needs nothing but Python, since workers of other libraries run in environments of their
own. `Worker` is the other end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "@bench "


class Gate:
    """The worker's end."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        self._began: float | None = None
        self._cpu = 0.0

    def wait(self, **facts: Any) -> None:
        """At the beginning of a step: reports the one before, and returns when the next may begin."""
        seconds = None if self._began is None else time.perf_counter() - self._began
        cpu = time.process_time() - self._cpu
        self._say(event="ready", seconds=seconds, cpu_seconds=cpu, **facts)
        if sys.stdin.readline().strip() != "go":
            os._exit(0)
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def done(self, **facts: Any) -> None:
        self._say(event="done", **facts)

    def _say(self, **record: Any) -> None:
        self._out.write(MARK + json.dumps(record) + "\n")


def peak_megabytes() -> float:
    """The most memory this process has held, in MB."""
    return _status_megabytes("VmHWM")


def held_megabytes() -> float:
    """What this process holds now, in MB."""
    return _status_megabytes("VmRSS")


def _status_megabytes(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {name}")


def forget_the_peak() -> None:
    """`peak_megabytes` starts again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


class Worker:
    """A side of a comparison, as a process that does one step at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the worker
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("OMP_WAIT_POLICY", None)  # as a user has it
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self.last = self._read()

    def step(self) -> float:
        """Seconds of one more step. `last` is what the worker said behind it."""
        self._go()
        self.last = self._read()
        assert self.last["event"] == "ready", "the worker has no steps left"
        return self.last["seconds"]

    def finish(self) -> dict[str, Any]:
        """Lets it run to its end; what it says there."""
        while self.last["event"] == "ready":
            self._go()
            self.last = self._read()
        self._process.wait()
        return self.last

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        self._log.seek(0)
        raise SystemExit(f"{self._process.args}\nended early:\n{self._log.read()[-3000:]}")


def in_turn(sides: Mapping[str, Worker], *, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of every side. Only one works at a time, in an order that changes from round to round;
    the first `warm_up` rounds are thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name in sorted(sides, reverse=turn % 2 == 1):
            spent = sides[name].step()
            if turn >= warm_up:
                seconds[name].append(spent)
    return seconds
