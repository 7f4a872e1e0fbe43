"""Two tokenizers over one alphabet of bytes, small enough that every answer is written down.

The student's answers are two words of a code. A word's tokens and those that the teacher reads for it meet at its ends
alone: a word is a span, of 1 to 3 tokens on either side. Words that the teacher reads as something else are unmapped.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.types import Batch, Head, Rollout, ScorerRows, Spans
from tests.objectives.answers import answer, batch

A, B, C, D, E, F = range(6)
STUDENT = ["a", "bc", "d", "efg", "h", "i"]
CUTS: dict[tuple[int, ...], tuple[int, ...]] = {  # word to the lengths of the teacher's tokens; none: unmapped
    (A,): (1,),
    (D,): (1, 1, 1),
    (E,): (1,),
    (F,): (),
    (B, A): (1, 2),
    (B, B): (1, 2, 1),
    (B, C): (3,),
    (B, D): (1, 2, 2),
    (B, E): (),
    (B, F): (3,),
    (C, A): (2,),
    (C, C): (),
    (C, D): (2, 2),
    (C, E): (2,),
    (C, F): (),
    (C, B, A): (2, 2),
    (C, B, B): (2, 2, 1),
    (C, B, C): (4,),
    (C, B, D): (2, 2, 2),
    (C, B, E): (),
    (C, B, F): (2, 2),
}
WORDS = list(CUTS)
V = len(STUDENT)


def _bytes(word: tuple[int, ...]) -> str:
    return "".join(STUDENT[v] for v in word)


def _read(word: tuple[int, ...]) -> list[str]:
    text, ends = _bytes(word), [0, *itertools.accumulate(CUTS[word])]
    return [text[i:j] for i, j in itertools.pairwise(ends)]


TEACHER = sorted({piece for word in WORDS for piece in _read(word)} | {"bc", "zz", "y"})
U = len(TEACHER)
ORDER_V = torch.tensor([TEACHER.index(s) if s in TEACHER else -1 for s in STUDENT])
ANSWERS = list(itertools.product(WORDS, repeat=2))


class World:
    """Answers of two words each, with what a teacher of its own says about them.

    states  one row for every token: a table of states in which both words of every answer are, or random numbers.
    """

    def __init__(self, seed: int = 0, *, words: list | None = None, table: bool = False) -> None:
        self.words = ANSWERS if words is None else words
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.answers: list[Rollout] = []
        for n, pair in enumerate(self.words):
            ids = np.array([v for word in pair for v in word], dtype=np.int64)
            self.answers.append(answer(f"p{n}/0", len(ids), response_ids=ids))
        self.batch: Batch = batch(self.answers)
        tokens = len(self.batch.token_T)
        if table:
            prefixes = [tuple(r.response_ids[:t]) for r in self.answers for t in range(len(r.response_ids))]
            number = {prefix: n for n, prefix in enumerate(sorted(set(prefixes)))}
            self.hidden_TD = torch.eye(len(number)).double()[[number[prefix] for prefix in prefixes]]
        else:
            self.hidden_TD = self.numbers(tokens, 5)
        self.weight_VD = self.numbers(V, self.hidden_TD.shape[1])
        self.spans = {"teacher": {r.id: self._spans(pair) for r, pair in zip(self.answers, self.words, strict=True)}}

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def logq(self, before: tuple[str, ...]) -> Tensor:
        """float64 [U]: the teacher's distribution after some of its own tokens."""
        made = torch.Generator().manual_seed(random.Random(f"{self.seed} {before}").randrange(2**31))
        return (2 * torch.randn(U, generator=made, dtype=torch.float64)).log_softmax(-1)

    def said(self) -> list[list[tuple[int, list[int], list[str], tuple[str, ...]]]]:
        """For each answer its mapped spans: (first token, places of tokens, the teacher's tokens, those before)."""
        found, start = [], 0
        for pair in self.words:
            spans, before = [], ()
            for word in pair:
                places = list(range(start, start + len(word)))
                if CUTS[word]:
                    spans.append((start, places, _read(word), before))
                before += tuple(_read(word))
                start += len(word)
            found.append(spans)
        return found

    def _spans(self, pair: tuple) -> Spans:
        span_T, span_U, same_T, number = [], [], [], 0
        for word in pair:
            mapped = bool(CUTS[word])
            span_T += [number if mapped else -1] * len(word)
            span_U += [number] * len(CUTS[word])
            same_T += [mapped and [_bytes(word)] == _read(word) and len(word) == 1] * len(word)
            number += mapped
        return Spans(span_T=np.array(span_T), span_U=np.array(span_U, np.int64), same_T=np.array(same_T))

    def rows(self, way: str, *, name: str = "teacher", head: Head | None = None) -> ScorerRows:
        """What the teacher's rows are for a way of joining, with whole distributions where these are read."""
        index, own, before, hidden, shares = [], [], [], [], []
        for spans in self.said():
            for _, places, read, earlier in spans:
                logq = [self.logq((*earlier, *read[:n])) for n in range(len(read))]
                logprobs = [float(q[TEACHER.index(piece)]) for q, piece in zip(logq, read, strict=True)]
                if way in ("span", "alm"):
                    index += places
                    shares += [sum(logprobs) / len(places)] * len(places)
                    continue
                if way == "strict" and (len(places) > 1 or len(read) > 1):
                    continue
                index.append(places[-1])
                own.append(TEACHER.index(read[-1]))
                before.append(sum(logprobs[:-1]))
                hidden.append(logq[-1])
        shared_V = ORDER_V >= 0
        facts: dict[str, Any] = {"index_T": torch.tensor(index), "shared_V": shared_V}
        valid_T = torch.ones(len(index)).bool()
        if way in ("span", "alm"):
            return ScorerRows(name, valid_T, 1.0, logprobs_T=torch.tensor(shares, dtype=torch.float64), **facts)
        return ScorerRows(
            name, valid_T, 1.0, hidden_TD=torch.stack(hidden), own_token_T=torch.tensor(own),
            head=head or Head(torch.eye(U).double(), U, order_V=ORDER_V),
            before_T=torch.tensor(before, dtype=torch.float64) if way == "gold" else None, **facts,
        )  # fmt: skip
