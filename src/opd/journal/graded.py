"""A graded record: answers, and what one or several models say about each of their tokens. Plain JSON.

It is what `opd grade` writes, and what a run keeps of some answers in `views/`; pages and terminals are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, TypedDict, cast

from opd.errors import DataError

SCHEMA_VERSION = 1
FORMAT = "opd-graded"


class Coverage(TypedDict):
    """How the tokens that count fit to those that a reader with another tokenizer reads for them.

    coverage, same   shares of the tokens: in spans, and in spans that are the same single token to both.
    span_tokens      tokens of a span in the mean, `span_own_tokens` the reader's; None where there is no span.
    """

    coverage: float
    same: float
    span_tokens: float | None
    span_own_tokens: float | None


class _MayCross(TypedDict, total=False):
    crossed: Coverage


class ReaderInfo(_MayCross):
    """Which weights, tokenizer, format and temperature a reader had; `crossed` where it has another tokenizer than the
    answers."""

    model: str
    fingerprint: str


class _MayLack(TypedDict, total=False):
    reverse_kl: dict[str, list[float | None]]
    spans: dict[str, list[int]]
    own: dict[str, list[list[tuple[int, str, float | None]]]]
    own_top: dict[str, list[list[tuple[int, float]]]]


class GradedAnswer(_MayLack):
    """One answer, or one assistant turn of a chat, of T tokens. Lists of numbers hold None where one is not finite.

    ids         in the numbering of the record's first reader (the student where there is one).
    pieces      what each token adds to the text; special tokens are visible.
    mask        1 where the writer chose the token; only these count.
    logprobs    reader to log-probability of each token, in nats.
    entropy     reader to entropy of its distribution at each token, in nats.
    reverse_kl  teacher to KL(student || teacher) over the vocabulary, in nats; absent without a student.
    top         reader to its K most likely tokens, the most likely first, as [id, log-probability].

    A reader with another tokenizer reads the answer in tokens of its own. Where their borders meet there is a span;
    spans are numbered from 0. Its `logprobs` and `entropy` are the sums over its tokens of a span in equal shares for
    the answer's tokens of it, so that sums over spans are exact; None outside of spans. It has no `reverse_kl`, and its
    rows of `top` are empty. Of such readers alone:

    spans       the span of each token, -1 where it read nothing, or something else.
    own         for each span its own tokens there: id, text, log-probability.
    own_top     for each span its K most likely tokens where the span begins, in its own numbering.
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
    own_texts           reader with another tokenizer to what `texts` is for the others, for every id in `own_top`.
    """

    written_by_student: bool
    left_out: dict[str, str]
    own_texts: dict[str, dict[str, str]]


class GradedRecord(_Written):
    """Some answers as their readers see them.

    student   name of the reader that stands beside the teachers, or None.
    teachers  names of the readers whose opinion it is about.
    texts     token id (as a string) to how it is shown on its own, for every id in `top`.

    What readers with another tokenizer say came later than schema 1, which reads past it.
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

    Of a teacher with another tokenizer: that of a span, in equal shares for its tokens. A span has a number where all
    of its tokens have one.
    """
    theirs = answer["logprobs"][teacher]
    if student is None:
        parts = zip(answer["mask"], theirs, answer["entropy"][teacher], strict=True)
        values = [q + h if m and q is not None and h is not None else None for m, q, h in parts]
    else:
        parts = zip(answer["mask"], theirs, answer["logprobs"][student], strict=True)
        values = [q - p if m and q is not None and p is not None else None for m, q, p in parts]
    for tokens in members(answer, teacher):
        if len(tokens) > 1:
            known = [value for value in (values[token] for token in tokens) if value is not None]
            shared = math.fsum(known) / len(tokens) if len(known) == len(tokens) else None
            for token in tokens:
                values[token] = shared
    return values


def members(answer: GradedAnswer, reader: str) -> list[list[int]]:
    """The tokens of each span of a reader with another tokenizer; of another reader nothing."""
    return grouped(answer.get("spans", {}).get(reader, ()))


def grouped(spans: Iterable[int]) -> list[list[int]]:
    """The places of each span, where each place has the number of its span, or -1."""
    found: list[list[int]] = []
    for place, span in enumerate(spans):
        if span >= 0:
            found[span:] = [[*(found[span] if span < len(found) else ()), place]]
    return found


def writer_of(record: GradedRecord) -> str | None:
    """The reader that penalties are measured against: the student, where it is the writer."""
    return record["student"] if record.get("written_by_student", True) else None


def worst(record: GradedRecord, n: int, teacher: str) -> list[tuple[int, int, float]]:
    """(index of the answer, index of the token, penalty) of the `n` lowest penalties, the lowest first.

    Of a span only its first token.
    """
    later = [{t for tokens in members(answer, teacher) for t in tokens[1:]} for answer in record["answers"]]
    found = (one for one in _penalties(record, teacher) if one[1] not in later[one[0]])
    return sorted(found, key=lambda one: (one[2], one[:2]))[:n]


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
    _check_texts(record["texts"], "texts")
    own_texts = record.get("own_texts", {})
    _need(isinstance(own_texts, Mapping), "own_texts must be an object", type(own_texts).__name__)
    for name, texts in own_texts.items():
        _need(isinstance(texts, Mapping), f"own_texts.{name} must be an object", type(texts).__name__)
        _check_texts(texts, f"own_texts.{name}")
    _need(_is_list(record["answers"]), "answers must be a list", type(record["answers"]).__name__)
    for index, answer in enumerate(record["answers"]):
        _check_answer(answer, record, f"answers.{index}")
    return cast(GradedRecord, record)


def _check_texts(texts: Mapping[str, Any], where: str) -> None:
    for key, text in texts.items():
        _need(isinstance(key, str) and key.isdecimal(), f"keys of {where} are token ids", key)
        _need(isinstance(text, str), f"{where}.{key} must be text", text)


def _check_readers(record: Mapping[str, Any]) -> None:
    readers, teachers, student = record["readers"], record["teachers"], record["student"]
    _need(isinstance(readers, Mapping), "readers must be an object", type(readers).__name__)
    for name, info in readers.items():
        _need(isinstance(info, Mapping), f"readers.{name} must be an object", info)
        _keys(info, ReaderInfo, f"readers.{name}.")
        for key in ("model", "fingerprint"):
            _need(isinstance(info[key], str), f"readers.{name}.{key} must be text", info[key])
        if "crossed" in info:
            _need(name != student, "the student reads its own tokens, but it is crossed", name)
            _need(isinstance(info["crossed"], Mapping), f"readers.{name}.crossed must be an object", info["crossed"])
            _keys(info["crossed"], Coverage, f"readers.{name}.crossed.")
            for key, value in info["crossed"].items():
                _need(_is_number(value, none=True), f"readers.{name}.crossed.{key} must be a number or null", value)
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
        _in_texts(rows, record["texts"], f"{where}.top.{name}: texts")
    _check_crossed(answer, record, where)


def _check_crossed(answer: Mapping[str, Any], record: Mapping[str, Any], where: str) -> None:
    """What readers with another tokenizer say, and nobody else."""
    names = [name for name, info in record["readers"].items() if "crossed" in info]
    counts = {}
    for name, spans in _of(answer.get("spans", {}), names, f"{where}.spans"):
        _each(spans, len(answer["ids"]), f"{where}.spans.{name}", lambda x: _is_int(x) and x >= -1, "spans, or -1")
        runs = [span for span, _ in groupby(span for span in spans if span >= 0)]
        _need(runs == list(range(len(runs))), f"{where}.spans.{name} must be runs numbered from 0", runs)
        counts[name] = len(runs)
    for name, rows in _of(answer.get("own", {}), names, f"{where}.own"):
        _each(rows, counts[name], f"{where}.own.{name}", _is_own, "[id, text, log-probability or null]", of="spans")
    for name, rows in _of(answer.get("own_top", {}), names, f"{where}.own_top"):
        _each(rows, counts[name], f"{where}.own_top.{name}", _is_top, "lists of [id, log-probability]", of="spans")
        _in_texts(rows, record.get("own_texts", {}).get(name, {}), f"{where}.own_top.{name}: own_texts")


def _in_texts(rows: Any, texts: Mapping[str, str], where: str) -> None:
    for pair in (pair for row in rows for pair in row):
        _need(str(pair[0]) in texts, f"{where} has no token", pair[0])


def _of(value: Any, names: Sequence[str], where: str) -> Iterator[tuple[str, Any]]:
    _need(isinstance(value, Mapping), f"{where} must be an object", type(value).__name__)
    _need(set(value) == set(names), f"{where} must be about exactly {_named(names)}, but is about", _named(value))
    return iter(value.items())


def _each(values: Any, length: int, where: str, right: Any, what: str, *, of: str = "ids") -> None:
    _need(_is_list(values), f"{where} must be a list", type(values).__name__)
    _need(len(values) == length, f"{where} must be as long as the answer's {of}, {length}", len(values))
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


def _is_own(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) > 0
        and all(
            _is_list(one)
            and len(one) == 3
            and _is_int(one[0])
            and isinstance(one[1], str)
            and _is_number(one[2], none=True)
            for one in value
        )
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
