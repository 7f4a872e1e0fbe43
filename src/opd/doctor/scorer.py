"""What one scorer says about the student's answers, and what it writes itself: the larger part of stage 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opd.config.objective import DivergenceTerm
from opd.config.scorers import all_scorers, option_of
from opd.config.slots import Sampled
from opd.doctor import support, templates
from opd.doctor.ability import Answers, Problems, ability_finding, separation_finding
from opd.doctor.evidence import Tokens, read
from opd.doctor.findings import Finding
from opd.doctor.rooms import Inputs, embedded
from opd.errors import BadInput, DataError
from opd.teachers.local import LocalTeacher
from opd.text.crossing import Crossing
from opd.types import Grade, Rollout, Row
from opd.wiring.build import exam_format, render, sampling_params


@dataclass(frozen=True, kw_only=True)
class Room:
    """What every scorer is asked about.

    reader           the student as a reader of answers.
    rollouts_N       its answers to training prompts; `cut`: tokens at which they were cut.
    problems         what both are asked for a grade, and the student's answers to it; None: nobody can grade.
    tell             called with what is going on.
    """

    inputs: Inputs
    reader: LocalTeacher
    rollouts_N: Sequence[Rollout]
    cut: int
    problems: Problems | None
    student_answers: Answers | None
    tell: Callable[[str], None]


@dataclass(frozen=True)
class Heard:
    """Findings of one scorer in order, and what it gave at the tokens of the student's answers."""

    findings: list[Finding]
    tokens: Tokens


def hear(room: Room, name: str, member: Any) -> Heard:
    """Asks the scorer `name`, a member of the run's panel."""
    asked = _Asked(room, name, member)
    tokens = asked.everything()
    return Heard(asked.found, tokens)


class _Asked:
    def __init__(self, room: Room, name: str, member: Any) -> None:
        self.room, self.name, self.member = room, name, member
        self.config = room.inputs.config
        self.option = option_of(self.config, name)
        self.budget = self.config.learner.tokens_per_micro_batch
        self.fmt = room.inputs.texts.student
        self.foreign = isinstance(member.agreement, Crossing)
        heard = member.format if self.foreign else self.fmt  # whose numbering its first choices have
        self.ends, self.vocab_size = heard.end_ids, heard.tokenizer.vocab_size
        self.special, self.shown = heard.tokenizer.special_ids, dict(heard.tokenizer.tokens)
        self.found: list[Finding] = []

    def everything(self) -> Tokens:
        room, name, member = self.room, self.name, self.member
        own_weights = all_scorers(self.config)[name].weights == "model"
        tokens = read(room.rollouts_N, room.reader, member, tokens_per_micro_batch=self.budget)
        self._add(support.end_finding(name, room.rollouts_N, tokens, self.special, self.ends, self.shown, self.option))
        own: Answers | None = None
        theirs: support.Reach | None = None
        able: bool | None = None
        graded = room.problems is not None and own_weights
        if isinstance(member, LocalTeacher) and own_weights:
            room.tell(f"4 answers of {name}")
            own, theirs = self._own_answers(member)
        if graded and own is not None and room.student_answers is not None and room.problems is not None:
            judged = ability_finding(name, room.problems.where, room.student_answers, own, self.option)
            self.found.append(judged)
            able = {"ok": True, "stop": False}.get(judged.level)
            self._separates(room.student_answers)
        elif graded:
            self.found.append(
                Finding(
                    check="ability",
                    stage=4,
                    level="note",
                    said=f"{name} writes no answers here: whether it is better than the student is not known",
                )
            )
        if isinstance(member, LocalTeacher):
            self._formats(member, own if graded else None)
        self.found.append(support.support_finding(name, tokens, theirs, able=able, foreign=self.foreign))
        self.found += support.divergence_findings(
            name, tokens, self.vocab_size, drawn=self._drawn, foreign=self.foreign
        )
        return tokens

    def _own_answers(self, member: LocalTeacher) -> tuple[Answers | None, support.Reach | None]:
        """What a teacher in this process writes: graded where there are problems, and read by the student."""
        config, fmt, room, name = embedded(self.config), self.fmt, self.room, self.name
        if room.problems is not None:
            asked, spec = room.problems, exam_format(member.format)
        else:
            rows = list({rollout.prompt.id: rollout.prompt.row for rollout in room.rollouts_N}.values())
            params = replace(sampling_params(config.sampling, fmt, samples=1), max_tokens=room.cut)
            asked = Problems(where="", rows=rows, grader=_Nobody(), params=params, asked=params.max_tokens)
            spec = member.format
        try:
            tag = f"doctor/{name}"
            own = templates.written(config, asked, member.model, spec, tag=tag, agreement=member.agreement)
            prompts = [render(row, fmt) for row in asked.rows]
            moved = templates.as_student(own.rollouts_N, prompts, member.agreement)
        except (BadInput, DataError) as error:
            self.found.append(
                Finding(check="ability", stage=4, level="note", said=f"{name} cannot be asked itself: {error}")
            )
            return None, None
        self._add(support.control_finding(name, own.rollouts_N, self.special, spec.end_ids, self.shown, self.option))
        written = [rollout for rollout in moved if len(rollout.response_ids)]
        theirs = read(written, room.reader, room.reader, tokens_per_micro_batch=self.budget, wanted="sampled")
        return own, support.reach(theirs)

    def _separates(self, answers: Answers) -> None:
        try:
            tokens = read(
                answers.rollouts_N,
                self.room.reader,
                self.member,
                tokens_per_micro_batch=self.budget,
                wanted="sampled",
            )
        except DataError:
            return  # held-out problems lack a column of its context
        n = len(answers.rollouts_N)
        by_score, by_ratio = tokens.by_answer(tokens.drawn_q_T, n), tokens.by_answer(tokens.log_ratio_T, n)
        self._add(separation_finding(self.name, by_score, by_ratio, answers.score_N))

    def _formats(self, member: LocalTeacher, own: Answers | None) -> None:
        config, room = embedded(self.config), self.room
        for other in templates.others(member.format, self.fmt, self.option):
            gap = templates.reads_better(room.rollouts_N, room.reader, member, other, tokens=self.budget)
            try:
                made = templates.template_finding(
                    config, self.name, member.model, other, gap, own, room.problems, member.agreement
                )
                self._add(made)
            except (BadInput, DataError):
                continue  # the other format cannot write these rows

    @property
    def _drawn(self) -> bool:
        return any(
            isinstance(term, DivergenceTerm) and isinstance(term.support, Sampled)
            for term in self.config.objective.terms
        )

    def _add(self, finding: Finding | None) -> None:
        if finding is not None:
            self.found.append(finding)


class _Nobody:
    """A grader that decides nothing."""

    def grade(self, rows: Sequence[Row], answers: Sequence[str]) -> list[Grade]:
        return [Grade(score=None) for _ in answers]

    def close(self) -> None:
        pass
