"""Log-linear targets on a block: log q~ = sum_k c_k log m_k, over the vocabulary or at drawn tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from opd.objectives.kernels.foreign import ForeignReading
from opd.objectives.kernels.reading import Reading, log_softmax
from opd.objectives.kernels.subset import Subset
from opd.objectives.kernels.supports import Partial
from opd.objectives.transfer import suspects


class Target:
    """log q~ on some rows of a block, shared by all terms with the same coefficients."""

    def __init__(
        self,
        rows: Subset,
        readings: Mapping[str, Reading],
        coefficients: Mapping[str, Tensor],
        read: Mapping[str, Subset],
        *,
        unit: bool,
        token_M: Tensor,
    ) -> None:
        """coefficients: scorer to c_k [M] on these rows; read: where it is not 0. unit: one of them is 1 at each row,
        and the others are 0."""
        self.rows = rows
        self._token_M = token_M
        self._unit = unit
        self._parts = [(readings[name], coefficients[name], where) for name, where in read.items() if len(where)]

    @property
    def single(self) -> Reading | None:
        """The scorer whose own distribution this is at all rows."""
        return self._parts[0][0] if self._unit and len(self._parts) == 1 else None

    @property
    def foreign(self) -> bool:
        """Whether any of its scorers has another tokenizer than the student."""
        return any(reading.foreign for reading, _, _ in self._parts)

    def partial(self, kept: Subset, k: int | None = None) -> Partial:
        """What of the student's vocabulary a foreign target says at rows `kept`, with its own k most likely tokens."""
        top_KS = None if k is None else kept.among(self.rows, self._mixed(lambda reading: reading.top(k)))
        if isinstance(self.single, ForeignReading):
            shared_KV = self.single.vocabulary.shared_V[None]
        else:
            shared_KV = kept.among(self.rows, self._mixed(lambda reading: reading.shared_RV))
        return Partial(shared_KV, kept.among(self.rows, self._mixed(lambda reading: reading.outside_R)), top_KS)

    @cached_property
    def logq_MV(self) -> Tensor:
        """[M, V], normalised; of a foreign scorer over its own vocabulary, and -inf where it lacks a token. A single
        scorer costs no copy."""
        mixed_MV = self._mixed(lambda reading: reading.logp_RV)
        return mixed_MV if self._unit else log_softmax(mixed_MV)

    def gap(self, student: Reading, kept: Subset) -> Tensor:
        """[K, V], fresh: log q~ - log p at rows `kept`, of which these have evidence.

        From logits where one scorer's distribution is the target, and both normalisers at once.
        """
        if not self._unit:
            return kept.among(self.rows, self.logq_MV) - kept.of(student.logp_RV)
        top_K, log_top_K = (kept.among(self.rows, x) for x in (self._tops_M, self._log_tops_M))
        apart_K = (top_K - kept.of(student.top_R)).sub_(log_top_K - kept.of(student.log_top_R))
        return (kept.among(self.rows, self._logits_MV) - kept.of(student.logits_RV)).sub_(apart_K[:, None])

    @cached_property
    def _logits_MV(self) -> Tensor:
        return self._mixed(lambda reading: reading.logits_RV)

    @cached_property
    def _tops_M(self) -> Tensor:
        return self._mixed(lambda reading: reading.top_R)

    @cached_property
    def _log_tops_M(self) -> Tensor:
        return self._mixed(lambda reading: reading.log_top_R)

    @cached_property
    def q_MV(self) -> Tensor:
        """[M, V]: q~."""
        return self._mixed(lambda reading: reading.p_RV) if self._unit else self.logq_MV.exp()

    def drawn(self, *, normalised: bool) -> Tensor:
        """[M]: log q~ of the drawn tokens; not normalised it needs no vocabulary."""
        if normalised and not self._unit:
            return self.logq_MV.gather(1, self._token_M[:, None])[:, 0]
        return self._mixed(lambda reading: reading.drawn_R)

    def _mixed(self, read: Callable[[Reading], Tensor]) -> Tensor:
        found = [(self._rows_of(reading, where, read(reading)), c_M, where) for reading, c_M, where in self._parts]
        first = found[0][0]
        if self._unit and len(found) == 1:
            return first
        mixed = first.new_zeros(len(self.rows), *first.shape[1:])
        # One sum tells as much as comparing every entry where all is finite, and costs a tenth of it.
        finite = self._unit or not any(suspects(x, lambda x: ~x.sum().isfinite()) for x, _, _ in found)
        none = None if finite else torch.zeros_like(mixed, dtype=torch.bool)
        for logm, c_M, where in found:
            c_K = where.of(c_M).to(mixed.dtype).reshape(-1, *[1] * (logm.dim() - 1))
            if self._unit:
                where.write_to(mixed, 0, logm)
            elif where.index_K is None:
                mixed.addcmul_(logm, c_K)
            else:
                mixed.index_add_(0, where.index_K, logm * c_K)
            if none is not None:
                none[where.positions(0, logm.device)] |= (logm == -math.inf) & (c_K > 0)
        # Where a scorer that counts for it gives no mass, the target gives none, whatever those against it say.
        return mixed if none is None else mixed.masked_fill_(none, -math.inf)

    def _rows_of(self, reading: Reading, where: Subset, rows_R: Tensor) -> Tensor:
        wanted = self.rows if where.index_K is None else _part(self.rows, where)
        return wanted.among(reading.rows, rows_R)


def _part(rows: Subset, where: Subset) -> Subset:
    """The rows of the block that `where` picks among `rows`."""
    assert where.index_K is not None
    return Subset(rows.size, where.index_K if rows.index_K is None else rows.index_K.index_select(0, where.index_K))
