"""Graded records as the columns a page carries: 50 bytes per token with the alternatives of two readers.

Numbers are digits of fixed width in base 89, written with the printable characters that need no escape in JSON or HTML.
The exact numbers stay in the record's own JSON file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from opd.journal.graded import GradedAnswer, GradedRecord, members, penalty, writer_of
from opd.reports.page.token_extent import Extent, carried, keys
from opd.reports.printable import printable

DIGITS = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"&<>\\')


class Number(NamedTuple):
    """How a column is written: value = low + step * code; the highest code is a missing number. All in nats."""

    width: int
    step: float
    low: float

    def pack(self, values: Iterable[float | None]) -> str:
        """Values beyond the range are its ends."""
        missing = len(DIGITS) ** self.width - 1
        return "".join(
            digits(missing if v is None else min(max(round((v - self.low) / self.step), 0), missing - 1), self.width)
            for v in values
        )


LOGPROB = Number(3, -0.001, 0.0)
PENALTY = Number(3, 0.001, -352.0)
KL = Number(3, 0.0002, 0.0)
ENTROPY = Number(2, 0.002, 0.0)
ALTERNATIVE = Number(2, -0.002, 0.0)
LEAST_BYTES = (2 + 1 + LOGPROB.width + ENTROPY.width + PENALTY.width + 1, 2 + ALTERNATIVE.width)  # token, alternative


def digits(code: int, width: int) -> str:
    """`code` in base 89, the most significant digit first."""
    written = ""
    for _ in range(width):
        code, digit = divmod(code, len(DIGITS))
        written = DIGITS[digit] + written
    return written


def columns(records: Sequence[GradedRecord], extent: Extent) -> dict[str, Any]:
    """What tokens.js reads. All text in it is printable already; it is still to be shown as text."""
    table: dict[tuple[int, str], int] = {}
    packed = [_record(records[step], table, extent) for step in extent.kept_steps(records)]
    width = 2 if len(table) < len(DIGITS) ** 2 else 3
    for record in packed:
        for answer in record["answers"]:
            answer["tokens"] = "".join(digits(index, width) for index in answer["tokens"])
            answer["top"] = ["".join(_row(row, width, ALTERNATIVE) for row in rows) for rows in answer["top"]]
            for key, kind in (("own", LOGPROB), ("own_top", ALTERNATIVE)):
                if key in answer:
                    answer[key] = [
                        None if rows is None else "".join(_row(row, width, kind) for row in rows)
                        for rows in answer[key]
                    ]
    return {
        "digits": DIGITS,
        "numbers": {
            "logprob": LOGPROB,
            "penalty": PENALTY,
            "kl": KL,
            "entropy": ENTROPY,
            "alternative": ALTERNATIVE,
        },
        "width": width,
        "ids": [token for token, _ in table],
        "texts": [shown for _, shown in table],
        "records": packed,
    }


def _record(record: GradedRecord, table: dict[tuple[int, str], int], extent: Extent) -> dict[str, Any]:
    readers = list(record["readers"])
    same = keys(record)
    return {
        "title": printable(record["title"]),
        "step": record["step"],
        "student": None if record["student"] is None else readers.index(record["student"]),
        "own": writer_of(record) is not None,
        "teachers": [readers.index(name) for name in record["teachers"]],
        "readers": [
            {
                "name": printable(name),
                **{key: printable(info[key]) for key in ("model", "fingerprint")},
                "crossed": info.get("crossed"),
            }
            for name, info in record["readers"].items()
        ],
        "answers": [
            {"key": "/".join(map(printable, same[i])), **_answer(record, record["answers"][i], table, extent)}
            for i in extent.kept_answers(record)
        ],
    }


def _answer(
    record: GradedRecord, answer: GradedAnswer, table: dict[tuple[int, str], int], extent: Extent
) -> dict[str, Any]:
    readers, total = list(record["readers"]), len(answer["ids"])
    end = extent.kept_tokens(answer)

    def index(token: int, shown: str) -> int:
        return table.setdefault((token, printable(shown, lines=True)), len(table))

    kl = answer.get("reverse_kl", {})
    return {
        "id": printable(answer["id"]),
        "prompt_id": printable(answer["prompt_id"]),
        "domain": printable(answer["domain"]),
        "turn": answer["turn"],
        "prompt": _shortened(printable(answer["prompt"], lines=True), extent.prompt_chars),
        "finish_reason": answer["finish_reason"],
        "score": answer["score"],
        "length": total,
        "tokens": [index(t, p) for t, p in zip(answer["ids"][:end], answer["pieces"][:end], strict=True)],
        "mask": "".join(map(str, answer["mask"][:end])),
        # one string per reader, in the order of readers; null where there is nothing
        "logprobs": [LOGPROB.pack(answer["logprobs"][name][:end]) for name in readers],
        "entropy": [ENTROPY.pack(answer["entropy"][name][:end]) for name in readers],
        "kl": [KL.pack(kl[name][:end]) if name in kl else None for name in readers],
        "penalty": [
            PENALTY.pack(penalty(answer, name, writer_of(record))[:end]) if name in record["teachers"] else None
            for name in readers
        ],
        "top": [
            [
                [(index(token, record["texts"][str(token)]), logprob) for token, logprob in carried(row, extent.top)]
                for row in answer["top"][name][:end]
            ]
            for name in readers
        ],
        **_crossed(record, answer, index, end, extent),
    }


def _crossed(
    record: GradedRecord, answer: GradedAnswer, index: Callable[[int, str], int], end: int, extent: Extent
) -> dict[str, Any]:
    """What readers with another tokenizer add, null for the others: a letter for each token (b begins a span, i is
    inside of one, u is in none); their own tokens of each span; their alternatives where it begins."""
    made: dict[str, list[Any]] = {"spans": [], "own": [], "own_top": []}
    for name, info in record["readers"].items():
        if "crossed" not in info:
            for column in made.values():
                column.append(None)
            continue
        spans = [tokens for tokens in members(answer, name) if tokens[0] < end]
        letters = ["u"] * len(answer["ids"])
        for first, *later in spans:
            letters[first] = "b"
            for token in later:
                letters[token] = "i"
        texts = record.get("own_texts", {})[name]
        own, own_top = (answer.get(key, {})[name][: len(spans)] for key in ("own", "own_top"))
        made["spans"].append("".join(letters[:end]))
        made["own"].append([[(index(token, piece), q) for token, piece, q in row] for row in own])
        made["own_top"].append(
            [[(index(token, texts[str(token)]), q) for token, q in carried(row, extent.top)] for row in own_top]
        )
    return made if any(column is not None for column in made["spans"]) else {}


def _row(row: Sequence[tuple[int, float | None]], width: int, kind: Number) -> str:
    shown = row[: len(DIGITS) - 1]
    return digits(len(shown), 1) + "".join(digits(index, width) + kind.pack([value]) for index, value in shown)


def _shortened(shown: str, limit: int | None) -> str:
    if limit is None or len(shown) <= limit:
        return shown
    half = limit // 2
    return f"{shown[:half]}\n[... {len(shown) - 2 * half} characters left out ...]\n{shown[-half:]}"
