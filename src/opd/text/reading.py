"""Which part of another model's text each token of a reader was made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.text.written import Written

_SPACE = 0x20


@dataclass(frozen=True)
class Places:
    """The symbols of a text that each of the reader's tokens is: [start, end), one after the other.

    bad_U   bool [U]: the token is not the same bytes as its part of the text (an unknown token, a letter that a
            normaliser changed), or cannot be told from neighbours of which that is so.
    lost_B  bool [B]: symbols of the text that no token was made from.
    """

    start_U: NDArray[np.int64]
    end_U: NDArray[np.int64]
    bad_U: NDArray[np.bool_]
    lost_B: NDArray[np.bool_]

    def lost(self, text: Written) -> NDArray[np.bool_]:
        """bool [T]: the writer's tokens of which the reader did not get all."""
        lost = np.concatenate([[0], np.cumsum(self.lost_B)])
        return lost[text.end_T] > lost[text.start_T]

    def ended(self) -> Places:
        """The same with one token more, that is the end of the text and the last of its symbols."""
        size = len(self.lost_B)
        return Places(
            np.append(self.start_U, size),
            np.append(self.end_U, size + 1),
            np.append(self.bad_U, False),
            np.append(self.lost_B, False),
        )


def exact_places(text: Written, symbol_R: NDArray[np.int32], length_U: NDArray[np.int64]) -> Places | None:
    """Where the reader's tokens, with their own symbols in a row, are the text itself; None where they are not."""
    if not np.array_equal(symbol_R, text.symbol_B):
        return None
    end_U = np.cumsum(length_U)
    none_U, none_B = (np.zeros(count, dtype=np.bool_) for count in (len(end_U), len(symbol_R)))
    return Places(end_U - length_U, end_U, none_U, none_B)


def places(
    text: Written, symbol_R: NDArray[np.int32], length_U: NDArray[np.int64], offset_U2: NDArray[np.int64]
) -> Places:
    """The same for any reader, from the characters that its tokenizer says each token was made from (`offset_U2`).

    Tokens that share a character are one unit, whose bytes are compared with the text's. A leading space of a unit is
    the space of the text in front of it, if no token has that; else it is the reader's way to begin a word.
    """
    count = len(length_U)
    size = len(text.symbol_B)
    if not count:
        none = np.zeros(0, dtype=np.int64)
        return Places(none, none, np.zeros(0, dtype=np.bool_), np.ones(size, dtype=np.bool_))
    first_U, behind_U = offset_U2[:, 0], np.maximum(offset_U2[:, 1], offset_U2[:, 0])
    reached_U = np.concatenate([[-1], np.maximum.accumulate(behind_U)[:-1]])
    head = np.flatnonzero(first_U >= reached_U)  # the first token of each unit
    unit_U = np.searchsorted(head, np.arange(count), side="right") - 1
    first, behind = np.minimum.reduceat(first_U, head), np.maximum.reduceat(behind_U, head)

    # Of each unit: its part of the text, and its own symbols.
    open_end = np.append(text.start_C, size)
    start = open_end[np.minimum(first, len(text.start_C))]
    end = np.where(behind > first, np.append(text.end_C, size)[np.maximum(behind - 1, 0)], start)
    own_end_U = np.cumsum(length_U)
    own_start_U = own_end_U - length_U
    own_start = own_start_U[head]
    own_length = np.add.reduceat(length_U, head)

    begins_U = np.append(symbol_R, 0)[own_start] == _SPACE
    one_more = begins_U & (own_length == end - start + 1)
    before = np.concatenate([[0], end[:-1]])
    in_text = one_more & (start > before) & (np.append(text.symbol_B, 0)[start - 1] == _SPACE)
    start = start - in_text
    skipped = (one_more & ~in_text).astype(np.int64)

    same = own_length - skipped == end - start
    length = np.where(same, end - start, 0)
    at = np.cumsum(length) - length
    step = np.arange(int(length.sum()))
    differs = (
        symbol_R[step + np.repeat(own_start + skipped - at, length)]
        != text.symbol_B[step + np.repeat(start - at, length)]
    )
    wrong = np.concatenate([[0], np.cumsum(differs)])
    same &= wrong[at + length] == wrong[at]

    # In a unit that is not the text, all tokens stand at its start, and the last one is all of it.
    shift = (start - own_start - skipped)[unit_U]
    floor, same_U = start[unit_U], same[unit_U]
    last_U = np.append(unit_U[1:] != unit_U[:-1], True)
    start_U = np.where(same_U, np.maximum(own_start_U + shift, floor), floor)
    end_U = np.where(same_U, np.maximum(own_end_U + shift, floor), np.where(last_U, end[unit_U], floor))
    cover = np.zeros(size + 1, dtype=np.int64)
    np.add.at(cover, start, 1)
    np.add.at(cover, end, -1)
    return Places(start_U, end_U, ~same_U, np.cumsum(cover[:-1]) <= 0)
