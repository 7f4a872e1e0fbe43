"""Answers as one scorer reads them: in which tokens, and which of its numbers are about which of the student's tokens.

A scorer with the student's tokenizer reads the answer's own ids, and says one thing about each. One with another reads
the same text in its own tokens; `types.ScorerRows` says about which of the student's tokens it then has rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.objectives.head import head_logits
from opd.objectives.transfer import onto
from opd.text.agreement import Agreement
from opd.text.crossing import Crossing, CrossRead
from opd.text.formats import PromptFormat
from opd.types import Batch, Head, Joined, Prompt, Rollout, Spans, Want

_NUMBERS = 2**24  # logits that exist at the same time where nobody says how many tokens' may


@dataclass(frozen=True)
class Rows:
    """What a scorer has rows for in one answer, R of them.

    of_R      int64, ascending: the student's tokens that they are about.
    at_R      int64: the scorer's tokens at which its states, or what else it says about a position, are taken.
    span_R    int64: the span that each belongs to. Without spans a token is its own.
    trained_R int64: so many tokens that may be trained hang on each.
    """

    of_R: NDArray[np.int64]
    at_R: NDArray[np.int64]
    span_R: NDArray[np.int64]
    trained_R: NDArray[np.int64]


@dataclass(frozen=True)
class Joint:
    """What a scorer reads of a micro-batch, and its rows for it. U are all of its tokens for these answers, one answer
    after the other; S the spans of these answers.

    rollouts  those that it has rows for, with the `rows` of each.
    ids_U     int64: what it reads.
    index_R   int64: the batch's tokens that rows are about; None: all of them.
    at_R      int64: places in U, see `Rows`; None: all of them, one tokenizer.
    """

    rollouts: list[Rollout]
    rows: list[Rows]
    ids_U: NDArray[np.int64]
    index_R: NDArray[np.int64] | None
    at_R: NDArray[np.int64] | None
    _span_U: NDArray[np.int64]
    _span_R: NDArray[np.int64]
    _share_R: NDArray[np.float64]
    _spans: int

    def of(self, values_U: Tensor) -> Tensor:
        """The rows of what is known at every one of the scorer's tokens, [U, ...]."""
        return values_U if self.at_R is None else values_U.index_select(0, onto(self.at_R, values_U.device))

    def parts(self, values_R: NDArray[Any]) -> list[NDArray[Any]]:
        """What is known of all rows, by answer."""
        return np.split(values_R, np.cumsum([len(rows.of_R) for rows in self.rows])[:-1])

    @property
    def own_R(self) -> NDArray[np.int64]:
        """The scorer's token at each row."""
        return self.ids_U if self.at_R is None else self.ids_U[self.at_R]

    def drawn(self, logprobs_U: Tensor) -> Tensor:
        """float32 [R]: of the scorer's log-probabilities, a span's in equal shares for the rows about it. NaN where one
        of the span's is no number."""
        if self.at_R is None:
            return logprobs_U
        total_S = self._sums(logprobs_U, self.inside_U)
        drawn_R = total_S[onto(self._span_R, total_S.device)] * onto(self._share_R, total_S.device)
        return drawn_R.to(logprobs_U.dtype)

    def before(self, logprobs_U: Tensor) -> Tensor:
        """float32 [R]: of the log-probabilities of the scorer's tokens of the span before the one at the row."""
        total_S = self._sums(logprobs_U, self.earlier_U)
        return total_S[onto(self._span_R, total_S.device)].to(logprobs_U.dtype)

    @property
    def inside_U(self) -> NDArray[np.int64]:
        """Places of the scorer's tokens in the spans that rows are about."""
        return np.flatnonzero(np.isin(self._span_U, self._span_R))

    @property
    def earlier_U(self) -> NDArray[np.int64]:
        """Those of them that are not at a row."""
        assert self.at_R is not None
        return np.setdiff1d(self.inside_U, self.at_R, assume_unique=True)

    def _sums(self, logprobs_U: Tensor, of: NDArray[np.int64]) -> Tensor:
        """float64 [S]. In double, so that no order of adding shows."""
        device = logprobs_U.device
        total_S = torch.zeros(self._spans, dtype=torch.float64, device=device)
        return total_S.index_add_(0, onto(self._span_U[of], device), logprobs_U[onto(of, device)].double())


class AsRead:
    """The answers of one step as one scorer reads them; what is found out about one is found out once."""

    def __init__(self, fmt: PromptFormat, agreement: Agreement | Crossing, rollouts_N: Sequence[Rollout]) -> None:
        self._format, self._agreement = fmt, agreement
        self._rollouts = {rollout.id: rollout for rollout in rollouts_N}
        self._prompt_ids: dict[str, NDArray[np.int64]] = {}
        self._crossed: dict[str, CrossRead] = {}
        self._rows: dict[tuple[str, Joined], Rows] = {}

    def prompt_ids(self, prompt: Prompt) -> NDArray[np.int64]:
        """In the scorer's own format and context."""
        if prompt.id not in self._prompt_ids:
            self._prompt_ids[prompt.id] = self._format.prompt_ids(prompt.row)
        return self._prompt_ids[prompt.id]

    def ids(self, rollout: Rollout) -> NDArray[np.int64]:
        """int64 [U]: the answer in the scorer's tokens."""
        if isinstance(self._agreement, Agreement):
            return self._agreement.teacher_ids(rollout.response_ids)
        return self._read(rollout, self._agreement).ids

    def spans(self, name: str) -> dict[str, Mapping[str, Spans]]:
        """By the scorer's name, see `protocols.EvidenceHandle`; nothing of one with the student's tokenizer. An answer
        is looked at when it is asked for: its prompt may lack what the scorer's context needs."""
        if isinstance(self._agreement, Agreement):
            return {}
        agreement = self._agreement
        return {name: _Lazy(self._rollouts, lambda rollout: self._read(rollout, agreement).spans)}

    def rows(self, rollout: Rollout, joined: Joined) -> Rows:
        """What the scorer has rows for in this answer."""
        asked = rollout.id, joined
        if asked not in self._rows:
            self._rows[asked] = self._find_rows(rollout, joined)
        return self._rows[asked]

    def _find_rows(self, rollout: Rollout, joined: Joined) -> Rows:
        if isinstance(self._agreement, Agreement):
            each_T = np.arange(len(rollout.response_ids))
            return Rows(each_T, each_T, each_T, rollout.mask.astype(np.int64))
        return _rows(self._read(rollout, self._agreement).spans, joined, rollout.mask)

    def wanted(self, want: Want) -> list[Rollout]:
        """The answers of the step of which rows are wanted, and there are any."""
        return [r for key, r in self._rollouts.items() if key in want.rollouts and len(self.rows(r, want.joined).of_R)]

    def joint(self, batch: Batch, want: Want) -> Joint | None:
        """What is wanted of a micro-batch, in its order; None where there is nothing."""
        starts = np.cumsum([0, *(len(r.response_ids) for r in batch.rollouts)])
        known = [(n, r, self.rows(r, want.joined)) for n, r in enumerate(batch.rollouts) if r.id in want.rollouts]
        read = [(int(starts[n]), r, rows) for n, r, rows in known if len(rows.of_R)]
        if not read:
            return None
        ids = [self.ids(rollout) for _, rollout, _ in read]
        whole = sum(len(rows.of_R) for _, _, rows in read) == starts[-1]
        index_R = None if whole else np.concatenate([start + rows.of_R for start, _, rows in read])
        joint = [rollout for _, rollout, _ in read], [rows for _, _, rows in read], np.concatenate(ids), index_R
        if isinstance(self._agreement, Agreement):
            nothing = np.empty(0, np.int64)
            return Joint(*joint, None, nothing, nothing, nothing.astype(np.float64), 0)
        spans = [self._read(rollout, self._agreement).spans for _, rollout, _ in read]
        counts = [int(s.span_T.max()) + 1 for s in spans]
        first = np.cumsum([0, *counts])
        begin = np.cumsum([0, *(len(one) for one in ids)])
        share = [
            1.0 / (np.bincount(s.span_T[s.span_T >= 0])[rows.span_R])
            for s, (_, _, rows) in zip(spans, read, strict=True)
        ]
        return Joint(
            *joint,
            np.concatenate([u + rows.at_R for u, (_, _, rows) in zip(begin, read, strict=False)]),
            np.concatenate([np.where(s.span_U < 0, -1, n + s.span_U) for n, s in zip(first, spans, strict=False)]),
            np.concatenate([n + rows.span_R for n, (_, _, rows) in zip(first, read, strict=False)]),
            np.concatenate(share),
            int(first[-1]),
        )

    def _read(self, rollout: Rollout, crossing: Crossing) -> CrossRead:
        if rollout.id not in self._crossed:
            self._crossed[rollout.id] = crossing.read(rollout)
        return self._crossed[rollout.id]


class _Lazy(Mapping[str, Spans]):
    """Rollout id to its spans, each made when it is asked for."""

    def __init__(self, rollouts: Mapping[str, Rollout], make: Callable[[Rollout], Spans]) -> None:
        self._rollouts, self._make = rollouts, make

    def __getitem__(self, key: str) -> Spans:
        return self._make(self._rollouts[key])

    def __contains__(self, key: object) -> bool:
        return key in self._rollouts

    def __iter__(self) -> Iterator[str]:
        return iter(self._rollouts)

    def __len__(self) -> int:
        return len(self._rollouts)


def scored_tokens(agreement: Agreement | Crossing) -> int:
    """Over how many tokens a scorer's softmax is taken: those that the student knows, or with other tokens its own."""
    foreign = isinstance(agreement, Crossing)
    return agreement.teacher_fmt.tokenizer.vocab_size if foreign else agreement.vocab_size


def order(agreement: Agreement | Crossing) -> NDArray[np.int64] | None:
    """`Head.order_V` of a scorer's output layer over the student's vocabulary; None where the numbers are the same."""
    return agreement.order() if isinstance(agreement, Agreement) else agreement.teacher_of_V


def shared(agreement: Agreement | Crossing) -> NDArray[np.bool_] | None:
    """`ScorerRows.shared_V`."""
    return None if isinstance(agreement, Agreement) else agreement.teacher_of_V >= 0


def own_logprobs(
    hidden_UD: Tensor, ids_U: NDArray[np.int64], head: Head, temperature: float, chunk_tokens: int | None = None
) -> Tensor:
    """float32 [U]: log-probabilities of tokens of the head's own numbering, a chunk of logits at a time."""
    size = chunk_tokens or max(1, _NUMBERS // head.vocab_size)
    token_U = onto(ids_U, hidden_UD.device)
    pieces = []
    for hidden_CD, token_C in zip(hidden_UD.split(size), token_U.split(size), strict=True):
        logits_CV = head_logits(hidden_CD, head) / temperature
        pieces.append(logits_CV.gather(1, token_C[:, None])[:, 0] - logits_CV.logsumexp(-1))
    return torch.cat(pieces)


def spread(values: Tensor, places: NDArray[np.int64], size: int) -> Tensor:
    """[size]: values at their places, NaN elsewhere."""
    return values.new_full((size,), torch.nan).index_copy_(0, onto(places, values.device), values)


def _rows(spans: Spans, joined: Joined, mask_T: NDArray[np.bool_]) -> Rows:
    inside_T, inside_U = np.flatnonzero(spans.span_T >= 0), np.flatnonzero(spans.span_U >= 0)
    span_T, span_U = spans.span_T[inside_T], spans.span_U[inside_U]  # neither ever goes down
    last_U = inside_U[np.searchsorted(span_U, np.arange(len(np.unique(span_U))), side="right") - 1]
    if joined == "strict":
        of_R = np.flatnonzero(spans.same_T)
    elif joined == "gold":
        of_R = inside_T[np.searchsorted(span_T, np.arange(len(last_U)), side="right") - 1]
    else:
        of_R = inside_T
    span_R = spans.span_T[of_R]
    trained_R = mask_T[of_R].astype(np.int64)
    if joined == "gold":
        trained_R = np.bincount(span_T, weights=mask_T[inside_T], minlength=len(last_U)).astype(np.int64)[span_R]
    return Rows(of_R, last_U[span_R], span_R, trained_R)
