"""What the C library of Linux (glibc) does with memory that is freed: kept within a step, given back between two."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

KEPT = 31 * 2**20  # bytes; below the 32 MiB past which glibc gives every freed array back to the system
WORTH = 128 * 2**20  # bytes of free memory below which giving it back is not worth the fresh pages of the next step


class _HeapInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; `fordblks` counts free bytes in the heap."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


@cache
def keep_freed_memory() -> None:
    """Makes the C library keep what is freed for the next array, once in a process.

    glibc learns from the arrays that are freed how much it may keep. Untaught, it asks the system for fresh pages at
    every large array, which takes several times as long as computing its numbers.
    """
    torch.empty(KEPT, dtype=torch.uint8)


def give_back_freed_memory() -> None:
    """Returns what the heap holds and nobody uses, where it is much: else the peak of the next step comes on top of it.

    Nothing happens where the C library is another one.
    """
    if (library := _glibc()) is not None and library.mallinfo2().fordblks > WORTH:
        library.malloc_trim(0)


@cache
def _glibc() -> Any | None:
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _HeapInfo
        _ = library.malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return None
    return library
