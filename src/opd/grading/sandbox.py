"""Worker processes that grade answers, seen from our side. See `worker.py` for theirs, `isolation.py` for the walls."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import opd
from opd.errors import OpdError
from opd.grading.worker import REPLY_BYTES, Verdict, read_frame, write_frame

_START_SECONDS = 120.0  # to import the grader's library on a busy machine
_GRACE_SECONDS = 10.0  # beyond an answer's own timeout before a silent worker is ended
_NETWORK_LAYERS = ("network namespace", "landlock", "seccomp", "audit hook")

_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from opd.grading.worker import main; main()"
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class Sandbox:
    """Up to `workers` processes, started when first needed and kept; each grades one answer at a time.

    kind     a key of `worker.PREPARE`.
    timeout  seconds for one answer; then its process is killed and it scores 0.

    A worker that dies costs the answer it was grading, never another one's; a new worker takes its place. May be used
    from any thread. Workers end, and their folder goes, when `close` is called or when our process ends, however it
    ends.
    """

    def __init__(self, kind: str, *, workers: int, timeout: float) -> None:
        self.kind, self.timeout, self.workers = kind, timeout, workers
        self._lock = threading.Lock()
        self._pool: list[_Worker] = []
        self._home = tempfile.mkdtemp(prefix="opd-grading-")
        self._remove_home = weakref.finalize(self, shutil.rmtree, self._home, ignore_errors=True)

    def run(self, tasks: Sequence[Mapping[str, Any]]) -> list[Verdict]:
        """One (score or None, reason) for every task, in order. Raises OpdError when no worker can be started."""
        verdicts: list[Verdict] = [(None, "")] * len(tasks)
        waiting = deque(range(len(tasks)))
        busy: dict[_Worker, int] = {}
        with self._lock, selectors.DefaultSelector() as selector:
            try:
                while waiting or busy:
                    self._grow(len(waiting) + len(busy))
                    while waiting and (worker := self._idle(busy)):
                        busy[worker] = index = waiting.popleft()
                        worker.send(tasks[index], self.timeout + _GRACE_SECONDS)
                        selector.register(worker.replies, selectors.EVENT_READ, worker)
                    first = min(worker.deadline for worker in busy)
                    ready = {k.data for k, _ in selector.select(max(0.0, first - time.monotonic()))}
                    for worker in [w for w in busy if w in ready or w.deadline <= time.monotonic()]:
                        index = busy.pop(worker)
                        selector.unregister(worker.replies)
                        reply = worker.receive() if worker in ready else None
                        if reply is None:
                            self._discard(worker)
                            why = "died" if worker in ready else "did not respond"
                            reply = (0.0, f"the grader process {why} while it graded this answer")
                        verdicts[index] = (reply[0], reply[1])
            finally:
                for worker in busy:  # interrupted: what they still send belongs to nobody
                    self._discard(worker)
        return verdicts

    @property
    def layers(self) -> tuple[str, ...]:
        """The walls that hold around an answer on this machine, named as in `isolation.py`. Starts a worker."""
        with self._lock:
            self._grow(1)
            worker = self._idle({})
            assert worker is not None
            return worker.layers

    @property
    def network_isolation(self) -> str:
        """The layers that keep an answer off the network, e.g. "network namespace, landlock, seccomp, audit hook"."""
        return ", ".join(layer for layer in self.layers if layer in _NETWORK_LAYERS)

    def close(self) -> None:
        """Ends the workers and removes their folder. The sandbox cannot be used afterwards."""
        with self._lock:
            for worker in list(self._pool):
                self._discard(worker)
        self._remove_home()

    def _grow(self, tasks: int) -> None:
        """Replaces dead workers and starts new ones, all at the same time, until there is one for each task."""
        for worker in [w for w in self._pool if w.process.poll() is not None]:
            self._discard(worker)
        while len(self._pool) < min(self.workers, tasks):
            self._pool.append(_Worker(self.kind, self.timeout, self._home))

    def _idle(self, busy: Mapping[_Worker, int]) -> _Worker | None:
        """A worker that is ready and has nothing to do; None when all are at work."""
        worker = next((w for w in self._pool if w not in busy), None)
        if worker and not worker.layers:
            try:
                worker.await_ready()
            except OpdError:
                self._discard(worker)
                raise
        return worker

    def _discard(self, worker: _Worker) -> None:
        self._pool.remove(worker)
        worker.kill()


class _Worker:
    """One worker process and the pipes to it."""

    def __init__(self, kind: str, timeout: float, home: str) -> None:
        self.kind = kind
        source = str(Path(opd.__file__).parent.parent)
        packages = _package_folders(kind)
        # A checkout of ours is hidden from graded code; a site-packages folder stays.
        hidden = [source] if source not in packages else []
        setup = {
            "kind": kind,
            "timeout": timeout,
            "home": home,
            "packages": packages,
            "hidden": hidden,
            "readable": [*packages, sys.base_prefix, sys.base_exec_prefix, "/usr", "/lib", "/lib64"],
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-c", _BOOT, source],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd=home,
            start_new_session=True,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.deadline = 0.0
        self.layers: tuple[str, ...] = ()
        self.send(setup, 0.0)
        self._ready_by = time.monotonic() + _START_SECONDS

    def await_ready(self) -> None:
        """Waits for the worker's libraries and walls. Raises OpdError when they do not come up."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            ready = selector.select(max(0.0, self._ready_by - time.monotonic()))
        hello = (self.receive() if ready else {"error": f"not ready after {_START_SECONDS:g} s"}) or {}
        if "layers" not in hello:
            why = hello.get("error", "it ended without a word")
            raise OpdError(f"a grader process for {self.kind!r} could not start: {why}")
        self.layers = tuple(hello["layers"])

    def send(self, task: Mapping[str, Any], seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(BrokenPipeError):  # it is dead, which `receive` will see
            write_frame(self.requests, task)

    def receive(self) -> Any:
        """The next reply, or None when the worker is gone."""
        with contextlib.suppress(OSError, ValueError):
            return read_frame(self.replies, REPLY_BYTES)
        return None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a running answer dies with its worker
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _package_folders(kind: str) -> list[str]:
    """Where the grader's library and other installed packages are: what a worker may import besides the library's."""
    folders = list(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    module = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}.get(kind)
    spec = find_spec(module) if module else None
    if spec and spec.origin:
        folders.append(str(Path(spec.origin).parent.parent))
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
