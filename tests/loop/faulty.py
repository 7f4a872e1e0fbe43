"""The real loop around tiny models, watched by guards, with a place to break something at a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd.config.guards import Guards as GuardsSpec
from opd.costs.ledger import Ledger
from opd.costs.size import model_size
from opd.learner.learner import LocalLearner
from opd.loop.guards import Alarm, Guards
from opd.loop.synchronous import Listener, Rooms, train
from opd.models.causal import CausalLM
from opd.protocols import Weights
from opd.rollouts.engine import EmbeddedEngine
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, SamplingParams
from tests import rooms

WINDOW, KL_STEPS = 5, 20
QUICK = GuardsSpec.model_validate({"window": WINDOW, "kl_rising": {"steps": KL_STEPS}, "changed_teacher": {"every": 2}})


@dataclass
class SameQuestions:
    prompts_P: list[Prompt]

    def batch(self, step: int) -> list[Prompt]:
        return self.prompts_P


@dataclass
class FaultySampler:
    """An engine whose parameters can be changed behind the loop's back, or that stops taking weights."""

    engine: EmbeddedEngine
    changes: dict[str, Any] = field(default_factory=dict)
    takes_weights: bool = True

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        return self.engine.generate(prompts_P, replace(params, **self.changes), tag=tag)

    def load(self, weights: Weights) -> None:
        if self.takes_weights:
            self.engine.load(weights)


@dataclass
class Run:
    """A run that is ready to begin. `alarms`: (step, alarm)."""

    student: CausalLM
    writer: CausalLM
    teacher: LocalTeacher
    learner: LocalLearner
    sampler: FaultySampler
    rooms: Rooms
    history: list[Mapping[str, Any]] = field(default_factory=list)
    alarms: list[tuple[int, Alarm]] = field(default_factory=list)

    def go(self, steps: int, *, break_at: int | None = None, fault: Callable[[Run], object] = lambda run: None) -> Run:
        first = self.teacher.model.fingerprint()
        guards = Guards(QUICK, vocab_size=self.student.vocab_size, max_tokens=self.rooms.params.max_tokens)

        def on_step(report: Any, rollouts_N: Sequence[Rollout], numbers: dict[str, float]) -> None:
            if report.step % QUICK.changed_teacher.every == 0:
                changed = self.teacher.model.fingerprint() != first
                numbers = {**numbers, "scorer/teacher/fingerprint_changed": float(changed)}
            self.history.append({"step": report.step, **numbers})
            self.alarms += [(report.step, alarm) for alarm in guards.look(self.history)]
            if report.step == break_at:
                fault(self)

        listener = Listener(on_step=on_step, on_phase=lambda name: None, look=lambda step: None)
        train(self.rooms, steps=steps, ledger=Ledger(), listener=listener)
        return self

    @property
    def fired(self) -> dict[str, int]:
        """Guard to the step of its first alarm."""
        return {alarm.guard: step for step, alarm in reversed(self.alarms)}


def ready(
    kind: str = "qwen3", *, samples: int = 1, max_tokens: int = 16, ends_early: bool = True, lr: float = 1e-3,
    own_writer: bool = False, objective: dict | None = None,
) -> Run:  # fmt: skip
    """A student and a teacher of one kind with other weights; a student whose every eighth token ends an answer."""
    fmt = rooms.prompt_format()
    student, teacher = (
        rooms.causal(kind, seed=1, scale=30.0),
        rooms.teacher(rooms.causal(kind, seed=2, scale=30.0), fmt),
    )
    writer = rooms.causal(kind, seed=1, scale=30.0) if own_writer else student
    learner = rooms.learner(student, objective, optim={"lr": lr}, run={"steps": 1000})
    stops = tuple(range(0, student.vocab_size, 8)) if ends_early else ()
    params = SamplingParams(max_tokens=max_tokens, samples_per_prompt=samples, stop_ids=(*fmt.end_ids, *stops))
    sampler = FaultySampler(EmbeddedEngine(writer, seed=0, slots=16, path="auto"))
    size = model_size(student.module.config.to_dict())
    parts = Rooms(
        prompts=SameQuestions(rooms.prompts(fmt)), sampler=sampler, teacher=teacher, learner=learner,
        params=params, student_size=size, scorer_sizes={"teacher": size},
    )  # fmt: skip
    return Run(student, writer, teacher, learner, sampler, parts)
