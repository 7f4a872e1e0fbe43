"""From hidden states to loss and gradients, a tile of tokens at a time: the logits of a whole batch never exist.

One pass serves every term of the objective. Per tile of C tokens the student's and the scorers' logits are made once,
the gradient with respect to the student's logits is written down in closed form (`terms.py`), in the place of the
logits, and carried at once into the hidden states and the head: 2 T V (3 D_s + d) FLOPs, d the sum of D over scorers
that give the whole vocabulary. Besides the tile of each model, only blocks of it are alive (`block.py`).

Everything that is not a matrix product is float32, as is the sum of the head's gradient (float64 for float64 models).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.targets import STUDENT
from opd.objectives.freed_memory import keep_freed_memory
from opd.objectives.head import unordered_logits
from opd.objectives.kernels.block import Block, block_tokens, part_tokens, tile_tokens
from opd.objectives.kernels.checks import check_rows
from opd.objectives.kernels.columns import Columns
from opd.objectives.kernels.diagnostics import note_scorer, note_student
from opd.objectives.kernels.foreign import ForeignEntries, ForeignReading, SharedVocabulary
from opd.objectives.kernels.gradient import BlockGradient
from opd.objectives.kernels.head_gradient import HeadGradient
from opd.objectives.kernels.reading import Known, Reading
from opd.objectives.kernels.rows import ScorerValues, TermRows, TermValues, TokenRows, TokenValues, merges
from opd.objectives.kernels.scratch import Scratch
from opd.objectives.kernels.subset import Subset
from opd.objectives.kernels.terms import TermOnBlock
from opd.objectives.transfer import suspects
from opd.types import Head, ScorerRows

__all__ = ["ScorerValues", "TermRows", "TermValues", "TokenRows", "TokenValues", "tiled_look", "tiled_loss"]


def tiled_loss(
    hidden_TD: Tensor,
    head: Head,
    rows: TokenRows,
    terms: Sequence[TermRows],
    scorers: Sequence[ScorerRows],
    *,
    student_temperature: float,
    chunk_tokens: int,
    diagnostics: bool = False,
) -> tuple[Tensor, TokenValues]:
    """The weighted sum of all terms over these tokens (scalar, differentiable in `hidden_TD` and the head), and facts.

    hidden_TD     [T, D] student states that predict `rows.token_T`, in the compute dtype.
    scorers       those that a term reads; each may have its own width, dtype, temperature and tokens.
    chunk_tokens  tokens whose logits exist at the same time, or 4 MB of them (`block.py`); no result depends on it
                  beyond rounding.
    diagnostics   adds what costs more passes over the vocabulary: forward KL, entropies, overlaps.
    Raises ValueError when rows do not fit together (`checks.py`).
    """
    task = Task(head, rows, tuple(terms), tuple(scorers), student_temperature, chunk_tokens, diagnostics)
    return loss_of(TiledPass, hidden_TD, task)


def tiled_look(
    hidden_TD: Tensor,
    head: Head,
    rows: TokenRows,
    terms: Sequence[TermRows],
    scorers: Sequence[ScorerRows],
    *,
    student_temperature: float,
    chunk_tokens: int,
    diagnostics: bool = False,
) -> TokenValues:
    """The facts of `tiled_loss` alone: no gradient is made."""
    task = Task(head, rows, tuple(terms), tuple(scorers), student_temperature, chunk_tokens, diagnostics)
    return look_of(TiledPass, hidden_TD, task)


def loss_of(kind: type[TiledPass], hidden_TD: Tensor, task: Task) -> tuple[Tensor, TokenValues]:
    """The loss and the facts of one kind of pass."""
    values: list[TokenValues] = []
    loss = _TiledLoss.apply(hidden_TD, task.head.weight_VD, task.head.bias_V, kind, task, values)
    return loss, values[0]


@torch.no_grad()
def look_of(kind: type[TiledPass], hidden_TD: Tensor, task: Task) -> TokenValues:
    """The facts alone."""
    pass_ = kind(hidden_TD.detach(), task)
    for tile in pass_.tiles():
        pass_.fields(tile, gradient=False)
    return pass_.values()


@dataclass(frozen=True)
class Task:
    """What is to be made, as the arguments of `tiled_loss` say it."""

    head: Head
    rows: TokenRows
    terms: tuple[TermRows, ...]
    scorers: tuple[ScorerRows, ...]
    temperature: float
    chunk_tokens: int
    diagnostics: bool


class _TiledLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, while a tile's logits are alive, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        kind: type[TiledPass],
        task: Task,
        values: list[TokenValues],
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_TD = hidden_TD.detach()
        pass_ = kind(hidden_TD, task)
        weight = pass_.head.weight_VD
        V = len(weight)
        sums = HeadGradient(hidden_TD, weight_VD.shape, pass_.wide, hidden=needs_hidden, weight=needs_weight)
        dbias_V = torch.zeros(len(weight_VD), dtype=pass_.wide, device=hidden_TD.device) if needs_bias else None
        gradient = needs_hidden or needs_weight or needs_bias
        for tile in pass_.tiles():
            dlogits_CV = pass_.fields(tile, gradient=gradient)
            if not gradient:
                continue
            if dbias_V is not None:
                dbias_V[:V] += dlogits_CV.sum(0)
            sums.add(tile, dlogits_CV, weight)
            del dlogits_CV
        dhidden_TD = None if sums.hidden_TD is None else sums.hidden_TD.to(hidden_TD.dtype)
        ctx.gradients = (dhidden_TD, sums.weight_VD, dbias_V)
        values.append(pass_.values())
        return pass_.loss

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (scale,) = outputs
        assert ctx.gradients is not None, "these gradients are made once; a second backward needs a second forward"
        gradients = ctx.gradients  # ours alone: no second [V, D]
        if suspects(scale, lambda x: x != 1.0):
            gradients = [None if g is None else g.mul_(scale) for g in gradients]
        ctx.gradients = None
        return (*gradients, None, None, None)


class TiledPass:
    """One way over the tokens, tile by tile."""

    def __init__(self, hidden_TD: Tensor, task: Task) -> None:
        terms, scorers = tuple(t.settled() for t in task.terms), tuple(_settled(s) for s in task.scorers)
        task = replace(task, terms=terms, scorers=scorers)
        head = task.head
        self.tokens, device = len(hidden_TD), hidden_TD.device
        widths = {s.name: s.head.vocab_size for s in scorers if s.head is not None} | {STUDENT: head.vocab_size}
        check_rows(self.tokens, task.rows, terms, scorers, widths=widths)
        self.task = task
        self.hidden_TD = hidden_TD
        self.scratch = Scratch()
        self.head = self._prepared(STUDENT, head, hidden_TD.dtype)
        self.heads = {
            s.name: self._prepared(s.name, s.head, s.hidden_TD.dtype)
            for s in scorers
            if s.hidden_TD is not None and s.head
        }
        if device.type == "cpu":
            keep_freed_memory()
        self.wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        self.columns = Columns(self.tokens, self.wide, device)
        self.loss = torch.zeros((), dtype=self.wide, device=device)
        self.mixes = _same_mixes([t for t in terms if not merges(t.term)])
        self.shared = {s.name: SharedVocabulary(s) for s in scorers if s.shared_V is not None}
        widest = max(widths.values())  # of one tokenizer they are equal
        self.tile_tokens = tile_tokens(task.chunk_tokens, widest)
        self.block_tokens = block_tokens(self.tile_tokens, widest, device)
        self.part_tokens = part_tokens(self.tile_tokens, self.block_tokens, device)
        edges = sorted({edge for tile in self.tiles() for edge in (*_starts(tile, self.block_tokens), tile.stop)})
        self.edges = {s.name: _cuts(s.known_index_T, edges) for s in scorers}

    def _prepared(self, name: str, head: Head, dtype: torch.dtype) -> Head:
        """The head without padding and gradient, its weight in the compute dtype."""
        weight_VD = head.weight_VD.detach()[: head.vocab_size]
        if weight_VD.dtype != dtype:
            rows, columns = weight_VD.shape
            fresh_VD = self.scratch.take(f"head of {name}", rows, columns, dtype, weight_VD.device)
            weight_VD = fresh_VD.copy_(weight_VD)
        bias_V = None if head.bias_V is None else head.bias_V.detach()[: head.vocab_size]
        return Head(weight_VD, head.vocab_size, bias_V, head.scale, head.softcap, head.order_V)

    def tiles(self) -> Iterator[slice]:
        for start in range(0, self.tokens, self.tile_tokens):
            yield slice(start, min(start + self.tile_tokens, self.tokens))

    def values(self) -> TokenValues:
        return self.columns.values([t.term.name for t in self.task.terms], [s.name for s in self.task.scorers])

    def fields(self, tile: slice, *, gradient: bool) -> Tensor:
        """[C, V]: the gradient with respect to the student's logits, columns as the head's rows, in the dtype of `wide`
        or in that of the next products. Notes loss and facts.

        Without `gradient` what comes back has no meaning.
        """
        logits_CV = self._logits(STUDENT, self.hidden_TD[tile], self.head)
        for part, scored, start, stop in self._blocks(tile):
            logits_BV = logits_CV[start - tile.start : stop - tile.start]
            wide_BV = logits_BV.to(self.wide)
            readings = {s.name: self._reading(s, scored[s.name], part, start, stop) for s in self.task.scorers}
            token_B = self.task.rows.token_T[start:stop]
            student = Reading(Subset(stop - start), token_B, logits_RV=self._scaled(wide_BV))
            block = Block(start, student, self.task.rows, readings, self.mixes)
            into = BlockGradient(block.p_BV, block.token_B) if gradient else None
            note_student(block, self.columns)
            for term in self.task.terms:
                self.loss += TermOnBlock(term, block, into, self.columns).run()
            for name, reading in readings.items():
                if len(reading.rows):
                    note_scorer(name, reading, block, self.columns, everything=self.task.diagnostics)
            if into is not None:
                logits_BV.copy_(self._to_logits(into.total(), wide_BV))
        return logits_CV

    def _blocks(self, tile: slice) -> Iterator[tuple[slice, dict[str, Tensor | None], int, int]]:
        """Where blocks start and stop, with the part of the tile that they lie in and the scorers' logits of it."""
        for first in _starts(tile, self.part_tokens):
            part = slice(first, min(first + self.part_tokens, tile.stop))
            scored = {s.name: self._scores(s, part) for s in self.task.scorers}
            for start in _starts(part, self.block_tokens):
                yield part, scored, start, min(start + self.block_tokens, part.stop)

    def _scores(self, scorer: ScorerRows, tile: slice) -> Tensor | None:
        """A scorer's logits at its rows of a tile, divided by its temperature; None where it scores drawn tokens."""
        if scorer.hidden_TD is None or scorer.name not in self.heads:
            return None
        at = self.edges[scorer.name]
        hidden_RD = scorer.hidden_TD[at[tile.start] : at[tile.stop]]
        logits_RV = self._logits(scorer.name, hidden_RD, self.heads[scorer.name])
        return logits_RV if scorer.temperature == 1.0 else logits_RV.to(self.wide).div_(scorer.temperature)

    def _logits(self, name: str, hidden_RD: Tensor, head: Head) -> Tensor:
        """[R, V] in this model's buffer, which the next tile overwrites."""
        if len(hidden_RD) == 0:
            return self.hidden_TD.new_empty(0, head.vocab_size)
        dtype = self._tile_dtype(hidden_RD, head)
        into_RV = self.scratch.take(name, len(hidden_RD), head.vocab_size, dtype, hidden_RD.device)
        if torch.promote_types(dtype, torch.float32) != dtype:
            return torch.mm(hidden_RD, head.weight_VD.T, out=into_RV)
        return unordered_logits(hidden_RD, head, into_RV)

    def _tile_dtype(self, hidden_RD: Tensor, head: Head) -> torch.dtype:
        """What the logits of a tile are kept in: a host rounds its products to their own dtype in any case, and so are
        gradients before the next products; nothing is lost if both stay like that, and half the memory is moved."""
        plain = head.bias_V is None and head.scale == 1.0 and head.softcap is None
        if plain and hidden_RD.device.type == "cpu":
            return hidden_RD.dtype
        return torch.promote_types(hidden_RD.dtype, torch.float32)

    def _reading(self, scorer: ScorerRows, logits_RV: Tensor | None, tile: slice, start: int, stop: int) -> Reading:
        rows, part = self._rows_of(scorer, start, stop)
        token_R = rows.of(self.task.rows.token_T[start:stop])
        if logits_RV is None:
            assert scorer.logprobs_T is not None
            entries, drawn_R = None, scorer.logprobs_T[part].to(self.wide)
            if scorer.entry_ids_TK is not None and scorer.entries_TK is not None:
                entries = Known(scorer.entry_ids_TK[part], scorer.entries_TK[part], self.head.vocab_size)
                if scorer.name in self.shared:
                    return ForeignEntries(rows, token_R, drawn_R, entries)
            return Reading(rows, token_R, drawn_R=drawn_R, entries=entries)
        first = self.edges[scorer.name][tile.start]
        logits_RV = logits_RV[part.start - first : part.stop - first].to(self.wide)
        if scorer.name in self.shared:
            assert scorer.own_token_T is not None
            before_R = None if scorer.before_T is None else scorer.before_T[part]
            return ForeignReading(
                rows, token_R, logits_RV, scorer.own_token_T[part], self.shared[scorer.name], before_R
            )
        order_V = self.heads[scorer.name].order_V
        return Reading(rows, token_R, logits_RV=logits_RV if order_V is None else logits_RV.index_select(1, order_V))

    def _rows_of(self, scorer: ScorerRows, start: int, stop: int) -> tuple[Subset, slice]:
        """The tokens from `start` to `stop` that a scorer has rows for, and where these rows are."""
        part = slice(self.edges[scorer.name][start], self.edges[scorer.name][stop])
        index_T = scorer.index_T
        if index_T is None or part.stop - part.start == stop - start:
            return Subset(stop - start), part
        return Subset(stop - start, index_T[part] - start), part

    def _scaled(self, logits_BV: Tensor) -> Tensor:
        """The student's logits in the order of tokens, divided by its temperature."""
        if self.head.order_V is not None:
            logits_BV = logits_BV.index_select(1, self.head.order_V)
        return logits_BV if self.task.temperature == 1.0 else logits_BV / self.task.temperature

    def _to_logits(self, gradient_BV: Tensor, logits_BV: Tensor) -> Tensor:
        """Carries a gradient through temperature, order, softcap and scale; both are used up."""
        factor = self.head.scale / self.task.temperature
        if factor != 1.0:
            gradient_BV *= factor
        if self.head.order_V is not None:
            gradient_BV = torch.zeros_like(gradient_BV).index_add_(1, self.head.order_V, gradient_BV)
        if self.head.softcap is not None:
            slope_BV = logits_BV.div_(self.head.softcap).square_().neg_().add_(1.0)
            gradient_BV *= slope_BV
        return gradient_BV


def _starts(tile: slice, step: int) -> range:
    return range(tile.start, tile.stop, step)


def _settled(scorer: ScorerRows) -> ScorerRows:
    """The rows with their index known to the host."""
    if scorer.index_T is None or scorer.known_index_T is not None:
        return scorer
    return replace(scorer, known_index_T=scorer.index_T.cpu().numpy())


def _cuts(index_T: NDArray[np.int64] | None, edges: list[int]) -> dict[int, int]:
    """For every edge, counted in tokens: how many of a scorer's rows lie before it."""
    if index_T is None:
        return {edge: edge for edge in edges}
    return dict(zip(edges, np.searchsorted(index_T, edges).tolist(), strict=True))


def _same_mixes(terms: Sequence[TermRows]) -> list[list[TermRows]]:
    """Terms by target: those with equal coefficients share one log q~."""
    groups: list[list[TermRows]] = []
    for term in terms:
        for group in groups:
            first = group[0]
            same = first.unit == term.unit and first.known_mix.keys() == term.known_mix.keys()
            if same and all(np.array_equal(first.known_mix[name], c_T) for name, c_T in term.known_mix.items()):
                group.append(term)
                break
        else:
            groups.append([term])
    return groups
