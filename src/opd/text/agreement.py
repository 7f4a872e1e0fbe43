"""Do student and teacher speak of the same tokens, and do they end answers in the same way?"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from opd.errors import ModelError
from opd.text.formats import PromptFormat
from opd.text.probes import PROBES as PROBES
from opd.text.tokenizer import Tokenizer
from opd.types import Row


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What a student and a teacher with one tokenizer have in common.

    vocab_size  the student's real tokens; the teacher knows all of them under the same ids.
    end_map     exchanges (student id, teacher id): the teacher reads either id as the other. Empty, or one pair: the
                student's primary end token and the teacher's.
    notes       what fits well enough to run but is worth a look, in words.
    foreign     False: `opd.text.crossing` is for teachers with another tokenizer.
    """

    foreign: ClassVar[bool] = False

    vocab_size: int
    end_map: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()

    def teacher_ids(self, response_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [T]: the student's answer as the teacher must read it."""
        read = response_ids.copy()
        for ours, theirs in self.end_map:
            read[response_ids == ours] = theirs
            read[response_ids == theirs] = ours
        return read

    def order(self) -> NDArray[np.int64] | None:
        """int64 [vocab_size]: which row of the teacher's head scores each of the student's tokens (`Head.order_V`)."""
        return self.teacher_ids(np.arange(self.vocab_size, dtype=np.int64)) if self.end_map else None


def compare(student: PromptFormat, teacher: PromptFormat) -> Agreement:
    """The agreement of two models, or a ModelError that says where they part.

    The vocabularies agree when every token of the student is the teacher's token of the same id and probe texts are
    encoded alike; the teacher may have more added tokens, and both models may pad their embeddings.

    The ends agree when each one's primary end token also ends the other's answers. Otherwise the two primary ends are
    exchanged: the teacher reads `<|endoftext|>` of a base student as its own `<|im_end|>`, and what it says about
    `<|im_end|>` is heard about `<|endoftext|>`. That needs two tokens that are never text, and that both know. Ends
    beyond the primary ones that only one side has leave a note: at worst some answers go on for longer.
    """
    parted = difference(student.tokenizer, teacher.tokenizer)
    if parted is not None:
        raise ModelError(
            f"student {student.tokenizer.source} ({student.tokenizer.vocab_size} tokens) and teacher "
            f"{teacher.tokenizer.source} ({teacher.tokenizer.vocab_size} tokens) have different tokenizers, and here "
            f"one is read as the other: choose a teacher with the student's tokenizer. {parted}"
        )
    agreement = Agreement(vocab_size=student.tokenizer.vocab_size, end_map=_exchange(student, teacher))
    return replace(agreement, notes=_notes(student, teacher, agreement))


def rendered_difference(student: PromptFormat, teacher: PromptFormat, row: Row, *, name: str = "teacher") -> str:
    """What each model reads for `row`, and the lines in which that differs, for a person to look at."""
    texts, parts = [], []
    for who, fmt in (("student", student), (name, teacher)):
        text = fmt.show(row)
        texts.append(text)
        parts += [f"--- {who} reads ({fmt.kind}, {len(fmt.prompt_ids(row))} tokens)", text]
    if texts[0] == texts[1]:
        return "\n".join([*parts, "--- difference: none, both read the same prompt"])
    lines = difflib.ndiff(texts[0].splitlines(), texts[1].splitlines())
    return "\n".join([*parts, f"--- difference (- student, + {name})", *(line.rstrip("\n") for line in lines)])


def difference(student: Tokenizer, teacher: Tokenizer) -> str | None:
    """Where two tokenizers part, in words; None where every token of the student's is the same one to the teacher."""
    if student.fingerprint == teacher.fingerprint:
        return None
    ours, theirs = student.tokens, teacher.tokens
    different = [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]
    inside = [n for n in different if n in ours or n < student.vocab_size]
    if inside:
        shown = "; ".join(f"{n}: {ours.get(n)!r} and {theirs.get(n)!r}" for n in inside[:5])
        return f"{len(inside)} ids of the student's mean something else to the teacher, the first: {shown}"
    words = [theirs[n] for n in different if n not in teacher.added_ids]
    if words:
        return f"the teacher has {len(words)} words that the student does not know, the first: {words[:5]}"
    for probe in PROBES:
        a, b = student.encode(probe), teacher.encode(probe)
        if a != b:
            return (
                f"the vocabularies agree, but {probe!r} is encoded as {[ours[n] for n in a]} by the student and as "
                f"{[theirs[n] for n in b]} by the teacher"
            )
    return None


def _exchange(student: PromptFormat, teacher: PromptFormat) -> tuple[tuple[int, int], ...]:
    ours, theirs = student.end_ids[0], teacher.end_ids[0]
    if theirs in student.end_ids and ours in teacher.end_ids:
        return ()
    names = f"the student ends answers with {_names(student)}, the teacher with {_names(teacher)}"
    advice = "give both the same end with student.format.end_tokens or teacher.format.end_tokens"
    if theirs >= student.tokenizer.vocab_size:
        raise ModelError(
            f"answers would grow without end: {names}, and {teacher.tokenizer.tokens[theirs]!r} has id {theirs}, "
            f"which is none of the student's {student.tokenizer.vocab_size} tokens; {advice}"
        )
    for fmt, number in ((student, ours), (teacher, theirs)):
        # What ends one model's answers may be a word of the other's: exchanging those would garble the answers.
        if number not in fmt.tokenizer.added_ids:
            raise ModelError(
                f"answers would grow without end: {names}, and {fmt.tokenizer.tokens[number]!r} is ordinary text, "
                f"which cannot stand for another end token; {advice}"
            )
    return ((ours, theirs),)


def closing_notes(student: PromptFormat, teacher: PromptFormat) -> list[str]:
    """Where one of them does not end answers with what its own chat template closes them with."""
    return [
        f"the {who}'s chat template closes answers with {fmt.tokenizer.tokens[fmt.closing_id]!r}, which is "
        f"not among its end tokens {_names(fmt)}: right for a base model, else set {who}.format.end_tokens"
        for who, fmt in (("student", student), ("teacher", teacher))
        if fmt.closing_id is not None and fmt.closing_id not in fmt.end_ids
    ]


def _notes(student: PromptFormat, teacher: PromptFormat, agreement: Agreement) -> tuple[str, ...]:
    notes = closing_notes(student, teacher)
    read_as = dict(zip(student.end_ids, agreement.teacher_ids(np.array(student.end_ids)).tolist(), strict=True))
    only_student = [n for n in student.end_ids if read_as[n] not in teacher.end_ids]
    only_teacher = [n for n in teacher.end_ids if n not in read_as.values() and n < agreement.vocab_size]
    if only_student:
        named = ", ".join(repr(student.tokenizer.tokens[n]) for n in only_student)
        notes.append(f"the student also ends answers with {named}, which is no end for the teacher")
    if only_teacher:
        named = ", ".join(repr(teacher.tokenizer.tokens[n]) for n in only_teacher)
        notes.append(f"the teacher may also end answers with {named}, at which the student goes on")
    return tuple(notes)


def _names(fmt: PromptFormat) -> str:
    return ", ".join(repr(fmt.tokenizer.tokens[number]) for number in fmt.end_ids)
