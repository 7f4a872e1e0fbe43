"""Runs of tokens that a term takes as one, because a scorer with another tokenizer reads them in other pieces.

A term whose alignment is span, gold or alm looks at the answer first: what a span's tokens are told depends on all of
them. With x = log q~ - log p summed over a span of the student's tokens,

    span   every token is pulled by h(e^x), the advantage of the whole: the chain rule's sums (`methods` 1.7)
    alm    every token is pulled by a / tau (h(b / a) - h((1 - b) / (1 - a))), the slope of D_f((a, 1-a) || (b, 1-b))
           by log p, with a = p(span)^(1 / tau) and b = q~(span)^(1 / tau)
    gold   tokens before the last are pulled by what the merged distribution gives (`kernels/merged.py`)

An importance weight stays that of each token: inside a span it is an approximation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.alignments import ALM, Gold, Span, Strict
from opd.config.objective import DivergenceTerm, Term
from opd.config.slots import Credit, Full, NoImportance, Sampled
from opd.config.targets import Routed, Single
from opd.errors import ConfigError
from opd.objectives.kernels.rows import SpanRows
from opd.objectives.shapes import maths
from opd.objectives.transfer import onto
from opd.types import Joined, Rollout, Spans

RolloutSpans = Mapping[str, Mapping[str, Spans]]  # scorer to rollout id to how its tokens fit the student's


def joined(term: Term) -> Joined:
    """How the term joins tokens with those of scorers that have another tokenizer."""
    return term.alignment.kind if isinstance(term, DivergenceTerm) else "strict"


def takes_spans(term: Term) -> bool:
    """Whether tokens of the term depend on others, by the runs that a scorer's tokenizer makes."""
    return isinstance(term, DivergenceTerm) and not isinstance(term.alignment, Strict)


def check_alignment(term: DivergenceTerm) -> None:
    """ConfigError for slots that say nothing about spans. The config's checks say so earlier and better."""
    kind, credit, tokens = term.alignment.kind, term.credit, term.tokens
    if isinstance(term.alignment, Strict):
        return
    if isinstance(term.alignment, Gold) and not isinstance(term.support, Full):
        wrong = f"support {term.support.kind}: it compares distributions at the last token of a span. Take support full"
    elif not isinstance(term.alignment, Gold) and not isinstance(term.support, Sampled):
        wrong = f"support {term.support.kind}: it compares what was written. Take support sampled"
    elif not isinstance(term.alignment, Span) and not isinstance(term.target, Single | Routed):
        wrong = f"target {term.target.kind}, which is known up to a factor. Take target single or routed"
    elif credit != Credit():
        wrong = "credit: the tokens of a span answer for it alone, and its mean is unknown. Leave credit out"
    elif tokens.where is not None or tokens.select is not None or tokens.importance_of_prefix:
        wrong = "tokens chosen or weighted one by one. Leave tokens.where, select and importance_of_prefix out"
    elif isinstance(term.alignment, ALM) and term.importance != NoImportance():
        wrong = f"importance {term.importance.kind}: it is a loss on the text as it is. Take importance none"
    elif isinstance(term.alignment, ALM) and term.advantage_under != "student":
        wrong = f"advantage_under {term.advantage_under}, and no advantage. Take student"
    else:
        return
    raise ConfigError(f"objective term {term.name!r} has alignment {kind} and {wrong}.")


def spans_of(term: Term, rollout: Rollout, used: frozenset[str], spans: RolloutSpans) -> NDArray[np.int64] | None:
    """int64 [T]: the span of each token of an answer, -1 where there is none; None for terms that take none.

    used  the scorers of the term's target on this answer. Where all have the student's tokenizer every token is a span.
    ConfigError when two of them cut the answer differently: no span is both.
    """
    if not takes_spans(term):
        return None
    foreign = sorted(used & spans.keys())
    if not foreign:
        return np.arange(len(rollout.mask), dtype=np.int64)
    first, *others = (spans[name][rollout.id].span_T for name in foreign)
    for name, span_T in zip(foreign[1:], others, strict=True):
        if not np.array_equal(first, span_T):
            raise ConfigError(
                f"objective term {term.name!r} has {foreign[0]} and {name} in its target, whose tokenizers cut "
                f"{rollout.id} into {first.max() + 1} and {span_T.max() + 1} spans that differ: a product over spans "
                "needs one cut. Take scorers with one tokenizer, or a term for each."
            )
    return first


def unmapped(term: Term, rollout: Rollout, used: frozenset[str], spans: RolloutSpans) -> NDArray[np.bool_] | None:
    """bool [T]: tokens about which some scorer of the target says nothing that fits; None where none is foreign."""
    foreign = [spans[name][rollout.id] for name in sorted(used & spans.keys())]
    if not foreign:
        return None
    missing = [s.span_T < 0 if takes_spans(term) else ~s.same_T for s in foreign]
    return np.logical_or.reduce(missing)


def whole_spans(kept_T: NDArray[np.bool_], span_T: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [T]: the kept tokens of spans that are kept from their first token to their last."""
    broken = np.zeros(int(span_T.max(initial=-1)) + 2, np.bool_)
    broken[span_T[~kept_T]] = True  # -1 is the last one
    broken[-1] = True
    return kept_T & ~broken[span_T]


def span_rows(trained_T: NDArray[np.bool_], pieces: Sequence[NDArray[np.int64]]) -> SpanRows:
    """The trained spans of answers laid end to end, numbered through; `pieces`: the spans of each answer."""
    start, shifted = 0, []
    for span_T in pieces:
        shifted.append(np.where(span_T < 0, -1, span_T + start))
        start += int(span_T.max(initial=-1)) + 1
    flat_T = np.where(trained_T, np.concatenate(shifted), -1) if shifted else np.zeros(0, np.int64)
    there = flat_T >= 0
    numbered_T = np.full(len(flat_T), -1, np.int64)
    numbered_T[there] = np.unique(flat_T[there], return_inverse=True)[1]
    last_T = there & (np.append(numbered_T[1:], -1) != numbered_T)
    return SpanRows(numbered_T, last_T)


class Told(NamedTuple):
    """extra_T: what each token of a span is pulled by; value_T: what is reported of it. Both [T], 0 off spans."""

    extra_T: Tensor
    value_T: Tensor | None


class Sums:
    """Sums over the spans of a micro-batch, in float64."""

    def __init__(self, rows: SpanRows, device: torch.device) -> None:
        self._there_T = rows.span_T >= 0
        self._count = int(rows.span_T.max(initial=-1)) + 1
        self.slot_T = onto(np.where(self._there_T, rows.span_T, self._count), device)  # the last is for all others
        self.last_T = onto(rows.last_T, device)

    def of(self, value_T: Tensor) -> Tensor:
        """float64 [S]; what is masked may be anything."""
        kept_T = torch.where(self.slot_T < self._count, value_T.double(), 0.0)
        return kept_T.new_zeros(self._count + 1).index_add_(0, self.slot_T, kept_T)[:-1]

    def spread(self, value_S: Tensor) -> Tensor:
        """float64 [T]: at every token the value of its span, 0 where it has none."""
        return torch.cat([value_S, value_S.new_zeros(1)])[self.slot_T]


def told(
    term: DivergenceTerm, rows: SpanRows, *, base_T: Tensor, target_T: Tensor, right_T: Tensor | None = None
) -> Told:
    """What alignment span or alm makes of a look: float [T] each, in the dtype of `base_T`.

    base_T    log p of drawn tokens, as the term's advantage takes it.
    target_T  log q~ of them, or shares that sum to that of the span.
    right_T   the verdict, for shapes that depend on it.
    """
    sums = Sums(rows, base_T.device)
    logp_S, logq_S = sums.of(base_T), sums.of(target_T)
    right_S = None if right_T is None else sums.of(right_T.double()) > 0
    shape = maths(term.shape, right_S)
    count_S = sums.of(torch.ones_like(base_T))
    if not isinstance(term.alignment, ALM):
        h_S = shape.h(logp_S, logq_S)
        return Told(sums.spread(h_S).to(base_T.dtype), sums.spread(-h_S / count_S).to(base_T.dtype))
    sure = torch.finfo(base_T.dtype).eps  # a probability closer to 1 than its own rounding says nothing about the rest
    log_a, log_b = ((x / term.alignment.tau).clamp(max=-sure / term.alignment.tau) for x in (logp_S, logq_S))
    rest_a, rest_b = (torch.log(-torch.expm1(x)) for x in (log_a, log_b))
    slope_S = log_a.exp() / term.alignment.tau * (shape.h(log_a, log_b) - shape.h(rest_a, rest_b))
    value_S = shape.f_mass(log_a, log_b) + shape.f_mass(rest_a, rest_b)
    value_T = torch.where(sums.last_T, sums.spread(value_S), 0.0)
    return Told(sums.spread(slope_S).to(base_T.dtype), value_T.to(base_T.dtype))


def before_last(rows: SpanRows, pull_T: Tensor) -> Tensor:
    """[T]: at every token of a span before its last the value at its last; 0 elsewhere."""
    sums = Sums(rows, pull_T.device)
    return torch.where(sums.last_T, 0.0, sums.spread(sums.of(torch.where(sums.last_T, pull_T, 0.0)))).to(pull_T.dtype)
