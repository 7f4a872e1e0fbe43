"""From the gradient of a tile's logits to those of hidden states and head."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from opd.objectives.head import wide_product
from opd.objectives.product import column_blocks, faster, product


class HeadGradient:
    """Gradients of hidden states [T, D] and of the head's weight [V, D], summed over tiles in `wide`, whatever the
    products run in. Which of them are wanted is said when it is made; the other stays None.

    On a host the vocabulary is gone through in blocks: each is brought into the products' dtype, and used twice, while
    the cache holds it, and no second copy of a tile is made.
    """

    def __init__(
        self, hidden_TD: Tensor, shape_VD: torch.Size, wide: torch.dtype, *, hidden: bool, weight: bool
    ) -> None:
        device = hidden_TD.device
        self.hidden_TD = torch.zeros(hidden_TD.shape, dtype=wide, device=device) if hidden else None
        fresh = torch.empty if len(hidden_TD) else torch.zeros
        self.weight_VD = fresh(shape_VD, dtype=wide, device=device) if weight else None
        self._begun = False  # the first tile is written, not added: to fill so much memory takes long
        self._states_TD = hidden_TD

    def add(self, tile: slice, dlogits_CV: Tensor, weight_VD: Tensor) -> None:
        """One tile: its gradient [C, V] and the head in the products' dtype; V may be less than the rows of the sum."""
        hidden_CD = self._states_TD[tile]
        for columns in self._blocks(dlogits_CV):
            dlogits_CB = dlogits_CV[:, columns].to(weight_VD.dtype).contiguous()
            if self.hidden_TD is not None:
                self.hidden_TD[tile] += wide_product(dlogits_CB, weight_VD[columns])
            if self.weight_VD is None:
                continue
            if faster(hidden_CD.T, dlogits_CB.T):  # made the other way round, which is faster
                self._to_weight(columns, product(hidden_CD.T, dlogits_CB.T).T)
            else:
                self._to_weight(columns, wide_product(dlogits_CB.T, hidden_CD))
        if self.weight_VD is not None and not self._begun:
            self.weight_VD[dlogits_CV.shape[1] :] = 0.0
            self._begun = True

    def _to_weight(self, columns: slice, part_BD: Tensor) -> None:
        assert self.weight_VD is not None
        if self._begun:
            self.weight_VD[columns] += part_BD
        else:
            self.weight_VD[columns] = part_BD

    @staticmethod
    def _blocks(dlogits_CV: Tensor) -> Iterator[slice]:
        C, V = dlogits_CV.shape
        return column_blocks(C, V) if dlogits_CV.device.type == "cpu" else iter((slice(0, V),))
