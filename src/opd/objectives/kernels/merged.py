"""Terms with merged distributions (alignment gold): a span is compared at its last token.

With t the span's last token, and products over the span's tokens before it,

    P(v) = [prod p(y)] p_t(v)          Q(u) = [prod q(own y)] q_t(u)

of the student's tokens v and the scorer's u. Each factor is read where its token was predicted: a factor read one token
late is another model's opinion. Both sum to less than 1 where there are tokens before. The loss of a span is

    w [D_f(P || Q) on entries that match] + (1 - w) sum_i |P_i - Q_i| on others, either side sorted downwards

with nothing where one side has fewer; D_f is that of masses, f(r) + tilt (r - 1), whose field is h again. With
`sort: all` it is the second sum on everything.

In a span of one token on either side the shared vocabulary matches, and the others are the vocabulary that is not
shared. In longer spans the tokens before the last spell different beginnings, so that equal vocabulary is unequal text
(behind "a" a "b" is "ab", behind nothing it is "b"): only what was written is the same on both sides, and everything
else is the others. With `match: token` the shared vocabulary matches there, too, as it was published; where spans are
often long, that teaches the student to leave beginnings out.

With g_v = dloss/dP_v and G = sum_v P_v g_v,

    at the last token      dloss/dz_v = P_v g_v - p_v G
    at a token y before    dloss/dz_v = G (1[v = y] - p_v),  a pull of -G on the drawn token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.alignments import Gold
from opd.objectives.kernels.block import Block
from opd.objectives.kernels.columns import Columns
from opd.objectives.kernels.foreign import ForeignReading
from opd.objectives.kernels.reading import Reading
from opd.objectives.kernels.rows import SpanRows, TermRows
from opd.objectives.kernels.subset import Subset
from opd.objectives.shapes import ShapeMaths
from opd.objectives.transfer import onto


@dataclass(frozen=True)
class MergedField:
    """At the last tokens of K spans: -P_v g_v, the pull -G, and the loss."""

    h_mass_KV: Tensor
    pull_K: Tensor
    value_K: Tensor


def merged_field(
    alignment: Gold, shape: ShapeMaths, logp_KV: Tensor, before_K: Tensor, reading: Reading, rows: Subset
) -> MergedField:
    """What the spans that end at `rows` of a reading do.

    logp_KV   the student's distribution at the last token.
    before_K  log-probability of the span's tokens before it.
    """
    foreign = reading if isinstance(reading, ForeignReading) else None
    logP_KV = logp_KV + before_K[:, None]
    logQ_KV, q_KU = rows.among(reading.rows, reading.logp_RV), rows.among(reading.rows, reading.p_RV)
    if foreign is not None:
        q_KU = rows.among(reading.rows, foreign.own.p_RV)
        if foreign.before_R is not None:
            theirs_K = rows.among(reading.rows, foreign.before_R).to(logp_KV.dtype)
            logQ_KV, q_KU = logQ_KV + theirs_K[:, None], q_KU * theirs_K.exp()[:, None]
    P_KV = logP_KV.exp()
    if alignment.sort == "all":
        value_K, slope_KV = sorted_distance(P_KV, q_KU)
        h_mass_KV = slope_KV.mul_(-P_KV)
        return MergedField(h_mass_KV, h_mass_KV.sum(-1), value_K)
    h_mass_KV = shape.h_mass(logP_KV, logQ_KV)
    f_mass_KV = shape.f_mass(logP_KV, logQ_KV) + shape.tilt * (logQ_KV.exp() - P_KV)
    if foreign is None:  # one tokenizer: all is shared
        share = 1.0 if alignment.matched_weight is None else alignment.matched_weight
        h_mass_KV = h_mass_KV * share
        return MergedField(h_mass_KV, h_mass_KV.sum(-1), share * f_mass_KV.sum(-1))
    vocabulary = foreign.vocabulary
    shared_V, (rest_V, rest_U) = vocabulary.shared_V, vocabulary.rest
    share = vocabulary.matched_share if alignment.matched_weight is None else alignment.matched_weight
    rest_KR = P_KV.index_select(1, rest_V)
    far_K, slope_KR = sorted_distance(rest_KR, q_KU.index_select(1, rest_U))
    h_mass_KV = h_mass_KV.masked_fill_(~shared_V, 0.0).mul_(share)
    h_mass_KV.index_copy_(1, rest_V, slope_KR.mul_(rest_KR).mul_(share - 1.0))
    value_K = share * f_mass_KV.masked_fill_(~shared_V, 0.0).sum(-1) + (1.0 - share) * far_K
    if alignment.match == "text":
        longer_L = (~rows.among(reading.rows, foreign.same_R)).nonzero()[:, 0]
        y_L, u_L = (rows.among(reading.rows, x)[longer_L] for x in (foreign.token_R, foreign.own_token_R))
        h_mass_KV[longer_L], value_K[longer_L] = _one_text(shape, share, logP_KV[longer_L], q_KU[longer_L], y_L, u_L)
    return MergedField(h_mass_KV, h_mass_KV.sum(-1), value_K)


def _one_text(
    shape: ShapeMaths, share: Tensor | float, logP_LV: Tensor, q_LU: Tensor, y_L: Tensor, u_L: Tensor
) -> tuple[Tensor, Tensor]:
    """-P_v g_v and the loss of spans in which the last tokens y and u alone are the same text."""
    at_y, at_u, P_LV = y_L[:, None], u_L[:, None], logP_LV.exp()
    logp_L1, logq_L1 = logP_LV.gather(1, at_y), q_LU.gather(1, at_u).log()
    near_L1 = shape.f_mass(logp_L1, logq_L1) + shape.tilt * (logq_L1.exp() - logp_L1.exp())
    far_L, slope_LV = sorted_distance(P_LV.scatter(1, at_y, 0.0), q_LU.scatter(1, at_u, 0.0))
    h_mass_LV = slope_LV.mul_(P_LV).mul_(share - 1.0)
    h_mass_LV.scatter_(1, at_y, (share * shape.h_mass(logp_L1, logq_L1)).to(h_mass_LV.dtype))
    return h_mass_LV, (share * near_L1[:, 0] + (1.0 - share) * far_L).to(P_LV.dtype)


def sorted_distance(p_KV: Tensor, q_KU: Tensor) -> tuple[Tensor, Tensor]:
    """[K]: sum_i |p_i - q_i|, both sorted downwards and filled up with 0 (ULD); and its slope by p, [K, V]."""
    sorted_p, places = p_KV.sort(dim=1, descending=True)
    missing = p_KV.shape[1] - q_KU.shape[1]
    sorted_q = q_KU.sort(dim=1, descending=True).values
    gap = sorted_p - torch.nn.functional.pad(sorted_q, (0, missing))  # a negative pad cuts off
    value_K = gap.abs().sum(-1) + sorted_q[:, p_KV.shape[1] :].sum(-1)
    return value_K, torch.zeros_like(p_KV).scatter_(1, places, gap.sign())


class SpansInBlock:
    """The spans of a term that end in a block. They may begin in an earlier one.

    last      where they end.
    start     the first token of any of them, counted from the batch's first; they lie in `start` to the block's end.
    """

    def __init__(self, rows: TermRows, block: Block) -> None:
        spans = rows.spans
        assert spans is not None, f"term {rows.term.name} merges spans, and its rows do not say which (spans)"
        self.last_B = block.known(spans.last_T) & block.known(rows.trained_T)
        self.last = block.subset(self.last_B)
        ending_K = block.known(spans.span_T)[self.last_B]
        stop = block.start + block.size
        self.start = _first_of(spans, int(ending_K[0])) if len(ending_K) else stop
        span_L = spans.span_T[self.start : stop]
        self._slot_L = np.minimum(np.searchsorted(ending_K, span_L), max(len(ending_K) - 1, 0))
        self._here_L = np.isin(span_L, ending_K)
        self._earlier_L = self._here_L & ~spans.last_T[self.start : stop]
        self._stop = stop

    def before(self, columns: Columns) -> Tensor:
        """[K]: the student's log-probability of each span's tokens before its last."""
        logp_L = columns.drawn(self.start, self._stop)
        device = logp_L.device
        sums_K = torch.zeros(len(self.last), dtype=torch.float64, device=device)
        earlier_M = Subset.known(self._earlier_L, device).of(logp_L).double()
        return sums_K.index_add_(0, onto(self._slot_L[self._earlier_L], device), earlier_M).to(logp_L.dtype)

    def each(self, value_M: Tensor, mine_B: NDArray[np.bool_]) -> tuple[Subset, Tensor]:
        """All tokens of those M spans whose last tokens `mine_B` are in the block, counted from `start`; and for each
        an equal share of its span's value."""
        mine_K = mine_B[self.last_B]
        here_L = self._here_L & mine_K[self._slot_L]
        place_L = (np.cumsum(mine_K) - 1)[self._slot_L[here_L]]
        counts_M = np.bincount(place_L, minlength=len(value_M)).astype(np.float64)
        share_M = value_M / onto(counts_M, value_M.device, value_M.dtype)
        return Subset.known(here_L, value_M.device), share_M[onto(place_L, value_M.device)]


def _first_of(spans: SpanRows, number: int) -> int:
    return int(np.argmax(spans.span_T == number))
