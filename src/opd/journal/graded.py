"""A graded record: answers, and what one or several models say about each of their tokens. Plain JSON.

It is what `opd grade` writes, and what a run keeps of some answers in `views/`; pages and terminals are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

from opd.errors import DataError

SCHEMA_VERSION = 1
FORMAT = "opd-graded"


class ReaderInfo(TypedDict):
    """Which weights, tokenizer, format and temperature a reader had."""

    model: str
    fingerprint: str


class _BesideStudent(TypedDict, total=False):
    reverse_kl: dict[str, list[float | None]]


class GradedAnswer(_BesideStudent):
    """One answer, or one assistant turn of a chat, of T tokens. Lists of numbers hold None where one is not finite.

    ids         in the numbering of the record's first reader (the student where there is one).
    pieces      what each token adds to the text; special tokens are visible.
    mask        1 where the writer chose the token; only these count.
    logprobs    reader to log-probability of each token, in nats.
    entropy     reader to entropy of its distribution at each token, in nats.
    reverse_kl  teacher to KL(student || teacher) over the vocabulary, in nats; absent without a student.
    top         reader to its K most likely tokens, the most likely first, as [id, log-probability].
    """

    id: str
    prompt_id: str
    domain: str
    turn: int
    prompt: str
    finish_reason: Literal["stop", "length"] | None
    score: float | None
    ids: list[int]
    pieces: list[str]
    mask: list[int]
    logprobs: dict[str, list[float | None]]
    entropy: dict[str, list[float | None]]
    top: dict[str, list[list[tuple[int, float]]]]


class _Written(TypedDict, total=False):
    """What may be missing.

    written_by_student  False where somebody else than the student wrote the answers; penalties then leave the student
                        aside, see `writer_of`: what neither model would write is about as unlikely to both. Missing:
                        True.
    left_out            a model that should have read them, too, to the reason why it could not. Missing: nobody.
    """

    written_by_student: bool
    left_out: dict[str, str]


class GradedRecord(_Written):
    """Some answers as their readers see them.

    student   name of the reader that stands beside the teachers, or None.
    teachers  names of the readers whose opinion it is about.
    texts     token id (as a string) to how it is shown on its own, for every id in `top`.
    """

    schema_version: int
    format: Literal["opd-graded"]
    title: str
    step: int | None
    student: str | None
    teachers: list[str]
    readers: dict[str, ReaderInfo]
    texts: dict[str, str]
    answers: list[GradedAnswer]


class MeanPenalty(TypedDict):
    """Mean penalty of `count` tokens, in nats."""

    mean: float
    count: int


class PositionPenalty(MeanPenalty):
    """The same for the tokens whose index in their answer is in [start, end)."""

    start: int
    end: int


def penalty(answer: GradedAnswer, teacher: str, student: str | None) -> list[float | None]:
    """[T] nats: how the teacher likes each token; negative is bad. None where the mask is 0 or a number is missing.

    With a student: log q(y) - log p(y), negative where the teacher likes the token less than the student does.
    Without: log q(y) + H(q), negative where the token surprises the teacher more than its own uncertainty explains:
    its mean over tokens drawn from q itself is 0.
    """
    theirs = answer["logprobs"][teacher]
    if student is None:
        parts = zip(answer["mask"], theirs, answer["entropy"][teacher], strict=True)
        return [q + h if m and q is not None and h is not None else None for m, q, h in parts]
    parts = zip(answer["mask"], theirs, answer["logprobs"][student], strict=True)
    return [q - p if m and q is not None and p is not None else None for m, q, p in parts]


def writer_of(record: GradedRecord) -> str | None:
    """The reader that penalties are measured against: the student, where it is the writer."""
    return record["student"] if record.get("written_by_student", True) else None


def worst(record: GradedRecord, n: int, teacher: str) -> list[tuple[int, int, float]]:
    """(index of the answer, index of the token, penalty) of the `n` lowest penalties, the lowest first."""
    return sorted(_penalties(record, teacher), key=lambda found: (found[2], found[:2]))[:n]


def by_position(record: GradedRecord, teacher: str, bins: int = 20) -> list[PositionPenalty]:
    """Mean penalty along the answers, in at most `bins` equal steps of the longest; steps without a number left out."""
    longest = max((len(answer["ids"]) for answer in record["answers"]), default=0)
    width = max(1, -(-longest // bins))
    sums: dict[int, list[float]] = {}
    for _, token, value in _penalties(record, teacher):
        sums.setdefault(token // width, []).append(value)
    return [
        {"start": b * width, "end": min((b + 1) * width, longest), **_mean(values)}
        for b, values in sorted(sums.items())
    ]


def by_domain(record: GradedRecord, teacher: str) -> dict[str, MeanPenalty]:
    """Mean penalty of each domain, in alphabetical order; domains without a number left out."""
    sums: dict[str, list[float]] = {}
    for index, _, value in _penalties(record, teacher):
        sums.setdefault(record["answers"][index]["domain"], []).append(value)
    return {domain: _mean(values) for domain, values in sorted(sums.items())}


def check(record: Any) -> GradedRecord:
    """The record itself; DataError, naming the place, when it is not a graded record that agrees with itself."""
    _need(isinstance(record, Mapping), "a graded record is a JSON object", type(record).__name__)
    _need(record.get("format") == FORMAT, f"format must be {FORMAT!r}", record.get("format"))
    version = record.get("schema_version")
    _need(_is_int(version) and version >= 1, "schema_version must be a number", version)
    _need(
        version <= SCHEMA_VERSION, f"this opd reads graded records up to schema {SCHEMA_VERSION}; update opd", version
    )
    _keys(record, GradedRecord, "")
    _need(isinstance(record["title"], str), "title must be text", record["title"])
    _need(record["step"] is None or _is_int(record["step"]), "step must be a whole number or null", record["step"])
    _need(isinstance(record.get("written_by_student", True), bool), "written_by_student must be true or false", record)
    left_out = record.get("left_out", {})
    _need(isinstance(left_out, Mapping), "left_out must be an object", type(left_out).__name__)
    for name, why in left_out.items():
        _need(isinstance(name, str) and isinstance(why, str), f"left_out.{name} must be text", why)
    _check_readers(record)
    _need(isinstance(record["texts"], Mapping), "texts must be an object", type(record["texts"]).__name__)
    for key, text in record["texts"].items():
        _need(isinstance(key, str) and key.isdecimal(), "keys of texts are token ids", key)
        _need(isinstance(text, str), f"texts.{key} must be text", text)
    _need(_is_list(record["answers"]), "answers must be a list", type(record["answers"]).__name__)
    for index, answer in enumerate(record["answers"]):
        _check_answer(answer, record, f"answers.{index}")
    return cast(GradedRecord, record)


def _check_readers(record: Mapping[str, Any]) -> None:
    readers, teachers, student = record["readers"], record["teachers"], record["student"]
    _need(isinstance(readers, Mapping), "readers must be an object", type(readers).__name__)
    for name, info in readers.items():
        _need(isinstance(info, Mapping), f"readers.{name} must be an object", info)
        _keys(info, ReaderInfo, f"readers.{name}.")
        for key in ("model", "fingerprint"):
            _need(isinstance(info[key], str), f"readers.{name}.{key} must be text", info[key])
    _need(_is_list(teachers) and len(teachers) > 0, "teachers must be a list of at least one reader", teachers)
    for name in (*teachers, *([] if student is None else [student])):
        _need(isinstance(name, str) and name in readers, f"readers are {_named(readers)}; not among them", name)
    _need(len(set(teachers)) == len(teachers), "a teacher is named twice in", teachers)
    _need(student not in teachers, "the student cannot be one of the teachers", student)


def _check_answer(answer: Any, record: Mapping[str, Any], where: str) -> None:
    _need(isinstance(answer, Mapping), f"{where} must be an object", type(answer).__name__)
    _keys(answer, GradedAnswer, f"{where}.")
    for key in ("id", "prompt_id", "domain", "prompt"):
        _need(isinstance(answer[key], str), f"{where}.{key} must be text", answer[key])
    _need(_is_int(answer["turn"]), f"{where}.turn must be a whole number", answer["turn"])
    _need(
        answer["finish_reason"] in ("stop", "length", None),
        f"{where}.finish_reason must be stop, length or null",
        answer["finish_reason"],
    )
    _need(_is_number(answer["score"], none=True), f"{where}.score must be a number or null", answer["score"])
    _need(_is_list(answer["ids"]), f"{where}.ids must be a list", type(answer["ids"]).__name__)
    length = len(answer["ids"])
    _each(answer["ids"], length, f"{where}.ids", lambda x: _is_int(x) and x >= 0, "token ids")
    _each(answer["pieces"], length, f"{where}.pieces", lambda x: isinstance(x, str), "texts")
    _each(answer["mask"], length, f"{where}.mask", lambda x: _is_int(x) and x in (0, 1), "0 and 1")
    readers, teachers = list(record["readers"]), record["teachers"]
    for key in ("logprobs", "entropy"):
        for name, values in _of(answer[key], readers, f"{where}.{key}"):
            _each(values, length, f"{where}.{key}.{name}", lambda x: _is_number(x, none=True), "numbers or null")
    if record["student"] is None:
        _need("reverse_kl" not in answer, f"{where}.reverse_kl needs a student, the record has", None)
    else:
        _need("reverse_kl" in answer, f"{where}.reverse_kl is missing, though there is a student", record["student"])
        for name, values in _of(answer["reverse_kl"], teachers, f"{where}.reverse_kl"):
            _each(values, length, f"{where}.reverse_kl.{name}", lambda x: _is_number(x, none=True), "numbers or null")
    for name, rows in _of(answer["top"], readers, f"{where}.top"):
        _each(rows, length, f"{where}.top.{name}", _is_top, "lists of [id, log-probability]")
        for pair in (pair for row in rows for pair in row):
            _need(str(pair[0]) in record["texts"], f"{where}.top.{name}: texts has no token", pair[0])


def _of(value: Any, names: Sequence[str], where: str) -> Iterator[tuple[str, Any]]:
    _need(isinstance(value, Mapping), f"{where} must be an object", type(value).__name__)
    _need(set(value) == set(names), f"{where} must be about exactly {_named(names)}, but is about", _named(value))
    return iter(value.items())


def _each(values: Any, length: int, where: str, right: Any, what: str) -> None:
    _need(_is_list(values), f"{where} must be a list", type(values).__name__)
    _need(len(values) == length, f"{where} must be as long as the answer's ids, {length}", len(values))
    for index, value in enumerate(values):
        _need(right(value), f"{where}.{index}: must hold {what}", value)


def _keys(value: Mapping[str, Any], kind: Any, where: str) -> None:
    for key in sorted(kind.__required_keys__):
        _need(key in value, f"{where}{key} is missing; there are", _named(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any, *, none: bool = False) -> bool:
    if value is None:
        return none
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_top(value: Any) -> bool:
    return _is_list(value) and all(
        _is_list(pair) and len(pair) == 2 and _is_int(pair[0]) and _is_number(pair[1]) for pair in value
    )


def _need(holds: Any, rule: str, found: Any) -> None:
    if not holds:
        raise DataError(f"graded record: {rule}: {str(found)[:200]}")


def _named(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _penalties(record: GradedRecord, teacher: str) -> Iterator[tuple[int, int, float]]:
    if teacher not in record["teachers"]:
        raise DataError(f"graded record: its teachers are {_named(record['teachers'])}; not among them: {teacher}")
    for index, answer in enumerate(record["answers"]):
        for token, value in enumerate(penalty(answer, teacher, writer_of(record))):
            if value is not None:
                yield index, token, value


def _mean(values: list[float]) -> MeanPenalty:
    return {"mean": math.fsum(values) / len(values), "count": len(values)}
