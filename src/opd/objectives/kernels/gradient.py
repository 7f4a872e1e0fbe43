"""The gradient of a block with respect to log-softmax inputs, gathered from all terms and written down once."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.objectives.kernels.subset import Subset
from opd.objectives.kernels.supports import TopKField


class BlockGradient:
    """Sums d loss / d z [B, V] of the terms on one block.

    Most of it is a multiple of p in each row (centring a field, and what a drawn token takes from all others), or sits
    on few entries: these parts are kept as numbers per row until the end, so that they cost no pass over [B, V].
    """

    def __init__(self, p_BV: Tensor, token_B: Tensor) -> None:
        self._p_BV = p_BV
        self._token_B = token_B
        self._dense_BV: Tensor | None = None
        self._along_p_B = p_BV.new_zeros(len(p_BV))
        self._drawn_B = p_BV.new_zeros(len(p_BV))
        self._points: list[tuple[Tensor, Tensor]] = []

    def field(self, rows: Subset, h_mass_KV: Tensor, mean_K: Tensor, weight_K: Tensor) -> None:
        """-w (p h - p E_p[h]) over the vocabulary. Takes `h_mass_KV` over."""
        self._along(rows, weight_K * mean_K)
        self._add(rows, h_mass_KV.mul_(-weight_K[:, None]))

    def top_k(self, rows: Subset, field: TopKField, weight_K: Tensor) -> None:
        """The same for a field on a few entries and its tail."""
        if field.mean_K is not None:
            self._along(rows, weight_K * field.mean_K)
        there_KS = -weight_K[:, None] * field.at_entries_KS
        if field.elsewhere_K is not None:
            # Written in place of the tail's field, not added to it: a large h_tail would cancel badly.
            dense_KV = rows.of(self._p_BV) * (-weight_K * field.elsewhere_K)[:, None]
            self._add(rows, dense_KV.scatter_(1, field.entries.ids, there_KS))
        else:
            start_K1 = rows.positions(0, there_KS.device)[:, None] * self._p_BV.shape[1]
            there_KS = there_KS.masked_fill_(~field.entries.counted, 0.0)
            self._points.append(((field.entries.ids + start_K1).flatten(), there_KS.flatten()))

    def drawn(self, rows: Subset, pull_K: Tensor) -> None:
        """-pull (1[v = y] - p_v): a policy gradient of the drawn token y."""
        self._along(rows, pull_K)
        rows.add_to(self._drawn_B, pull_K)

    def total(self) -> Tensor:
        """[B, V], once: p is used up."""
        if self._dense_BV is None:
            self._dense_BV = self._p_BV.mul_(self._along_p_B[:, None])
        else:
            self._dense_BV.addcmul_(self._p_BV, self._along_p_B[:, None])
        for index, value in self._points:
            self._dense_BV.view(-1).index_add_(0, index, value)
        return self._dense_BV.scatter_add_(1, self._token_B[:, None], -self._drawn_B[:, None])

    def _along(self, rows: Subset, amount_K: Tensor) -> None:
        rows.add_to(self._along_p_B, amount_K)

    def _add(self, rows: Subset, part_KV: Tensor) -> None:
        if rows.index_K is None:
            self._dense_BV = part_KV if self._dense_BV is None else self._dense_BV.add_(part_KV)
            return
        if self._dense_BV is None:
            self._dense_BV = torch.zeros_like(self._p_BV)
        rows.add_to(self._dense_BV, part_KV)
