"""Memory that is used again: the system takes longer to hand out fresh pages than a block of logits to be computed."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """One array per name, as large as it was ever needed; what it holds is overwritten by whoever takes it next."""

    def __init__(self) -> None:
        self._arrays: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[rows, columns], not initialised."""
        array = self._arrays.get(name)
        if array is None or array.numel() < rows * columns or array.dtype != dtype or array.device != device:
            self._arrays.pop(name, None)
            array = self._arrays[name] = torch.empty(rows * columns, dtype=dtype, device=device)
        return array[: rows * columns].view(rows, columns)
