"""What a run keeps of itself while it goes on: checkpoints to go on from, and models that stay."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from opd.config.schema import Config
from opd.costs.ledger import Ledger
from opd.journal.atomic import write_atomic
from opd.journal.checkpoints import Checkpoints, Found
from opd.journal.folder import RunFolder
from opd.learner.learner import LocalLearner
from opd.learner.state import load_state, save_state, state_bytes
from opd.wiring.exams import Exams
from opd.wiring.scorers import Scorers

BEST_MARK = "opd.json"  # inside best/: which step it is


class Keeping:
    """Writes a checkpoint where one is due, and takes a run up from one.

    save_model   writes the student as it is now into a folder, as transformers loads it.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        learner: LocalLearner,
        scorers: Scorers,
        ledger: Ledger,
        save_model: Callable[[Path], None],
    ) -> None:
        self._spec = config.checkpoints
        self._last_step = config.run.steps
        self._folder, self._learner, self._ledger, self._save_model = folder, learner, ledger, save_model
        self._scorers = scorers
        self._checkpoints = Checkpoints(folder.checkpoints)
        self._written = time.monotonic()
        self._newest: int | None = None
        self._best: int | None = None

    def step(self, facts: Mapping[str, Any]) -> None:
        """A step is in the record: keeps what is due."""
        step, every, weights_every = self._learner.step, self._spec.every, self._spec.weights_every
        waited = time.monotonic() - self._written >= 60 * self._spec.minutes
        if waited or step == self._last_step or (every and step % every == 0):
            self.checkpoint(facts)
        if weights_every and step % weights_every == 0:
            with self._ledger.seconds("save"):
                self._save_model(self._folder.weights(step))

    def checkpoint(self, facts: Mapping[str, Any]) -> None:
        """Writes the state after the learner's last step, unless that one is there already."""
        step = self._learner.step
        if step == self._newest:
            return
        with self._ledger.seconds("save"):
            self._folder.sync()
            self._checkpoints.write(
                step,
                self._fill,
                {**facts, "ledger": self._ledger.state()},
                needed_bytes=state_bytes(self._learner) + self._scorers.state_bytes,
            )
            self._checkpoints.retain(self._spec.keep)
        self._newest, self._written = step, time.monotonic()

    def _fill(self, folder: Path) -> None:
        save_state(self._learner, folder)
        self._scorers.save(folder)

    def best(self, exams: Exams) -> None:
        """Keeps the student as it is now when it does best on the first task, the untrained student included."""
        best, step = exams.best(), self._learner.step
        if not self._spec.best or best is None or not step or best["step"] != step or self._best == step:
            return
        with self._ledger.seconds("save"):
            self._save_model(self._folder.best)
            mark = {"step": best["step"], "task": best["task"], "mean": best["mean"]}
            write_atomic(self._folder.best / BEST_MARK, json.dumps(mark).encode() + b"\n")
        self._best = step

    def restore(self, found: Found) -> Mapping[str, Any]:
        """Puts learner, scorers and ledger where the checkpoint left them; returns the facts it was written with."""
        load_state(self._learner, found.path)
        self._scorers.load(found.path)
        self._ledger.go_on_from(found.facts["ledger"])
        self._newest = found.step
        kept = self._best_step()  # a later one is of steps that are done again, perhaps with other options
        self._best = kept if kept is not None and kept <= found.step else None
        return found.facts

    def _best_step(self) -> int | None:
        try:
            return json.loads((self._folder.best / BEST_MARK).read_bytes())["step"]
        except (OSError, ValueError, KeyError):
            return None
