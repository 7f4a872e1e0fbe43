"""Between the host and a device, without waiting.

A device works off what it was asked to do, in order. Whoever reads one of its numbers waits until all of that is done,
and then the device waits for new work. So the host tells devices what it knows, and asks them nothing on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def onto(values: NDArray[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """An array of the host on a device, in `dtype` where one is given. CUDA copies it in its turn, from pinned memory;
    on the host it may be the array itself."""
    there = torch.from_numpy(values)
    there = there if dtype is None else there.to(dtype)
    if device.type == "cuda":
        there = there.pin_memory()
    return there.to(device, non_blocking=True)


def suspects(values: Tensor, look: Callable[[Tensor], Tensor]) -> bool:
    """Whether values need the careful treatment: what `look` (to a bool scalar) finds on the host, always on a device.

    For treatments that are right in any case and only cost more: looking would cost a device more than they do.
    """
    return not free_to_look(values.device) or bool(look(values))


def free_to_look(device: torch.device) -> bool:
    """Whether reading a number does not make anybody wait."""
    return device.type == "cpu"
