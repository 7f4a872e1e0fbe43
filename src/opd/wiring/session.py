"""One run between its first and its last line: models, evaluation before, the loop, evaluation after, the result."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import opd
from opd.config.behaviours import Speculative, TeacherMixed, TeacherWrites, writers
from opd.config.engines import VllmEngine
from opd.config.loading import config_hash, resolved
from opd.config.schema import Config
from opd.config.scorers import examined
from opd.costs.ledger import Ledger
from opd.errors import Interrupted, OpdError, OutOfSpace, ServiceUnavailable
from opd.journal.reader import read_evals
from opd.journal.records import Status
from opd.learner.learner import LocalLearner
from opd.loop.rewards import AnswerRewards
from opd.loop.synchronous import Listener, Rooms, train
from opd.models.adapters import adapter_notes, untrained_targets
from opd.models.causal import CausalLM
from opd.models.loading import load_student, saved_dtype
from opd.models.sanity import next_token_logits
from opd.models.saving import export_form, recover, save_model
from opd.objectives.objective import Objective
from opd.reports.figures import counted
from opd.reports.limit import speed_line
from opd.reports.model_card import model_card
from opd.reports.progress import RunView
from opd.reports.table import results
from opd.reports.trackers import Tracker, open_tracker
from opd.rollouts.engine import EmbeddedEngine
from opd.stopping import Stopping
from opd.types import Rollout, SamplingParams, StepReport
from opd.wiring.achieved import LONG, achieved
from opd.wiring.alarms import Alarms
from opd.wiring.build import PreparedTask, Texts, config_size, exam_format, read_prompts
from opd.wiring.exams import Exams
from opd.wiring.headline import headline
from opd.wiring.keeping import Keeping
from opd.wiring.result import Run, report, summary_of
from opd.wiring.scorers import Scorers
from opd.wiring.starting import Start, same_run
from opd.wiring.viewing import Viewing
from opd.wiring.vllm import VllmRoom
from opd.wiring.writing import StudentEngine, make_sampler, student_engine


class Session:
    """The state of one run in one process."""

    def __init__(
        self,
        config: Config,
        texts: Texts,
        prompts: Any,
        tasks: list[PreparedTask],
        params: SamplingParams,
        rewards: AnswerRewards | None,
        start: Start,
        view: RunView,
        ledger: Ledger,
        stopping: Stopping,
    ) -> None:
        self.config, self.texts, self.prompts, self.tasks = config, texts, prompts, tasks
        self.params, self.start, self.folder, self.view, self.ledger = params, start, start.folder, view, ledger
        self.rewards, self.stopping = rewards, stopping
        self.vllm: VllmRoom | None = None
        self._outside = ExitStack()  # ends what runs outside of this process
        self.trained_tokens = 0
        self.stopped_by: str | None = None
        done = 0 if start.found is None else start.found.step
        view.start(config.run.steps, headline(config, texts, prompts, self.folder.path), done=done)
        view.phase("loading models")
        try:
            with ledger.seconds("load"):
                self._load()
                self._take_up()
            self._updates = self.learner.updates
            self.tracker: Tracker = open_tracker(
                config.tracking,
                run_folder=self.folder.path,
                config=resolved(config),
                step=self.learner.step,
                on_failure=functools.partial(self._note, "tracker"),
            )
        except BaseException:
            self._outside.close()
            raise

    # ---- before the first step -----------------------------------------------------------------------------------

    def _load(self) -> None:
        config, texts = self.config, self.texts
        self.student = load_student(config.student, texts.student.tokenizer.vocab_size)
        first = self.prompts.batch(0)[:4]
        next_token_logits(self.student, self.student.head, [prompt.ids for prompt in first])
        read = read_prompts(config, self.prompts.prompts())
        self.scorers = Scorers(config, texts, self.student, read, on_wait=self.view.phase)
        self._outside.callback(self.scorers.close)
        self.objective = Objective(config.objective, special_ids=texts.student.tokenizer.special_ids)
        self.learner = LocalLearner(
            self.student,
            self.objective,
            optim=config.optim,
            spec=config.learner,
            total_steps=config.run.steps,
            on_bad_step=self._bad_step,
            before_change=self._before_change,
            on_less=functools.partial(self._note, "out_of_memory"),
        )
        self.engine = self._student_engine()
        self.sampler = make_sampler(config, self.engine, self.scorers.here())
        for note in (*adapter_notes(self.student), *self.scorers.notes(), self.learner.kernel.note):
            if note is not None:
                self.view.message(note)

    def _take_up(self) -> None:
        """Goes back to the checkpoint, and takes out of the record what came after it."""
        start, folder = self.start, self.folder
        identity = {
            "data": self.prompts.fingerprint,
            "student": self.student.fingerprint(),
            "scorers": self.scorers.fingerprints(),
        }
        same_run(start, identity)
        self.keeping = Keeping(self.config, folder, self.learner, self.scorers, self.ledger, self._save_model)
        if start.resumes:
            self._resume()
        if start.identity is None:
            folder.log_event(0, "start", "the run begins", **identity, kernel=self.learner.kernel.name)
            for note in self.scorers.notes():
                folder.log_event(0, "scorer", note)
        self.exams = Exams(self.config, self.tasks, folder, self.view, self.ledger, read_evals(folder.path))
        self.viewing = Viewing(self.config, self.texts, self.prompts, self.tasks, folder, self.scorers, self.student)
        if start.identity is None and (note := self.viewing.note()) is not None:
            self._note("view", note)
        self.alarms = Alarms(self.config, folder, self.view, self.student.vocab_size, start.events)
        if self.vllm is not None:
            self.view.phase("starting the engine")
            self.vllm.start(self.learner)

    def _resume(self) -> None:
        start, folder = self.start, self.folder
        if start.found is not None:
            self.trained_tokens = self.keeping.restore(start.found)["trained_tokens"]
        step = self.learner.step
        for kept in (folder.final, folder.best, *(folder.path / "weights").glob("step_*.old")):
            recover(kept.with_name(kept.name.removesuffix(".old")))
        folder.rewind(step if start.identity is not None else -1)
        if start.about is not None:
            folder.write_config(resolved(self.config), config_hash(self.config), start.about)
        for note in start.skipped:
            self._note("checkpoint_skipped", note)
        for note in start.notes:
            self._note("changed", note)
        place = "its first step" if start.found is None else f"checkpoints/{start.found.path.name}"
        folder.log_event(step, "resume", f"the run goes on from {place}")
        self.view.message(f"goes on from {place}")

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        status: Status = "done"
        error: Exception | None = None
        try:
            self._heed()
            self._evaluate(0)
            self._evaluate_scorer()
            train(
                self._rooms(),
                steps=self.config.run.steps,
                first=self.learner.step,
                ledger=self.ledger,
                listener=Listener(on_step=self._on_step, on_phase=self._phase, look=self._look),
            )
            self._still_diverged()
            self._evaluate(self.config.run.steps)
        except KeyboardInterrupt:
            status, error = "interrupted", Interrupted("")
        except (Interrupted, ServiceUnavailable) as caught:
            status, error = "interrupted", caught
        except Exception as caught:  # out of memory, a full disk, ours: what was earned is kept, the record says failed
            status, error = "failed", caught
        return self._end(status, error)

    def _still_diverged(self) -> None:
        """A run that diverged in its last step is not done because it is taken up again and nothing is left to do."""
        bad, most = self.learner.bad_in_a_row, self.config.learner.max_bad_steps
        if bad >= most:
            raise OpdError(
                f"the last {counted(bad, 'update')} had a non-finite loss or gradient, or nothing to train "
                f"(learner.max_bad_steps = {most}), and no step is left of run.steps = {self.config.run.steps}. Lower "
                "optim.lr and ask for more steps."
            )

    def _end(self, status: Status, error: Exception | None) -> Run:
        """Keeps what there is, writes the result and shows it. A further signal is taken at once."""
        torn, steps = self.stopping.held, self.learner.step
        self.stopping.hold()
        self._outside.close()
        try:
            if status != "done" and steps and not torn:
                self.keeping.checkpoint(self._facts())
            if status == "done" or (steps and not torn):
                with self.ledger.seconds("save"):
                    self._save(status)
        except Exception as caught:
            status, error = "failed" if status == "done" else status, error or caught
        if isinstance(error, Interrupted) and not str(error):
            error = Interrupted(self._stop_message(torn))
        if isinstance(error, OutOfSpace):
            error = OutOfSpace(f"{error} {self.folder.path}")
        self.stopped_by = None if error is None else str(error)
        if error is not None:
            self.folder.log_event(steps, "stop", f"{status}: {error}")
        summary = self._summary(status, self._limit())
        self.folder.write_summary(summary)
        if status == "done" and summary["limit"] is None and self.ledger.elapsed > LONG:
            summary["limit"] = self._limit(measure=True)
            self.folder.write_summary(summary)
        self.tracker.close(status)
        self.view.finish()
        results(summary, self.view.console, folder=self.folder.path)
        if (speed := speed_line(summary)) is not None:
            self.view.message(speed)
        report(self.folder.path, self.view)
        if error is not None:
            raise error
        return Run(self.folder.path, self.folder.final, summary)

    def _stop_message(self, torn: bool) -> str:
        done = f"stopped after {self.learner.step} of {self.config.run.steps} steps"
        on = f"to go on: opd resume {self.folder.path}"
        if torn:
            return f"{done}, in the middle of a change; {on} takes the last checkpoint"
        return f"{done}; the student so far is in {self.folder.final}; {on}" if self.learner.step else f"{done}; {on}"

    def _student_engine(self) -> StudentEngine:
        """What the student writes with; a server is started when the learner is where it goes on from."""
        if not isinstance(self.config.engine, VllmEngine):
            return self._engine(self.student)
        self.vllm = VllmRoom(
            self.config,
            self.student,
            self.texts.student,
            self.prompts,
            self.tasks,
            self.folder.path,
            note=functools.partial(self._note, "engine"),
        )
        self._outside.callback(self.vllm.close)
        return self.vllm.sampler

    def _engine(self, model: CausalLM) -> EmbeddedEngine:
        return student_engine(self.config, model, seed=self.config.run.seed)

    def _rooms(self) -> Rooms:
        config = self.config
        assert config.objective.behaviour is not None, "the preset is not expanded"
        return Rooms(
            prompts=self.prompts,
            sampler=self.sampler,
            teacher=self.scorers.panel if self.scorers.panel.members else None,
            learner=self.learner,
            params=self.params,
            rewards=self.rewards,
            horizon=config.sampling.horizon,
            student_size=config_size(config.student, "student", self.student.parameter_count),
            scorer_sizes=self.scorers.sizes(),
            writers={
                writer.kind: writer.scorer
                for writer in writers(config.objective.behaviour)
                if isinstance(writer, TeacherWrites | TeacherMixed | Speculative)
            },
            trainable=self.student.trainable_count if config.student.lora is not None else None,
            updates_per_batch=config.learner.updates_per_batch,
            looks=self.objective.looks == "step",
        )

    # ---- during a step -------------------------------------------------------------------------------------------

    def _before_change(self) -> None:
        """The gradient is whole. From here until the step is in the record, a request to stop waits."""
        self.stopping.hold()
        if self.learner.step == 0 and (idle := untrained_targets(self.student)):
            some = ", ".join(idle[:3]) + (", ..." if len(idle) > 3 else "")
            self._note("adapter", f"{counted(len(idle), 'adapter layer')} got no gradient in the first step: {some}")

    def _on_step(self, report: StepReport, rollouts_N: Sequence[Rollout], numbers: dict[str, float]) -> None:
        spent = self.ledger.seconds_by_phase
        busy = sum(spent.get(phase, 0.0) for phase in ("rollout", "scoring", "update", "sync"))
        self.scorers.after_update(report.step, applied=self.learner.updates > self._updates)
        self._updates = self.learner.updates
        self.trained_tokens += int(numbers["trained_tokens"])
        numbers |= {**self.ledger.metrics(), "tokens_per_second": self.trained_tokens / max(busy, 1e-9)}
        spec = self.config.guards.changed_teacher
        if spec.action != "off" and report.step % spec.every == 0:
            numbers |= self.scorers.changed()
        numbers |= self.scorers.metrics()
        if self.vllm is not None:
            numbers |= self.vllm.metrics
        line = {"step": report.step, **numbers, "applied": report.applied}
        self.folder.log_step(report.step, self.learner.weights().version, {**numbers, "applied": report.applied})
        with self.ledger.seconds("journal"):
            self.folder.write_rollouts(report.step, rollouts_N, self.texts.student.tokenizer.show, report.scores)
            self.tracker.log(report.step, numbers)
        self.view.step(line)
        self.alarms.step(line)
        self.keeping.step(self._facts())
        self.stopping.release()
        self._heed()

    def _heed(self) -> None:
        """A guard that is told to stop does so when the step is whole."""
        if self.alarms.stop is not None:
            raise Interrupted(f"{self.alarms.stop} (guards; to go on: opd resume {self.folder.path})")

    def _look(self, step: int) -> None:
        """Evaluations and views that are due after a step; the last step's come after the loop."""
        every = self.config.evals.every
        if step and every and step % every == 0 and step < self.config.run.steps:
            self._evaluate(step)
        if self.viewing.due(step):
            self.view.phase("view")
            self.engine.load(self.learner.weights())
            self.engine.progress = None
            with self.ledger.seconds("view"):
                self.viewing.take(step, self.engine)

    def _phase(self, name: str) -> None:
        """A part of a step begins; a rollout also says how many answers are written."""
        self.view.phase(name)
        if name == "update" and self.vllm is not None:
            self.vllm.sampler.rest()
        answers = self.config.prompts.per_step * self.params.samples_per_prompt
        self.sampler.progress = functools.partial(self._written, name, answers)

    def _written(self, name: str, answers: int, done: int) -> None:
        self.view.phase(name, done, answers)

    def _bad_step(self, step: int, facts: dict[str, Any]) -> None:
        why = facts.get("why", "the loss or the gradient was not finite")
        self.folder.dump(step, "nothing-to-train" if "why" in facts else "not-finite", facts)
        self.folder.log_event(step, "bad_step", f"{why}: the step was skipped")

    def _note(self, kind: Any, message: str) -> None:
        """Something worth knowing: a line that stays on the terminal, and in the record."""
        self.folder.log_event(self.learner.step, kind, message)
        self.view.message(message)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def _evaluate(self, step: int) -> None:
        """The student on every task; what an earlier process of the run measured at this step is not measured again."""
        if self.exams.missing(step, "student") and step == self.learner.step:
            self.engine.load(self.learner.weights())
            self.exams.take(self.engine, self.texts.student, who="student", step=step)
        self.keeping.best(self.exams)

    def _evaluate_scorer(self) -> None:
        """The goal to reach: what the teacher scores."""
        name = examined(self.config)
        if name is None or not self.exams.missing(0, "teacher"):
            return
        scorer = self.scorers.here()[name]
        try:
            self.exams.take(self._engine(scorer.model), exam_format(scorer.format), who="teacher", step=0)
        finally:
            scorer.release()

    # ---- the result ----------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says besides the learner's and the ledger's state."""
        return {"trained_tokens": self.trained_tokens}

    def _save_model(self, folder: Path) -> None:
        save_model(
            self.student,
            self.texts.student.tokenizer.hf,
            folder,
            dtype=saved_dtype(self.config.student),
            end_ids=self.texts.student.end_ids,
            form=export_form(self.config.student),
        )

    def _save(self, status: Status) -> None:
        self._save_model(self.folder.final)
        card = model_card(
            self._summary(status),
            resolved(self.config),
            config_hash=config_hash(self.config),
            version=opd.__version__,
            form=export_form(self.config.student),
        )
        (self.folder.final / "README.md").write_text(card, encoding="utf-8")

    def _limit(self, *, measure: bool = False) -> dict[str, Any] | None:
        parts = (self.config, self.texts, self.prompts, self.folder.path, self.ledger, self._rooms)
        return achieved(*parts, measure=measure)

    def _summary(self, status: Status, limit: dict[str, Any] | None = None) -> dict[str, Any]:
        return summary_of(
            self.config,
            self.exams,
            self.ledger,
            status=status,
            tokens=self.trained_tokens,
            steps=self.learner.step,
            resumes=self.start.resumes,
            stopped_by=self.stopped_by,
            limit=limit,
        )
