"""The loop, one step as one sentence: ask, write, score, change, write with the new weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd.costs.ledger import Ledger, prefill_cost, sampling_cost, scoring_cost, training_cost
from opd.costs.size import ModelSize
from opd.errors import TrainingDiverged
from opd.loop.answers import answer_metrics
from opd.protocols import EvidenceHandle, Learner, Sampler, Teacher
from opd.types import Batch, Prompt, Resolution, Rollout, SamplingParams, ScorerRows, StepReport


class PromptSource(Protocol):
    """Index-addressed prompts: what step `step` asks is a function of the step alone."""

    def batch(self, step: int) -> list[Prompt]: ...


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """The parts that meet in the loop.

    For the bill: `trainable` parameters where not all are; `updates_per_batch`, how often the learner reads a batch.
    """

    prompts: PromptSource
    sampler: Sampler
    teacher: Teacher | None
    learner: Learner
    params: SamplingParams
    student_size: ModelSize
    teacher_size: ModelSize | None
    trainable: int | None = None
    updates_per_batch: int = 1


@dataclass(frozen=True, kw_only=True)
class Listener:
    """What the loop tells the outside: once a step, and when an evaluation is due.

    on_step     (report, rollouts, numbers): `numbers` are the step's metrics ready to be written.
    on_phase    (name): a part of a step begins.
    look        called with the number of steps done after `on_step`, and once before the first step of this process:
                the place for evaluations that are due.
    """

    on_step: Callable[[StepReport, Sequence[Rollout], dict[str, float]], None]
    on_phase: Callable[[str], None]
    look: Callable[[int], object]


def train(rooms: Rooms, *, steps: int, ledger: Ledger, listener: Listener, first: int = 0) -> None:
    """Runs the updates from `first` (0-based, what a resumed run has behind it) up to `steps`.

    Whatever the learner, the sampler or the listener raise passes through.
    """
    listener.look(first)
    rooms.sampler.load(rooms.learner.weights())  # a resumed learner is not at version 0
    for step in range(first, steps):
        prompts_P = rooms.prompts.batch(step)
        listener.on_phase("rollout")
        with ledger.seconds("rollout"):
            rollouts_N = rooms.sampler.generate(prompts_P, rooms.params, tag=f"train/{step}")
        listener.on_phase("update")
        with ledger.seconds("update"):
            evidence = None if rooms.teacher is None else _Timed(rooms.teacher.evidence(rollouts_N), ledger)
            diverged: TrainingDiverged | None = None
            try:
                report = rooms.learner.update(rollouts_N, evidence)
            except TrainingDiverged as error:  # its step belongs into the record, too
                report, diverged = error.report, error
        with ledger.seconds("sync"):
            rooms.sampler.load(rooms.learner.weights())
        _bill(rooms, rollouts_N, ledger)
        listener.on_step(report, rollouts_N, {**report.metrics, **answer_metrics(rollouts_N, report.scores)})
        if diverged is not None:
            raise diverged
        listener.look(report.step)


def _bill(rooms: Rooms, rollouts_N: Sequence[Rollout], ledger: Ledger) -> None:
    """What a step costs, by role; evaluations are not a cost of the method and are left out."""
    written = [r for r in rollouts_N if r.behaviour == "student"]
    if written:
        ledger.add_cost("student_prefill", prefill_cost(written, rooms.student_size))
        ledger.add_cost("student_sampling", sampling_cost(written, rooms.student_size))
    for _ in range(rooms.updates_per_batch):  # evidence is pulled anew by every update
        if rooms.teacher_size is not None:
            ledger.add_cost("teacher_scoring", scoring_cost(rollouts_N, rooms.teacher_size))
        ledger.add_cost("student_training", training_cost(rollouts_N, rooms.student_size, rooms.trainable))


@dataclass(frozen=True)
class _Timed:
    """Evidence whose pulls are counted as the phase "scoring", although they happen inside the update."""

    handle: EvidenceHandle
    ledger: Ledger

    def pull(self, batch: Batch, resolution: Resolution) -> dict[str, ScorerRows]:
        with self.ledger.seconds("scoring"):
            return self.handle.pull(batch, resolution)

    def release(self) -> None:
        self.handle.release()
