"""One run between its first and its last line: models, evaluation before, the loop, evaluation after, the result."""

from __future__ import annotations

import dataclasses
import functools
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import opd
from opd.config.loading import config_hash, resolved
from opd.config.schema import Config
from opd.costs.ledger import Ledger
from opd.errors import Interrupted
from opd.evals.tasks import EvalResult, run_task
from opd.journal.folder import RunFolder
from opd.journal.records import Interval, Status, summary_record
from opd.learner.learner import LocalLearner
from opd.loop.synchronous import Listener, Rooms, train
from opd.models.causal import CausalLM
from opd.models.loading import load_student, load_teacher, saved_dtype
from opd.models.sanity import next_token_logits
from opd.models.saving import save_model
from opd.objectives.objective import Objective
from opd.protocols import Sampler
from opd.reports.figures import counted
from opd.reports.model_card import model_card
from opd.reports.progress import RunView
from opd.reports.table import results
from opd.rollouts.dataset import DatasetAnswers
from opd.rollouts.engine import EmbeddedEngine
from opd.teachers.local import LocalTeacher
from opd.types import Rollout, SamplingParams, StepReport
from opd.wiring.build import (
    PreparedTask,
    Texts,
    config_size,
    cut_answers,
)


@dataclass(frozen=True)
class Run:
    """A finished run.

    folder    everything about it (metrics, rollouts, config, summary).
    student   folder of the trained model, for `AutoModelForCausalLM.from_pretrained`.
    summary   what `summary.json` says.
    """

    folder: Path
    student: Path
    summary: Mapping[str, Any]


class Session:
    """The state of one run between its first and last line."""

    def __init__(
        self,
        config: Config,
        texts: Texts,
        prompts: Any,
        tasks: list[PreparedTask],
        params: SamplingParams,
        folder: RunFolder,
        view: RunView,
        ledger: Ledger,
    ) -> None:
        self.config, self.texts, self.prompts, self.tasks = config, texts, prompts, tasks
        self.params, self.folder, self.view, self.ledger = params, folder, view, ledger
        self.before: dict[str, EvalResult] = {}
        self.after: dict[str, EvalResult] = {}
        self.teacher_results: dict[str, EvalResult] = {}
        self.trained_tokens = 0
        view.start(config.run.steps, self._headline())
        view.phase("loading models")
        with ledger.seconds("load"):
            self._load()

    def _load(self) -> None:
        config, texts = self.config, self.texts
        vocab_size = texts.student.tokenizer.vocab_size if texts.agreement is None else texts.agreement.vocab_size
        self.student = load_student(config.student, vocab_size)
        first = self.prompts.batch(0)[:4]
        next_token_logits(self.student, self.student.head, [prompt.ids for prompt in first])
        self.engine = self._engine(self.student)
        self.teacher: LocalTeacher | None = None
        if config.teacher is not None and texts.teacher is not None and texts.agreement is not None:
            self.teacher = LocalTeacher(
                load_teacher(config.teacher, vocab_size),
                texts.teacher,
                texts.agreement,
                name="teacher",
                temperature=config.objective.teacher_temperature,
                chunk_tokens=config.learner.chunk_tokens,
                offload=config.teacher.offload,
            )
            self.teacher.check(first)
        self.objective = Objective(config.objective)
        self.learner = LocalLearner(
            self.student,
            self.objective,
            optim=config.optim,
            spec=config.learner,
            total_steps=config.run.steps,
            on_bad_step=self._bad_step,
        )

    def run(self) -> Run:
        steps = self.config.run.steps
        status: Status = "done"
        error: Exception | None = None
        try:
            self.before = self._evaluate(0)
            self._evaluate_teacher()
            train(self._rooms(), steps=steps, ledger=self.ledger, listener=self._listener())
            self.after = self._evaluate(steps)
        except KeyboardInterrupt:
            status = "interrupted"
            kept = f"the student so far is in {self.folder.final}" if self.learner.step else "there is nothing to keep"
            error = Interrupted(f"stopped after {self.learner.step} of {steps} steps; {kept}")
        except Exception as caught:  # out of memory, a full disk, ours: what was earned is kept, the record says failed
            status, error = "failed", caught
        with on_sigterm(signal.SIG_IGN):  # a scheduler that sends it again must not take the result away
            try:
                if status == "done" or self.learner.step:
                    with self.ledger.seconds("save"):
                        self._save(status)
            except Exception as caught:
                status, error = "failed", error or caught
            summary = self._summary(status)
            self.folder.write_summary(summary)
        self.view.finish()
        results(summary, self.view.console)
        if error is not None:
            raise error
        return Run(self.folder.path, self.folder.final, summary)

    def _engine(self, model: CausalLM) -> EmbeddedEngine:
        engine = self.config.engine
        return EmbeddedEngine(model, seed=self.config.run.seed, slots=engine.slots, path=engine.path)

    def _rooms(self) -> Rooms:
        config = self.config
        sampler: Sampler = DatasetAnswers() if config.objective.behaviour == "dataset" else self.engine
        reads_teacher = self.objective.resolution is not None
        return Rooms(
            prompts=self.prompts,
            sampler=sampler,
            teacher=self.teacher if reads_teacher else None,
            learner=self.learner,
            params=self.params,
            student_size=config_size(config.student, "student", self.student.parameter_count),
            teacher_size=(
                config_size(config.teacher, "teacher", self.teacher.model.parameter_count)
                if reads_teacher and self.teacher is not None and config.teacher is not None
                else None
            ),
            updates_per_batch=config.learner.updates_per_batch,
        )

    def _listener(self) -> Listener:
        return Listener(
            on_step=self._on_step,
            on_phase=self._phase,
            evaluate=self._evaluate,
            every=self.config.evals.every,
        )

    def _on_step(self, report: StepReport, rollouts_N: Sequence[Rollout], numbers: dict[str, float]) -> None:
        spent = self.ledger.seconds_by_phase
        busy = sum(spent.get(phase, 0.0) for phase in ("rollout", "scoring", "update", "sync"))
        self.trained_tokens += int(numbers["trained_tokens"])
        numbers = {**numbers, **self.ledger.metrics(), "tokens_per_second": self.trained_tokens / max(busy, 1e-9)}
        self.folder.log_step(report.step, self.learner.weights().version, {**numbers, "applied": report.applied})
        with self.ledger.seconds("journal"):
            self.folder.write_rollouts(report.step, rollouts_N, self.texts.student.tokenizer.show)
        self.view.step({"step": report.step, "applied": report.applied, **numbers})

    def _phase(self, name: str) -> None:
        """A part of a step begins; a rollout also says how many answers are written."""
        self.view.phase(name)
        answers = self.config.prompts.per_step * self.params.samples_per_prompt
        self.engine.progress = functools.partial(self._written, name, answers)

    def _written(self, name: str, answers: int, done: int) -> None:
        self.view.phase(name, done, answers)

    def _bad_step(self, step: int, facts: dict[str, Any]) -> None:
        self.folder.dump(step, "not-finite", facts)

    def _evaluate(self, step: int) -> dict[str, EvalResult]:
        """The student on every task. The noise is the same at every step, so that differences are the student's."""
        self.engine.load(self.learner.weights())
        return self._take(self.engine, self.texts.student, who="student", step=step)

    def _evaluate_teacher(self) -> None:
        if self.teacher is None or self.texts.teacher is None or not self.config.evals.teacher or not self.tasks:
            return
        self.teacher.fetch()
        self.teacher_results = self._take(self._engine(self.teacher.model), self.texts.teacher, who="teacher", step=0)
        self.teacher.release()

    def _take(self, sampler: EmbeddedEngine, fmt: Any, *, who: str, step: int) -> dict[str, EvalResult]:
        results: dict[str, EvalResult] = {}
        for task in self.tasks:
            bound = task.bind(fmt, self.config.sampling)
            name, answers = f"{who} takes {task.spec.name}", len(task.rows) * task.spec.samples
            self.view.phase(name)
            sampler.progress = functools.partial(self._written, name, answers)
            with self.ledger.seconds("eval"):
                result = run_task(
                    bound,
                    sampler,
                    fmt.decode,
                    tag=f"eval/{task.spec.name}",
                    confidence=self.config.evals.confidence,
                )
            results[task.spec.name] = result
            record = {"step": step, "model": who, **eval_record(result)}
            self.folder.log_eval({**record, "answers": result.answers})
            if record["mean"] is not None:
                self.view.eval(record)
        return results

    def _save(self, status: Status) -> None:
        save_model(
            self.student,
            self.texts.student.tokenizer.hf,
            self.folder.final,
            dtype=saved_dtype(self.config.student),
            end_ids=self.texts.student.end_ids,
        )
        card = model_card(
            self._summary(status),
            resolved(self.config),
            config_hash=config_hash(self.config),
            version=opd.__version__,
        )
        (self.folder.final / "README.md").write_text(card, encoding="utf-8")

    def _summary(self, status: Status) -> dict[str, Any]:
        first = self.tasks[0].spec.name if self.tasks else None
        before, after, teacher = (
            r.get(first) if first else None for r in (self.before, self.after, self.teacher_results)
        )
        return summary_record(
            status=status,
            preset=self.config.objective.preset,
            task=first,
            n=None if before is None else before.estimate.n,
            k=None if before is None else before.estimate.k,
            ci_method=None if before is None else before.estimate.ci_method,
            student_before=_interval(before),
            student_after=_interval(after),
            teacher=_interval(teacher),
            seconds=self.ledger.elapsed,
            seconds_by_phase=self.ledger.seconds_by_phase,
            tokens=self.trained_tokens,
            flops=self.ledger.total().flops,
            steps=self.learner.step,
        )

    def _headline(self) -> list[str]:
        config = self.config
        teacher = "no teacher" if config.teacher is None else config.teacher.model
        terms = " + ".join(t.name for t in config.objective.terms)
        lines = [
            f"student {config.student.model}",
            f"teacher {teacher}",
            f"objective {config.objective.preset or terms}",
            f"{counted(len(self.prompts), 'prompt')}, {config.prompts.per_step} a step",
            f"folder {self.folder.path}",
        ]
        limit = config.prompts.max_prompt_tokens
        dropped = [(name, n) for name, n in self.prompts.dropped.items() if n]
        lines += [f"{name}: {counted(n, 'prompt')} dropped, longer than {limit} tokens" for name, n in dropped]
        notes = [] if self.texts.agreement is None else [*self.texts.agreement.notes]
        if cut := cut_answers(config, self.prompts):
            notes.append(cut)
        return lines + [f"note: {note}" for note in notes]


def eval_record(result: EvalResult) -> dict[str, Any]:
    """One line about an evaluation: the estimate as plain numbers, lengths, the share that was cut off."""
    estimate = dataclasses.asdict(result.estimate)
    return {"task": result.task, **estimate, "length": result.mean_length, "truncated": result.truncated_share}


def _interval(result: EvalResult | None) -> Interval | None:
    if result is None or result.estimate.mean is None:
        return None
    low, high = result.estimate.low, result.estimate.high
    assert low is not None and high is not None
    return {"mean": result.estimate.mean, "low": low, "high": high}


@contextmanager
def on_sigterm(handler: Any) -> Iterator[None]:
    """What SIGTERM does for a while (only the main thread may say so)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
