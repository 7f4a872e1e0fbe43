"""The loop, one step as one sentence: ask, write, grade, score, change, write with the new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from opd.config.slots import Schedule
from opd.costs.ledger import Ledger, prefill_cost, reading_cost, sampling_cost, scoring_cost, training_cost
from opd.costs.size import ModelSize
from opd.errors import TrainingDiverged
from opd.loop.answers import answer_metrics
from opd.loop.mismatch import mismatch_metrics
from opd.loop.rewards import AnswerRewards, reward_metrics
from opd.protocols import EvidenceHandle, Learner, Sampler, Teacher
from opd.types import Batch, Behaviour, Prompt, Rollout, SamplingParams, ScorerRows, Spans, StepReport, Want


class PromptSource(Protocol):
    """Index-addressed prompts: what step `step` asks is a function of the step alone."""

    def batch(self, step: int) -> list[Prompt]: ...


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """The parts that meet in the loop.

    rewards    grades the answers before they are trained on; None: nothing asks for it.
    horizon    tokens at which the answers of a step are cut; None: at `params.max_tokens`.

    For the bill:

    scorer_sizes       by name.
    writers            who else writes an answer of this kind, or takes part in it: a scorer's name.
    trainable          parameters that are trained, where not all are.
    updates_per_batch  how often the learner reads a batch.
    looks              whether every update reads the whole batch once more before its gradient is made.
    """

    prompts: PromptSource
    sampler: Sampler
    teacher: Teacher | None
    learner: Learner
    params: SamplingParams
    rewards: AnswerRewards | None = None
    horizon: Schedule | None = None
    student_size: ModelSize
    scorer_sizes: Mapping[str, ModelSize] = field(default_factory=dict)
    writers: Mapping[Behaviour, str] = field(default_factory=dict)
    trainable: int | None = None
    updates_per_batch: int = 1
    looks: bool = False


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
            params = params_at(rooms.params, rooms.horizon, step)
            rollouts_N = rooms.sampler.generate(prompts_P, params, tag=f"train/{step}")
        graded: dict[str, float] = {}
        if rooms.rewards is not None:
            listener.on_phase("grading")
            with ledger.seconds("grading"):
                rollouts_N = rooms.rewards.grade(rollouts_N)
            graded = reward_metrics(rollouts_N)
        listener.on_phase("update")
        with ledger.seconds("update"):
            evidence = None if rooms.teacher is None else _Timed(rooms.teacher.evidence(rollouts_N), ledger)
            diverged: TrainingDiverged | None = None
            try:
                report = rooms.learner.update(rollouts_N, evidence)
            except TrainingDiverged as error:  # its step belongs into the record, too
                report, diverged = error.report, error
        read = {} if evidence is None else evidence.lengths()
        _bill(rooms, rollouts_N, read, ledger, trained=report.metrics.get("trained_tokens") != 0)
        facts = {**answer_metrics(rollouts_N, report.scores), **mismatch_metrics(rollouts_N, report.scores)}
        listener.on_step(report, rollouts_N, {**report.metrics, **facts, **graded})
        if diverged is not None:
            raise diverged
        with ledger.seconds("sync"):  # when the step is in the record: a sampler that cannot be reached costs no step
            rooms.sampler.load(rooms.learner.weights())
        listener.look(report.step)


def params_at(params: SamplingParams, horizon: Schedule | None, step: int) -> SamplingParams:
    """The parameters of a step, counted from 0: answers have at most `horizon` tokens, rounded, never less than one
    and never more than `params.max_tokens`. An answer that is cut there is trained as far as it goes."""
    if horizon is None:
        return params
    return replace(params, max_tokens=max(1, min(params.max_tokens, round(horizon.at(step)))))


def _bill(
    rooms: Rooms, rollouts_N: Sequence[Rollout], read: Mapping[str, Sequence[int]], ledger: Ledger, *, trained: bool
) -> None:
    """What a step costs, by role; evaluations are not a cost of the method and are left out.

    read      scorer to the lengths of the sequences that it read, as often as it read them.
    trained   whether there was anything to train.

    A scorer that writes is billed by the student's prompts: where its own are longer, for a little less than it cost.
    """
    kinds: dict[Behaviour, list[Rollout]] = {}
    for rollout in rollouts_N:
        kinds.setdefault(rollout.behaviour, []).append(rollout)
    for kind, written in kinds.items():
        if kind in ("student", "teacher_mixed", "speculative"):
            ledger.add_cost("student_prefill", prefill_cost(written, rooms.student_size))
            ledger.add_cost("student_sampling", sampling_cost(written, rooms.student_size))
        if name := rooms.writers.get(kind):
            ledger.add_cost(f"{name}_prefill", prefill_cost(written, rooms.scorer_sizes[name]))
            ledger.add_cost(f"{name}_sampling", sampling_cost(written, rooms.scorer_sizes[name]))
    for name, lengths in read.items():
        ledger.add_cost(f"{name}_scoring", reading_cost(lengths, rooms.scorer_sizes[name]))
    for _ in range(rooms.updates_per_batch if trained else 0):
        if rooms.looks:
            ledger.add_cost("student_looking", scoring_cost(rollouts_N, rooms.student_size))
        ledger.add_cost("student_training", training_cost(rollouts_N, rooms.student_size, rooms.trainable))


@dataclass(frozen=True)
class _Timed:
    """Evidence whose pulls are counted as the phase "scoring", although they happen inside the update."""

    handle: EvidenceHandle
    ledger: Ledger

    def spans(self) -> Mapping[str, Mapping[str, Spans]]:
        with self.ledger.seconds("scoring"):
            return self.handle.spans()

    def prepare(self, wants: Mapping[str, Want]) -> int:
        return self.handle.prepare(wants)

    def pull(self, batch: Batch, wants: Mapping[str, Want]) -> list[ScorerRows]:
        with self.ledger.seconds("scoring"):
            return self.handle.pull(batch, wants)

    def lengths(self) -> Mapping[str, Sequence[int]]:
        return self.handle.lengths()

    def release(self) -> None:
        self.handle.release()
