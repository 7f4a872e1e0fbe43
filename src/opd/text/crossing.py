"""A student and a teacher with different tokenizers: what the teacher reads of an answer, and which tokens are which.

Bytes decide, never ids and never decoded strings. The teacher reads the text of the student's answer behind its own
prompt, in its own tokens. Where the borders of both meet, the tokens between are a span, if they are the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from opd.text.agreement import Agreement, closing_notes, compare, difference
from opd.text.fit import Fit, measured
from opd.text.formats import PromptFormat
from opd.text.sides import AnswerLead, Side
from opd.text.spans import joined
from opd.text.written import DROPPED
from opd.types import Prompt, Rollout, Spans


@dataclass(frozen=True)
class CrossRead:
    """What the teacher reads in place of an answer.

    ids    int64 [U]: in its own ids, with its own end token where the answer ended.
    spans  how they fit to the student's.
    """

    ids: NDArray[np.int64]
    spans: Spans


@dataclass(frozen=True, kw_only=True, eq=False)
class Crossing:
    """A student and a teacher with different tokenizers.

    vocab_size      the student's real tokens.
    teacher_of_V    int64 [vocab_size]: the teacher's token that is the same bytes, -1 where it has none. One-to-one.
                    The primary end tokens are each other's; other control tokens are where their names are the same.
    matched_share   share of the teacher's vocabulary that the student has.
    fit             how the two agree on probe texts.
    notes           what fits well enough to run but is worth a look, in words.
    fingerprint     of both formats.
    foreign         True: an `Agreement` is for teachers with the student's tokenizer.
    """

    foreign: ClassVar[bool] = True

    vocab_size: int
    student_fmt: PromptFormat
    teacher_fmt: PromptFormat
    teacher_of_V: NDArray[np.int64]
    fit: Fit
    notes: tuple[str, ...]
    _student: Side = field(repr=False)
    _teacher: Side = field(repr=False)

    @property
    def matched_share(self) -> float:
        return float((self.teacher_of_V >= 0).sum()) / len(self.teacher_fmt.tokenizer.tokens)

    @property
    def fingerprint(self) -> str:
        both = f"crossing 1\n{self.student_fmt.fingerprint}\n{self.teacher_fmt.fingerprint}"
        return hashlib.sha256(both.encode()).hexdigest()

    def read(self, rollout: Rollout) -> CrossRead:
        """What the teacher reads of an answer. The same for the same answer, and not kept: hold on to it.

        An answer that the student ended, by any of its end tokens, ends for the teacher with its primary one. DataError
        when the row does not fit the teacher's format.
        """
        row, ids_T = rollout.prompt.row, rollout.response_ids.astype(np.int64)
        ended = rollout.finish_reason == "stop" and len(ids_T) > 0 and int(ids_T[-1]) in self.student_fmt.end_ids
        student, teacher = self._student.lead(row), self._teacher.lead(row)
        return self._read(ids_T, student, teacher, ended=ended)

    def read_text(self, text: str) -> tuple[NDArray[np.int64], CrossRead]:
        """A text by itself, without prompt and end, as the student would write it: its ids, and what is read."""
        ids_T = self._student.encoded(text)
        return ids_T, self._read(ids_T, self._student.alone, self._teacher.alone, ended=False)

    def student_answer(self, prompt: Prompt, answer_ids_U: NDArray[np.int64], *, ended: bool) -> NDArray[np.int64]:
        """int64 [T]: an answer that the teacher wrote, in the ids with which the student goes on behind `prompt`.

        answer_ids_U may close with one of the teacher's end tokens, which is taken off. The student's primary end is
        put behind an answer that ended, and nothing behind another. An answer in which the student reads one of its own
        end tokens before the end is over there: it could not have sampled the rest.
        """
        ids_U = np.asarray(answer_ids_U, dtype=np.int64)
        if ended and len(ids_U) and int(ids_U[-1]) in self.teacher_fmt.end_ids:
            ids_U = ids_U[:-1]
        text = self._teacher.written(ids_U, self._teacher.lead(prompt.row), self._student)
        ids_T, _ = self._student.read(self._student.lead(prompt.row), text)
        early = np.flatnonzero(np.isin(ids_T, self.student_fmt.end_ids))
        if len(early):
            return ids_T[: early[0] + 1]
        return np.append(ids_T, self.student_fmt.end_ids[0]) if ended else ids_T

    def _read(self, ids_T: NDArray[np.int64], ours: AnswerLead, theirs: AnswerLead, *, ended: bool) -> CrossRead:
        text = self._student.written(ids_T[:-1] if ended else ids_T, ours, self._teacher)
        ids_U, found = self._teacher.read(theirs, text)
        if ended:  # put behind the text, not into it: no end token's white space rules, and one for one whatever ends
            text, found = text.ended(), found.ended()
            ids_U = np.append(ids_U, self.teacher_fmt.end_ids[0])
        span_T, span_U = joined(
            text.start_T, text.end_T, found.lost(text), found.start_U, found.end_U, found.bad_U, len(text.symbol_B)
        )
        return CrossRead(ids_U, Spans(span_T=span_T, span_U=span_U, same_T=self._same(ids_T, span_T, ids_U, span_U)))

    def _same(
        self, ids_T: NDArray[np.int64], span_T: NDArray[np.int64], ids_U: NDArray[np.int64], span_U: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        count = int(span_T.max(initial=-1)) + 1
        one = np.bincount(span_T[span_T >= 0], minlength=count) == 1
        one &= np.bincount(span_U[span_U >= 0], minlength=count) == 1
        theirs = np.full(count + 1, -1, dtype=np.int64)
        theirs[:-1][span_U[span_U >= 0]] = ids_U[span_U >= 0]
        theirs[:-1][~one] = -1  # the last entry is that of tokens without a span
        inside = (ids_T >= 0) & (ids_T < self.vocab_size)
        wanted = np.where(inside, self.teacher_of_V[np.where(inside, ids_T, 0)], -1)
        return (wanted >= 0) & (wanted == theirs[span_T])


def agree(student: PromptFormat, teacher: PromptFormat) -> Agreement | Crossing:
    """What a student and a teacher have in common: an `Agreement` where they have one tokenizer, else a `Crossing`.

    ModelError for what cannot be run: an `Agreement` whose ends never meet; a `Crossing` to a teacher that would read
    another text than the student's, because its tokenizer changes most of it.
    """
    if difference(student.tokenizer, teacher.tokenizer) is None:
        return compare(student, teacher)
    ours, theirs = Side(student), Side(teacher)
    teacher_of_V = _shared(ours, theirs)
    student_of_V = np.full(teacher.tokenizer.vocab_size, -1, dtype=np.int64)
    shared_V = teacher_of_V >= 0
    student_of_V[teacher_of_V[shared_V]] = np.flatnonzero(shared_V)
    _name_events(ours, theirs, teacher_of_V)
    _name_events(theirs, ours, student_of_V)
    fit = measured(ours, theirs)
    fit.check(student.tokenizer.source, teacher.tokenizer.source)
    return Crossing(
        vocab_size=student.tokenizer.vocab_size,
        student_fmt=student,
        teacher_fmt=teacher,
        teacher_of_V=teacher_of_V,
        fit=fit,
        notes=(*_end_notes(student, teacher, student_of_V), *fit.notes(teacher.tokenizer.source)),
        _student=ours,
        _teacher=theirs,
    )


def _shared(ours: Side, theirs: Side) -> NDArray[np.int64]:
    """int64 [V]: see `Crossing.teacher_of_V`."""
    found = np.full(ours.fmt.tokenizer.vocab_size, -1, dtype=np.int64)
    our_control, their_control = ours.fmt.guard.control_ids, theirs.fmt.guard.control_ids
    counterparts = theirs.table.ids_of_bytes
    for raw, number in ours.table.ids_of_bytes.items():
        other = counterparts.get(raw, -1)
        if number not in our_control and other not in their_control:
            found[number] = other
    named = {theirs.fmt.tokenizer.tokens[number]: number for number in theirs.fmt.tokenizer.added_ids}
    for number in sorted(ours.fmt.tokenizer.added_ids - ours.table.unknown_ids):
        other = named.get(ours.fmt.tokenizer.tokens[number], -1)
        if other >= 0 and other not in theirs.table.unknown_ids:
            found[found == other] = -1
            found[number] = other
    our_end, their_end = ours.fmt.end_ids[0], theirs.fmt.end_ids[0]
    found[found == their_end] = -1
    found[our_end] = their_end
    return found


def _name_events(writer: Side, reader: Side, reader_of_V: NDArray[np.int64]) -> None:
    """Says which of the writer's tokens are no text to the reader."""
    control = writer.fmt.guard.control_ids
    for number in (writer.fmt.tokenizer.added_ids | control) - writer.table.unknown_ids:
        other = int(reader_of_V[number])
        if other in reader.fmt.guard.control_ids:
            writer.event_V[number] = other
        elif number in control and other not in reader.fmt.tokenizer.added_ids:
            writer.event_V[number] = DROPPED


def _end_notes(student: PromptFormat, teacher: PromptFormat, student_of_V: NDArray[np.int64]) -> tuple[str, ...]:
    notes = [*closing_notes(student, teacher)]
    for who, fmt in (("student", student), ("teacher", teacher)):
        if fmt.end_ids[0] not in fmt.tokenizer.added_ids:
            notes.append(
                f"the {who} ends answers with {fmt.tokenizer.tokens[fmt.end_ids[0]]!r}, which is ordinary text: what "
                "ends answers for one model may be any text to the other"
            )
    more = [n for n in teacher.end_ids[1:] if int(student_of_V[n]) not in student.end_ids]
    if more:
        named = ", ".join(repr(teacher.tokenizer.tokens[n]) for n in more)
        notes.append(f"the teacher may also end answers with {named}, which is no end for the student")
    return tuple(notes)
