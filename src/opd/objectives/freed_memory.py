"""What the C library of Linux (glibc) does with memory that is freed: kept within a step, given back between two."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

KEPT = 31 * 2**20  # bytes; below the 32 MiB past which glibc gives every freed array back to the system
LARGE = 128 * 2**20  # bytes of a gradient past which its peak, and not fresh pages, is what a step has to fear


@cache
def keep_freed_memory() -> None:
    """Makes the C library keep what is freed for the next array, once in a process.

    glibc learns from the arrays that are freed how much it may keep. Untaught, it asks the system for fresh pages at
    every large array, which takes several times as long as computing its numbers.
    """
    torch.empty(KEPT, dtype=torch.uint8)


def give_back_freed_memory(gradient_bytes: int) -> None:
    """Returns what the heap holds and nobody uses, where the largest gradient of the next step is large: it is made
    outside the heap, and would come on top. The pages are then asked for again, which small steps would feel.

    Nothing happens where the C library is another one.
    """
    if gradient_bytes >= LARGE and (library := _glibc()) is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> Any | None:
    try:
        library = ctypes.CDLL(None)
        _ = library.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return None
    return library
