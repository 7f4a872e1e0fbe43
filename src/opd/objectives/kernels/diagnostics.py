"""What is logged about student and scorers, from the distributions that a block has already."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.objectives.kernels.block import Block
from opd.objectives.kernels.columns import Columns
from opd.objectives.kernels.foreign import ForeignReading
from opd.objectives.kernels.reading import Reading
from opd.objectives.kernels.supports import Partial, shared_value
from opd.objectives.shapes import FORWARD_KL, REVERSE_KL, Pair, ShapeMaths

TOP = 16  # most likely tokens of either side that are looked for on the other


def note_student(block: Block, columns: Columns) -> None:
    """Log-probabilities of drawn tokens, and entropies."""
    columns.put("student", "", block.start, block.everything, logprob_T=block.drawn_B, entropy_T=block.entropy_B)


def note_scorer(name: str, reading: Reading, block: Block, columns: Columns, *, everything: bool) -> None:
    """What one scorer says at its rows; `everything` adds what costs more passes over the vocabulary."""
    if isinstance(reading, ForeignReading) and reading.before_R is not None:
        return  # merged distributions: the terms that compare them say what there is to say
    facts = {"logprob_T": reading.drawn_R}
    if reading.whole:
        facts["reverse_kl_T"] = _reverse_kl(reading, block)
        if everything:
            logp_RV = reading.rows.of(block.logp_BV)
            facts["forward_kl_T"] = _divergence(FORWARD_KL, reading, block)
            facts["entropy_T"] = reading.entropy_R
            facts["overlap_T"], facts["overlap_mass_T"] = overlap(logp_RV, reading)
    columns.put("scorer", name, block.start, reading.rows, **facts)


def overlap(logp_RV: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """|TopK_p & TopK_m| / K and the student's mass on these tokens, [R], with K = TOP or the vocabulary."""
    V = logp_RV.shape[1]
    k = min(TOP, V)
    ours, theirs_RS = logp_RV.topk(k, dim=1), reading.top(k)
    marked_RW = torch.zeros(len(logp_RV), V + 1, dtype=torch.bool, device=logp_RV.device)
    shared = marked_RW.scatter_(1, theirs_RS.masked_fill(theirs_RS < 0, V), True).gather(1, ours.indices)
    return shared.to(logp_RV.dtype).mean(-1), torch.where(shared, ours.values.exp(), 0.0).sum(-1)


def _reverse_kl(reading: Reading, block: Block) -> Tensor:
    """[R]: taken from a term that has computed it at the same tokens, else computed."""
    if reading.reverse_kl is not None and len(reading.reverse_kl[0]) == len(reading.rows):
        return reading.reverse_kl[1]
    return _divergence(REVERSE_KL, reading, block)


def _divergence(shape: ShapeMaths, reading: Reading, block: Block) -> Tensor:
    """[R]: over the vocabulary; with all that is not shared as one class."""
    rows = reading.rows
    if not reading.foreign:
        return shape.f_mass(rows.of(block.logp_BV), reading.logp_RV).sum(-1)
    pair = Pair.of(rows.of(block.logp_BV), reading.logp_RV)
    return shared_value(shape, pair, Partial(reading.shared_RV, reading.outside_R))
