"""Where two tokenizations of one text meet: plain arithmetic on the ends of tokens, linear in their number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def joined(
    start_T: Ints, end_T: Ints, bad_T: Bools, start_U: Ints, end_U: Ints, bad_U: Bools, length: int
) -> tuple[Ints, Ints]:
    """int64 [T], int64 [U]: the span of each token of two tokenizations of a text of `length` bytes, or -1.

    A span ends where both sides have a border, so it is the least run of both that is the same text; spans are
    numbered from 0 in the order of the text. -1 for a run in which a token of either side is bad, or one side has no
    token. A token without bytes belongs to the run of the token behind it, at the end to that of the token before it.

    The tokens of T cover the text without gaps, those of U may leave some out.
    """
    border_T, border_U = np.zeros(length + 1, dtype=np.bool_), np.zeros(length + 1, dtype=np.bool_)
    border_T[end_T] = border_T[start_T] = True
    border_U[end_U] = border_U[start_U] = True
    run_of_byte = np.cumsum(border_T & border_U)
    last = max(length - 1, 0)
    run_T, run_U = run_of_byte[np.minimum(start_T, last)], run_of_byte[np.minimum(start_U, last)]
    runs = int(run_of_byte[-1]) + 1
    bad = np.zeros(runs, dtype=np.bool_)
    bad[run_T[bad_T]] = bad[run_U[bad_U]] = True
    mapped = (np.bincount(run_T, minlength=runs) > 0) & (np.bincount(run_U, minlength=runs) > 0) & ~bad
    number = np.where(mapped, np.cumsum(mapped) - 1, -1)
    return number[run_T], number[run_U]
