"""Some of the rows of a block, in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.objectives.transfer import onto


@dataclass(frozen=True)
class Subset:
    """Ascending rows of a block of `size` rows. index_K: int64; None: all of them."""

    size: int
    index_K: Tensor | None = None

    @classmethod
    def where(cls, mask_B: Tensor) -> Subset:
        """The rows where a bool [B] is true; waits for the device that it is on."""
        index_K = mask_B.nonzero()[:, 0]
        return cls(len(mask_B), None if len(index_K) == len(mask_B) else index_K)

    @classmethod
    def known(cls, mask_B: NDArray[np.bool_], device: torch.device) -> Subset:
        """The same of a mask on the host, for rows on `device`."""
        index_K = np.flatnonzero(mask_B)
        return cls(len(mask_B), None if len(index_K) == len(mask_B) else onto(index_K, device))

    def __len__(self) -> int:
        return self.size if self.index_K is None else len(self.index_K)

    def of(self, rows_B: Tensor) -> Tensor:
        """These rows of a tensor that has all of the block's."""
        return rows_B if self.index_K is None else rows_B.index_select(0, self.index_K)

    def among(self, other: Subset, rows_M: Tensor) -> Tensor:
        """These rows of a tensor that has those of `other`, of which this is a part."""
        if len(self) == len(other):
            return rows_M
        assert self.index_K is not None
        if other.index_K is None:
            return rows_M.index_select(0, self.index_K)
        return rows_M.index_select(0, torch.searchsorted(other.index_K, self.index_K))

    def add_to(self, totals_B: Tensor, values_K: Tensor) -> None:
        """Adds to these rows of a tensor that has all of the block's."""
        if self.index_K is None:
            totals_B += values_K
        else:
            totals_B.index_add_(0, self.index_K, values_K)

    def write_to(self, into_T: Tensor, start: int, values_K: Tensor) -> None:
        """Writes these rows into a tensor over the batch, in its dtype; the block begins at its row `start`."""
        block_B = into_T[start : start + self.size]
        if self.index_K is None:
            block_B.copy_(values_K)
        else:
            block_B.index_copy_(0, self.index_K, values_K.to(into_T.dtype))

    def positions(self, start: int, device: torch.device) -> Tensor:
        """int64 [K]: these rows counted from the first token of the batch, where the block begins at `start`."""
        if self.index_K is None:
            return torch.arange(start, start + self.size, device=device)
        return self.index_K + start
