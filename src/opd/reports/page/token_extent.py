"""How much of some graded records fits on a page: what is left out when room is short, and how the page says so."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from opd.journal.graded import GradedAnswer, GradedRecord
from opd.reports.figures import counted

RARE = -6.907755  # log 0.001: alternatives below, the first excepted, are not carried
MOST_ALTERNATIVES = 20
SHORT_PROMPT = 2000  # characters of a prompt when room is short


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of some records a page carries; None: all of it.

    top           alternatives of each reader per token.
    prompt_chars  characters of a prompt; the middle of a longer one is left out.
    answers       answers of each record: the first one of every prompt, then the second ones.
    steps         records: the first, the last, and evenly between.
    tokens        tokens of each answer, from its start.
    """

    top: int | None = None
    prompt_chars: int | None = None
    answers: int | None = None
    steps: int | None = None
    tokens: int | None = None

    def kept_steps(self, records: Sequence[GradedRecord]) -> list[int]:
        """Indices of the records to keep, rising. A single one is the last."""
        n = len(records)
        if self.steps is None or self.steps >= n:
            return list(range(n))
        if self.steps == 1:
            return [n - 1]
        return [round(i * (n - 1) / (self.steps - 1)) for i in range(self.steps)]

    def kept_answers(self, record: GradedRecord) -> list[int]:
        """Indices of the answers to keep, rising."""
        order = sorted(range(len(record["answers"])), key=keys(record).__getitem__)  # the same ones of every record
        return sorted(order[: self.answers])

    def kept_tokens(self, answer: GradedAnswer) -> int:
        length = len(answer["ids"])
        return length if self.tokens is None else min(self.tokens, length)


def keys(record: GradedRecord) -> list[tuple[int, str, int]]:
    """What makes answers of two records the same one: (which of its prompt's answers, prompt id, turn)."""
    seen: Counter[tuple[str, int]] = Counter()
    found = []
    for answer in record["answers"]:
        place = (answer["prompt_id"], answer["turn"])
        found.append((seen[place], *place))
        seen[place] += 1
    return found


def carried(row: Sequence[tuple[int, float]], top: int | None) -> Sequence[tuple[int, float]]:
    """The alternatives of one token that a page carries: likely enough to be seen as a bar, and at least one."""
    kept = row[:top]
    return kept[: max(1, sum(logprob >= RARE for _, logprob in kept))]


class Room:
    """Finds the largest `Extent` of some records that fits.

    size          bytes of a page of that extent; not called for one that cannot fit.
    least_bytes   of one token; of one of its alternatives.
    """

    def __init__(self, records: Sequence[GradedRecord], size: Callable[[Extent], int], least_bytes: tuple[int, int]):
        self.records = records
        self._size = size
        self._token, self._alternative = least_bytes
        self._lengths = [
            [Counter(len(carried(row, None)) for row in _rows(answer)) for answer in record["answers"]]
            for record in records
        ]

    def largest(self, budget: int) -> Extent:
        """Leaves out alternatives first, then the middle of long prompts, answers, steps, tokens. May still be too
        large when one token of one answer is."""
        answers = [answer for record in self.records for answer in record["answers"]]
        most = max((len(record["answers"]) for record in self.records), default=0)
        longest = max((len(answer["ids"]) for answer in answers), default=0)
        prompt = max((len(answer["prompt"]) for answer in answers), default=0)
        top = min(most_alternatives(self.records), MOST_ALTERNATIVES)
        choices = [
            ("top", list(range(top + 1))),
            ("prompt_chars", [SHORT_PROMPT] if prompt > SHORT_PROMPT else []),
            ("answers", list(range(1, most + 1))),
            ("steps", list(range(1, len(self.records) + 1))),
            ("tokens", [*(2**i for i in range((longest - 1).bit_length())), longest] if longest else []),
        ]
        extent = Extent(top=top)
        for name, values in choices:
            if self._fits(extent, budget):
                break
            if values:
                tried = [replace(extent, **{name: value}) for value in values]
                fitting = bisect_right(tried, False, key=lambda one: not self._fits(one, budget))
                extent = tried[max(0, fitting - 1)]
        return extent

    def _fits(self, extent: Extent, budget: int) -> bool:
        return self._least(extent) <= budget and self._size(extent) <= budget

    def _least(self, extent: Extent) -> int:
        """Bytes of the tokens alone: packing all of a long run only to see that it is too large would take minutes."""
        total = 0
        for step in extent.kept_steps(self.records):
            record = self.records[step]
            for index in extent.kept_answers(record):
                total += self._token * extent.kept_tokens(record["answers"][index])
                if extent.tokens is None:
                    lengths = self._lengths[step][index]
                    top = MOST_ALTERNATIVES if extent.top is None else extent.top
                    total += self._alternative * sum(min(length, top) * n for length, n in lengths.items())
        return total


def most_alternatives(records: Sequence[GradedRecord]) -> int:
    """The most that any token of any answer has of one reader."""
    return max((len(row) for record in records for answer in record["answers"] for row in _rows(answer)), default=0)


def _rows(answer: GradedAnswer) -> Iterator[Sequence[tuple[int, float]]]:
    """The alternatives of every reader, at every token or span."""
    for of in (answer["top"], answer.get("own_top", {})):
        for rows in of.values():
            yield from rows


def left_out(records: Sequence[GradedRecord], extent: Extent) -> list[str]:
    """What a page of this extent lacks, as phrases; nothing when it has everything."""
    alternatives = most_alternatives(records)
    answers = max((len(record["answers"]) for record in records), default=0)
    steps = len(extent.kept_steps(records))
    phrases = []
    if extent.top is not None and extent.top < alternatives:
        phrases.append(f"{extent.top} of {alternatives} alternatives per token are kept")
    if extent.prompt_chars is not None:
        phrases.append(f"prompts are cut to {extent.prompt_chars} characters")
    if extent.answers is not None and extent.answers < answers:
        phrases.append(
            f"{extent.answers} of {counted(answers, 'answer')} {'is' if extent.answers == 1 else 'are'} kept"
        )
    if steps < len(records):
        phrases.append(_kept(steps, len(records), "step"))
    if extent.tokens is not None:
        phrases.append(f"answers are cut after {counted(extent.tokens, 'token')}")
    return phrases


def _kept(n: int, total: int, noun: str) -> str:
    return f"{n} of {counted(total, noun)} {'is' if n == 1 else 'are'} kept"
