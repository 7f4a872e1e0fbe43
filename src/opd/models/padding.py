"""Ragged sequences as one rectangle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.objectives.transfer import onto


def pad(
    sequences: Sequence[NDArray[np.int64]], *, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and absolute positions, each int64 [N, S].

    Padding repeats token 0 under a zero mask; positions count real tokens only, so that neither the side nor the
    amount of padding changes what a model sees.
    """
    longest = max(len(s) for s in sequences)
    ids_NS = np.zeros((len(sequences), longest), dtype=np.int64)
    attention_NS = np.zeros_like(ids_NS)
    for n, sequence in enumerate(sequences):
        where = slice(longest - len(sequence), longest) if side == "left" else slice(0, len(sequence))
        ids_NS[n, where] = sequence
        attention_NS[n, where] = 1
    positions_NS = np.maximum(attention_NS.cumsum(1) - 1, 0)
    return tuple(onto(a, device) for a in (ids_NS, attention_NS, positions_NS))  # type: ignore[return-value]
