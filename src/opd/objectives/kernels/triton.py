"""The pass of `tiled.py` with everything over the vocabulary made by Triton kernels.

Matrix products are those of `tiled.py`. What lies between them is bound by memory, and is made in few passes over a
tile's logits, without another array of their size:

    1  for the student and every scorer: logsumexp, entropy, log-probability of the drawn token
    2  for every full-vocabulary term: E_p[h] and the divergence; KL(student || scorer) for the record
    3  the gradient -w (p h - p E_p[h]), with what drawn tokens add, written over the student's logits

Made here: terms on the full vocabulary and on drawn tokens, of every shape, for any target. A mixture of scorers and a
second full-vocabulary term each take one array [C, V] more. Terms on a few entries (top-k) are made by the code of
`tiled.py`, block by block, from log-probabilities that are written down for them, and so are diagnostics. Students
with float64 states take `tiled.py` altogether: the kernels compute in float32.

Head orders of the student must be permutations: the gradient is written where the logit was read.

Tested against `tiled.py` by Triton's interpreter, and compiled without being run: no GPU has run these kernels yet.
`choice.py` compares both passes on a device before it takes this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ReverseKL
from opd.config.slots import Full, Sampled
from opd.config.targets import STUDENT
from opd.objectives.kernels.block import Block
from opd.objectives.kernels.diagnostics import note_scorer, note_student
from opd.objectives.kernels.gradient import BlockGradient
from opd.objectives.kernels.mixing import Target
from opd.objectives.kernels.reading import Reading
from opd.objectives.kernels.rows import TermRows, TokenRows, TokenValues, merges
from opd.objectives.kernels.subset import Subset
from opd.objectives.kernels.terms import TermOnBlock
from opd.objectives.kernels.tiled import Task, TiledPass, look_of, loss_of
from opd.objectives.kernels.triton_launch import Comparison, Logits, finish
from opd.objectives.shapes import ShapeMaths
from opd.types import Head, ScorerRows


def triton_loss(
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
    """As `tiled_loss`, with the same results up to float32 rounding.

    Raises ValueError when rows do not fit together.
    """
    task = Task(head, rows, tuple(terms), tuple(scorers), student_temperature, chunk_tokens, diagnostics)
    return loss_of(_pass(hidden_TD, task), hidden_TD, task)


def triton_look(
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
    """As `tiled_look`, likewise."""
    task = Task(head, rows, tuple(terms), tuple(scorers), student_temperature, chunk_tokens, diagnostics)
    return look_of(_pass(hidden_TD, task), hidden_TD, task)


def _pass(hidden_TD: Tensor, task: Task) -> type[TiledPass]:
    """Of two tokenizers, and of merged spans, the kernels know nothing."""
    plain = all(s.shared_V is None for s in task.scorers) and not any(merges(t.term) for t in task.terms)
    return TritonPass if plain and hidden_TD.dtype != torch.float64 else TiledPass


class TritonPass(TiledPass):
    """One way over the tokens; a tile is one block, unless something in it has to be written down."""

    def fields(self, tile: slice, *, gradient: bool) -> Tensor:
        raw_CV = self._product(STUDENT, self.hidden_TD[tile], self.head)
        for part, raw, start, stop in self._blocks(tile):
            with torch.cuda.device_of(raw_CV):
                self._block(raw_CV[start - tile.start : stop - tile.start], raw, part, start, stop, gradient)
        return raw_CV

    def _blocks(self, tile: slice) -> Iterator[tuple[slice, dict[str, Tensor | None], int, int]]:
        if self.task.diagnostics or any(_written(t) for t in self.task.terms):
            yield from super()._blocks(tile)
        else:
            yield tile, {s.name: self._scores(s, tile) for s in self.task.scorers}, tile.start, tile.stop

    def _block(
        self, raw_BV: Tensor, raw: Mapping[str, Tensor | None], part: slice, start: int, stop: int, gradient: bool
    ) -> None:
        token_B = self.task.rows.token_T[start:stop]
        student = WrittenReading(
            Subset(stop - start), token_B, Logits(raw_BV, self.head, self.task.temperature, token_B)
        )
        readings = {s.name: self._reading(s, raw[s.name], part, start, stop) for s in self.task.scorers}
        block = TritonBlock(start, student, self.task.rows, readings, self.mixes)
        into = TritonGradient(block) if gradient else None
        note_student(block, self.columns)
        for term in self.task.terms:
            self.loss += TritonTerm(term, block, into, self.columns).run()
        for name, reading in readings.items():
            if len(reading.rows) == 0:
                continue
            if isinstance(reading, WrittenReading):
                reading.compare_with(student)
            note_scorer(name, reading, block, self.columns, everything=self.task.diagnostics)
        if into is not None:
            into.write()

    def _scores(self, scorer: ScorerRows, tile: slice) -> Tensor | None:
        if scorer.hidden_TD is None or scorer.name not in self.heads:
            return None
        at = self.edges[scorer.name]
        hidden_RD = scorer.hidden_TD[at[tile.start] : at[tile.stop]]
        return self._product(scorer.name, hidden_RD, self.heads[scorer.name])

    def _tile_dtype(self, hidden_RD: Tensor, head: Head) -> torch.dtype:
        return self.wide  # what the kernels read and write

    def _product(self, name: str, hidden_RD: Tensor, head: Head) -> Tensor:
        """States times head, and nothing else."""
        return self._logits(name, hidden_RD, Head(head.weight_VD, head.vocab_size))

    def _reading(self, scorer: ScorerRows, logits_RV: Tensor | None, tile: slice, start: int, stop: int) -> Reading:
        if logits_RV is None:
            return super()._reading(scorer, None, tile, start, stop)
        rows, part = self._rows_of(scorer, start, stop)
        token_R = rows.of(self.task.rows.token_T[start:stop])
        first = self.edges[scorer.name][tile.start]
        raw_RV = logits_RV[part.start - first : part.stop - first]
        return WrittenReading(rows, token_R, Logits(raw_RV, self.heads[scorer.name], scorer.temperature, token_R))


def _written(rows: TermRows) -> bool:
    """Whether a term needs log-probabilities written down."""
    return isinstance(rows.term, DivergenceTerm) and not isinstance(rows.term.support, Full | Sampled)


class WrittenReading(Reading):
    """A distribution that is written down only when somebody asks for it."""

    def __init__(self, rows: Subset, token_R: Tensor, logits: Logits) -> None:
        super().__init__(rows, token_R, logits_RV=logits.raw_RV)
        self.logits = logits

    @property
    def logits_RV(self) -> Tensor:
        return self.logp_RV

    @cached_property
    def logp_RV(self) -> Tensor:
        return self.logits.logprobs()

    @cached_property
    def p_RV(self) -> Tensor:
        return self.logp_RV.exp()

    @cached_property
    def drawn_R(self) -> Tensor:
        return self.logits.summary[1]

    @cached_property
    def entropy_R(self) -> Tensor:
        return self.logits.summary[2]

    def compare_with(self, student: WrittenReading) -> None:
        """Makes KL(student || this), unless a term has made it."""
        if self.reverse_kl is not None and len(self.reverse_kl[0]) == len(self.rows):
            return
        rows = self.rows.positions(0, self.logits.raw_RV.device)
        target_rows = torch.arange(len(rows), device=rows.device)
        value_R = Comparison(ReverseKL(), student.logits, self.logits, rows, target_rows).reduce()[1]
        self.reverse_kl = (self.rows, value_R)


class TritonBlock(Block):
    """A block whose student is not written down unless a term needs it."""

    student: WrittenReading

    def __init__(
        self,
        start: int,
        student: WrittenReading,
        rows: TokenRows,
        readings: Mapping[str, Reading],
        mixes: Sequence[Sequence[TermRows]],
    ) -> None:
        super().__init__(start, student, rows, readings, mixes, target=TritonTarget)


class TritonTarget(Target):
    """log q~ as rows of logits: those of the one scorer, or a mixture that is summed up in an array of its own."""

    @cached_property
    def logits(self) -> tuple[Logits, Tensor]:
        """Logits, and which of their rows [M] belong to the rows of this target."""
        device = self._token_M.device
        if self.single is not None:
            reading = self.single
            assert isinstance(reading, WrittenReading)
            return reading.logits, self._rows_in(reading, self._parts[0][2])
        first = self._parts[0][0]
        assert isinstance(first, WrittenReading)
        V = first.logits.vocab_size
        mixed_MV = torch.zeros(len(self.rows), V, dtype=torch.float32, device=device)
        for reading, c_M, where in self._parts:
            assert isinstance(reading, WrittenReading)
            reading.logits.add_to(
                mixed_MV,
                from_K=self._rows_in(reading, where),
                to_K=where.positions(0, device),
                share_K=where.of(c_M),
            )
        plain = Head(mixed_MV, V)
        return Logits(mixed_MV, plain, 1.0, self._token_M), torch.arange(len(self.rows), device=device)

    @cached_property
    def logq_MV(self) -> Tensor:
        if self.single is not None:
            return super().logq_MV
        return self.logits[0].logprobs()

    def drawn(self, *, normalised: bool) -> Tensor:
        if normalised and not self._unit:
            return self.logits[0].summary[1]
        return super().drawn(normalised=normalised)

    def _rows_in(self, reading: Reading, where: Subset) -> Tensor:
        return self._rows_of(reading, where, torch.arange(len(reading.rows), device=self._token_M.device))


class TritonTerm(TermOnBlock):
    """A term whose sums over the whole vocabulary are made by a kernel."""

    def _full(self, term: DivergenceTerm, shape: ShapeMaths, target: Target) -> Tensor:
        compared = self._compared(term, target)
        mean_K, value_K = compared.reduce()
        if self.gradient is not None:
            assert isinstance(self.gradient, TritonGradient)
            self.gradient.compared(self.kept, compared, self.weight_K, mean_K)
        if isinstance(term.shape, ReverseKL) and target.single is not None:
            target.single.reverse_kl = (self.kept, value_K)
        self._put(ratio_T=torch.ones_like(value_K))
        return value_K

    def _mean_h(self, term: DivergenceTerm, shape: ShapeMaths, target: Target) -> Tensor:
        return self._compared(term, target).reduce()[0]

    def _compared(self, term: DivergenceTerm, target: Target) -> Comparison:
        assert isinstance(target, TritonTarget) and isinstance(self.block, TritonBlock)
        logits, row_M = target.logits
        right_T = self.rows.right_T
        right_K = None if right_T is None else self.kept.of(self.block.of(right_T))
        rows_K = self.kept.positions(0, row_M.device)
        return Comparison(
            term.shape, self.block.student.logits, logits, rows_K, self.kept.among(target.rows, row_M), right_K
        )


class TritonGradient(BlockGradient):
    """The gradient of a block, the field of the last full-vocabulary term not made before it is written down."""

    def __init__(self, block: TritonBlock) -> None:
        self._block = block
        self._along_p_B = torch.zeros_like(block.drawn_B)
        self._drawn_B = torch.zeros_like(block.drawn_B)
        self._dense_BV: Tensor | None = None
        self._points: list[tuple[Tensor, Tensor]] = []
        self._last: tuple[Comparison, Tensor] | None = None

    @property
    def _p_BV(self) -> Tensor:
        return self._block.p_BV

    def compared(self, rows: Subset, compared: Comparison, weight_K: Tensor, mean_K: Tensor) -> None:
        """-w (p h - p E_p[h]) over the vocabulary."""
        self._along(rows, weight_K * mean_K)
        if self._last is not None:
            earlier, earlier_weight_K = self._last
            earlier.add_field(self._dense(), earlier_weight_K)
        self._last = (compared, weight_K)

    def write(self) -> None:
        """Over the student's logits."""
        for index, value in self._points:
            self._dense().view(-1).index_add_(0, index, value)
        finish(
            self._block.student.logits, along_B=self._along_p_B, drawn_B=self._drawn_B, token_B=self._block.token_B,
            other_BV=self._dense_BV, field=self._last,
        )  # fmt: skip

    def _dense(self) -> Tensor:
        if self._dense_BV is None:
            self._dense_BV = torch.zeros(
                self._block.student.logits.raw_RV.shape, dtype=torch.float32, device=self._along_p_B.device
            )
        return self._dense_BV
