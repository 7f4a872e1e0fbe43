"""All stages in order, the cheap ones first; a stage is left out when one before it has stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from opd.config.engines import Engine
from opd.config.schema import Config
from opd.doctor import alignment, fit, sanity, signal, speed, support, text
from opd.doctor.ability import Answers, Problems, answer
from opd.doctor.evidence import read, student_reader
from opd.doctor.findings import Finding, Report
from opd.doctor.rooms import Inputs, Models, embedded, engine_for, first_prompts
from opd.doctor.scorer import Room, hear
from opd.errors import BadInput, DataError, ModelError, OpdError, ServiceUnavailable
from opd.grading.graders import make_grader
from opd.models.loading import load_student
from opd.models.sanity import next_token_logits
from opd.prompts.mixture import PromptStream
from opd.protocols import Grader
from opd.reports.figures import counted
from opd.teachers.local import LocalTeacher
from opd.types import Prompt, Rollout, Row
from opd.wiring.build import (
    PreparedTask,
    Texts,
    check_context,
    cut_answers,
    load_prompts,
    load_tasks,
    read_prompts,
    render,
    sampling_params,
    training_params,
)
from opd.wiring.scorers import Scorers
from opd.wiring.writing import check_writers, make_rewards

FEW = 8  # answers that are read several times over in stage 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """How closely to look.

    rollouts       answers of the student, and of the teacher, that are looked at.
    cut            tokens at which they are cut, however long the config allows them to be.
    device_bytes   judge the memory as of one GPU of so many bytes; None: of the device that is here.
    price          of an hour, in any currency; None: no cost is given.
    updates        measure real updates, for the time of a run.
    """

    rollouts: int = 32
    cut: int = 512
    device_bytes: int | None = None
    price: float | None = None
    updates: bool = True

    def __post_init__(self) -> None:
        for name in ("rollouts", "cut"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name} {getattr(self, name)}: at least 1 is needed")


def examine(config: Config, options: Options | None = None, *, tell: Callable[[str], None] | None = None) -> Report:
    """Everything that can be known before a run. Nothing is written; the config's models are loaded and let go.

    tell   called with what is going on.
    Raises ConfigError and DataError as the run would for what cannot even be looked at.
    """
    options, tell = options or Options(), tell or (lambda said: None)
    begun = time.monotonic()
    examination = _Examination(config, options, tell)
    try:
        examination.run()
    finally:
        examination.close()
    return Report(findings=tuple(examination.found), shown=examination.shown, seconds=time.monotonic() - begun)


class _Examination:
    def __init__(self, config: Config, options: Options, tell: Callable[[str], None]) -> None:
        self.config, self.options, self.tell = config, options, tell
        self.found: list[Finding] = []
        self.shown: dict[str, str] = {}
        self._inputs: Inputs | None = None
        self._grader: Grader | None = None
        self._scorers: list[Scorers] = []

    def close(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
        if self._grader is not None:
            self._grader.close()
        for scorers in self._scorers:
            scorers.close()

    @property
    def stopped(self) -> bool:
        return any(finding.level == "stop" for finding in self.found)

    def run(self) -> None:
        config = self.config
        torch.manual_seed(config.run.seed)
        if config.run.threads is not None:
            torch.set_num_threads(config.run.threads)
        self.tell("1 text and data")
        texts, found = text.load(config)
        self.found += found
        if texts is None:
            return
        prompts = load_prompts(config, texts.student)
        self._inputs = inputs = self._prepare(texts, prompts)
        if inputs is None:
            return
        self.tell("2 memory")
        self.found += fit.memory_findings(config, prompts, device_bytes=self.options.device_bytes)
        if self.stopped:
            return
        self.tell("3 models")
        models = self._load(inputs)
        if models is None:
            return
        self._look(inputs, models)

    # ---- before weights ------------------------------------------------------------------------------------------

    def _prepare(self, texts: Texts, prompts: PromptStream) -> Inputs | None:
        config = self.config
        shown, found = text.shown_difference(texts, prompts)
        self.shown |= shown
        self.found += found
        tasks: list[PreparedTask] = load_tasks(config.evals)
        try:
            self.found += text.prompt_findings(config, texts, prompts, tasks)
            if (said := cut_answers(config, prompts)) is not None:
                self.found.append(Finding(check="data", stage=1, level="warn", said=said))
            check_context(config, texts, prompts, tasks)
            check_writers(config, prompts, texts.student)
            rewards = make_rewards(config, prompts, texts.student)
        except (BadInput, DataError) as error:
            for task in tasks:
                task.grader.close()
            self.found.append(Finding(check="inputs", stage=1, level="stop", said=str(error), asks="mend_config"))
            return None
        asked = read_prompts(config, prompts.prompts())
        return Inputs(config, texts, prompts, tasks, rewards, asked)

    # ---- models --------------------------------------------------------------------------------------------------

    def _load(self, inputs: Inputs) -> Models | None:
        config, texts = embedded(self.config), inputs.texts
        if not isinstance(self.config.engine, Engine):
            self.found.append(
                Finding(
                    check="engine",
                    stage=3,
                    level="note",
                    said=f"the run writes with {self.config.engine.kind}; here the embedded engine does",
                    means="what they say holds for both; the seconds of the rollout phase are the embedded engine's",
                )
            )
        try:
            student = load_student(config.student, texts.student.tokenizer.vocab_size)
            first = inputs.prompts.batch(0)[:4]
            next_token_logits(student, student.head, [prompt.ids for prompt in first])
            engine = engine_for(config, student)
        except ModelError as error:
            self.found.append(Finding(check="student", stage=3, level="stop", said=str(error), asks="mend_config"))
            return None
        try:
            scorers = Scorers(config, texts, student, inputs.asked)
        except ModelError as error:
            self.found.append(
                Finding(
                    check="teacher",
                    stage=3,
                    level="stop",
                    said=str(error),
                    change=("teacher.model=...",),
                    asks="another_teacher",
                )
            )
            return None
        except ServiceUnavailable as error:
            self.found.append(Finding(check="server", stage=3, level="stop", said=str(error), asks="mend_config"))
            return None
        self._scorers.append(scorers)
        for note in scorers.notes():
            self.found.append(Finding(check="scorers", stage=3, level="note", said=note))
        return Models(student, engine, scorers)

    # ---- rollouts ------------------------------------------------------------------------------------------------

    def _look(self, inputs: Inputs, models: Models) -> None:
        config, options = self.config, self.options
        self.tell(f"4 {counted(options.rollouts, 'rollout')}")
        params = training_params(config, inputs.texts)
        cut = self._cut
        asked = first_prompts(inputs, options.rollouts)
        each = max(1, -(-options.rollouts // len(asked)))
        rollouts_N = models.engine.generate(
            asked, replace(params, max_tokens=cut, samples_per_prompt=each), tag="doctor"
        )
        rollouts_N = rollouts_N[: options.rollouts] if each == 1 else rollouts_N
        fmt = inputs.texts.student
        special, shown = fmt.tokenizer.special_ids, dict(fmt.tokenizer.tokens)
        self.found += support.answers_findings(rollouts_N, cut=cut, limit=params.max_tokens)
        ended = support.control_finding("student", rollouts_N, special, params.stop_ids, shown, "student")
        self._add(ended)
        self.found += alignment.alignment_findings(config, inputs.texts, rollouts_N, list(models.members))
        if any(finding.check == "alignment" and finding.level == "stop" for finding in self.found):
            return
        reader = self._reader(models)
        members: dict[str, Any] = dict(models.members)
        budget = config.learner.tokens_per_micro_batch
        few = [r for r in rollouts_N if len(r.response_ids)][:FEW]
        if not few:
            self.found.append(
                Finding(
                    check="length",
                    stage=4,
                    level="stop",
                    said="every answer of the student is empty",
                    asks="mend_template",
                )
            )
            return
        untempered = params.temperature == config.objective.student_temperature
        exact = untempered and params.top_p == 1 and params.top_k == 0
        self.found += sanity.sanity_findings(few, reader, members, tokens_per_micro_batch=budget, exact_draws=exact)
        if any(finding.level == "stop" and finding.stage == 3 for finding in self.found):
            return
        self.found += sanity.server_findings(inputs, models, reader, few)
        if self.stopped and any(finding.check == "server" for finding in self.found if finding.level == "stop"):
            return
        problems = self._problems(inputs, cut)
        student_answers = None
        if problems is not None:
            student_answers = self._student_answers(problems, inputs, models)
        room = Room(
            inputs=inputs,
            reader=reader,
            rollouts_N=rollouts_N,
            cut=cut,
            problems=problems,
            student_answers=student_answers,
            tell=self.tell,
        )
        for name, member in members.items():
            heard = hear(room, name, member)
            self.found += heard.findings
            if not self.stopped:
                resolution = heard.tokens.resolution
                self.found += signal.signal_findings(embedded(config), models, rollouts_N, name, resolution)
            member.release()
        if self.options.updates and not self.stopped:
            self.tell("5 a few updates")
            self._time(inputs, models, reader, rollouts_N, cut, params.max_tokens)

    @property
    def _cut(self) -> int:
        return min(self.options.cut, self.config.sampling.max_tokens)

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _add(self, finding: Finding | None) -> None:
        if finding is not None:
            self.found.append(finding)

    def _reader(self, models: Models) -> LocalTeacher:
        config, fmt = self.config, self._inputs.texts.student if self._inputs else None
        assert fmt is not None
        return student_reader(
            models.student,
            fmt,
            chunk_tokens=config.learner.chunk_tokens,
            temperature=config.objective.student_temperature,
            share_prompts=config.learner.share_prompts,
        )

    def _problems(self, inputs: Inputs, cut: int) -> Problems | None:
        """The first held-out task, or the training prompts where their answers are graded."""
        config, fmt, number = self.config, inputs.texts.student, self.options.rollouts
        if inputs.tasks:
            task = inputs.tasks[0]
            params = sampling_params(task.spec.sampling or config.sampling, fmt, samples=1)
            rows, grader, where = task.rows[:number], task.grader, task.spec.name
        elif config.rewards is not None and inputs.rewards is not None:
            params = sampling_params(config.sampling, fmt, samples=1)
            rows = [prompt.row for prompt in first_prompts(inputs, number)]
            spec = config.rewards.grader
            grader = make_grader(spec.kind, spec.model_dump(exclude={"kind"}), workers=config.rewards.workers)
            self._grader, where = grader, "training prompts"
        else:
            self.found.append(
                Finding(
                    check="ability",
                    stage=4,
                    level="note",
                    said="no held-out task and no grader: whether the teacher is better than the student is not known",
                    change=("evals.tasks=[{name: ..., source: {...}, grader: {kind: ...}}]",),
                )
            )
            return None
        asked = params.max_tokens
        return Problems(
            where=where, rows=rows, grader=grader, params=replace(params, max_tokens=min(cut, asked)), asked=asked
        )

    def _student_answers(self, problems: Problems, inputs: Inputs, models: Models) -> Answers:
        fmt = inputs.texts.student

        def prompt(row: Row) -> Prompt:
            return render(row, fmt)

        return answer(problems, models.engine, prompt, fmt, tag="doctor/problems")

    def _time(
        self,
        inputs: Inputs,
        models: Models,
        reader: LocalTeacher,
        rollouts_N: Sequence[Rollout],
        cut: int,
        limit: int,
    ) -> None:
        config = self.config
        trial = speed.Trial(inputs, models, cut=cut)
        budget = config.learner.tokens_per_micro_batch
        before = read(rollouts_N, reader, reader, tokens_per_micro_batch=budget, wanted="sampled")
        first = max(1, min(config.prompts.per_step, self.options.rollouts // trial.params.samples_per_prompt))
        try:
            trial.steps(1, first)
            after = read(rollouts_N, reader, reader, tokens_per_micro_batch=budget, wanted="sampled")
            self._add(signal.moved_finding(config, before, after))
            measured, _ = speed.measure(trial, first=first)
            number = (measured.answers.number or 0) * config.prompts.per_step / measured.prompts
            answers = speed.whole_answers(trial.last, cut, limit, number)
            seconds, made = speed.predict(config, inputs, models, measured, answers)
        except OpdError as error:
            self.found.append(Finding(check="time", stage=5, level="stop", said=str(error), asks="mend_config"))
            return
        price = self.options.price
        self.found.append(speed.time_finding(config, measured, seconds, made, answers, price=price))
