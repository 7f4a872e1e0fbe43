"""A few tokens of a tile: the student's distribution, what every scorer says, and the targets of the terms.

A tile is as large as its matrix products like it; everything that is not a matrix product runs over blocks of it, so
that what it needs besides the logits is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.targets import STUDENT
from opd.objectives.kernels.mixing import Target
from opd.objectives.kernels.reading import Reading
from opd.objectives.kernels.rows import TermRows, TokenRows
from opd.objectives.kernels.subset import Subset

NUMBERS_HOST, NUMBERS_DEVICE = 2**20, 2**25  # of one [B, V] in a block: what a cache holds; what fills a device
PART_HOST = 192  # tokens of a scorer at a time; its products take a tenth longer than those of 512


def tile_tokens(chunk_tokens: int, vocab_size: int) -> int:
    """Tokens in a tile: `chunk_tokens`, or as many as make a block on the host (4 MB of float32) where these are more.

    A smaller tile saves no memory worth having, and what a tile costs beside its numbers would be most of the time.
    """
    return max(chunk_tokens, NUMBERS_HOST // vocab_size)


def block_tokens(tile_tokens: int, vocab_size: int, device: torch.device) -> int:
    """Tokens in a block."""
    numbers = NUMBERS_HOST if device.type == "cpu" else NUMBERS_DEVICE
    return max(1, min(tile_tokens, numbers // vocab_size))


def part_tokens(tile_tokens: int, block: int, device: torch.device) -> int:
    """Tokens of a tile whose logits by scorers exist at the same time: whole blocks of `block` tokens.

    Nothing of a scorer's logits has to be kept, so that less than a tile will do; devices that need larger products
    to be fast take a whole one.
    """
    if device.type != "cpu":
        return tile_tokens
    parts = -(-tile_tokens // PART_HOST)
    return block * -(-tile_tokens // (parts * block))


class Block:
    """Tokens `start` to `start + size` of the batch; nothing about them is computed before it is asked for."""

    def __init__(
        self,
        start: int,
        student: Reading,
        rows: TokenRows,
        readings: Mapping[str, Reading],
        mixes: Sequence[Sequence[TermRows]],
        *,
        target: type[Target] = Target,
    ) -> None:
        """mixes: groups of settled terms with the same target. target: what makes the targets."""
        self.start, self.size = start, student.rows.size
        self.everything = Subset(self.size)
        self._device = student.drawn_R.device
        self.student, self._target = student, target
        self.drawn_B = student.drawn_R
        self._wide = self.drawn_B.dtype
        self.token_B = self.of(rows.token_T)
        self.behaviour_B = self.of(rows.behaviour_T).to(self._wide)
        self.proximal_B = self.drawn_B if rows.proximal_T is None else self.of(rows.proximal_T).to(self._wide)
        self.student_top_BK = None if rows.student_top_TK is None else self.of(rows.student_top_TK)
        self.readings = {**readings, STUDENT: student}
        self._mixes = mixes
        self._targets: dict[int, Target] = {}

    @property
    def logp_BV(self) -> Tensor:
        return self.student.logp_RV

    @cached_property
    def p_BV(self) -> Tensor:
        return self.student.p_RV

    @property
    def entropy_B(self) -> Tensor:
        return self.student.entropy_R

    def of(self, values_T: Tensor) -> Tensor:
        """[B]: these tokens' part of a tensor over the batch."""
        return values_T[self.start : self.start + self.size]

    def known(self, values_T: NDArray[Any]) -> NDArray[Any]:
        """[B]: the same of what the host knows."""
        return values_T[self.start : self.start + self.size]

    def subset(self, mask_B: NDArray[np.bool_]) -> Subset:
        """The rows where a mask on the host is true."""
        return Subset.known(mask_B, self._device)

    def weight(self, term: TermRows) -> Tensor:
        """[B]: the term's weights in the dtype of the pass, gated by entropy where the term says so."""
        weight_B = self.of(term.weight_T).to(self._wide)
        gate = term.term.tokens.where
        if gate is None:
            return weight_B
        if gate.of == STUDENT:
            entropy_B = self.entropy_B
        else:
            reading = self.readings[gate.of]
            entropy_B = torch.full_like(weight_B, torch.nan)
            reading.rows.write_to(entropy_B, 0, reading.entropy_R)
        open_B = torch.ones_like(weight_B, dtype=torch.bool)
        if gate.above is not None:
            open_B &= entropy_B > gate.above
        if gate.below is not None:
            open_B &= entropy_B < gate.below
        return torch.where(open_B, weight_B, 0.0)

    def kept(self, term: TermRows, weight_B: Tensor) -> Subset:
        """The rows that the term trains, by its weights [B] here. Only where a gate decides is the device asked."""
        if term.term.tokens.where is None:
            return self.subset(self.known(term.trained_T))
        return Subset.where(weight_B != 0)

    def target(self, term: TermRows) -> Target:
        """The term's log q~ at all tokens that it, or another term with the same coefficients, trains."""
        (group,) = [n for n, terms in enumerate(self._mixes) if any(term is other for other in terms)]
        if group not in self._targets:
            trained_B = np.logical_or.reduce([self.known(other.trained_T) for other in self._mixes[group]])
            rows = self.subset(trained_B)
            coefficients = {name: rows.of(self.of(c_T)) for name, c_T in term.mix.items()}
            used = {name: self.known(c_T)[trained_B] != 0 for name, c_T in term.known_mix.items()}
            read = {name: Subset.known(used_M, self._device) for name, used_M in used.items()}
            token_M = rows.of(self.token_B)
            self._targets[group] = self._target(
                rows, self.readings, coefficients, read, unit=term.unit, token_M=token_M
            )
        return self._targets[group]
