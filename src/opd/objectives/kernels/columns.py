"""Per-token facts, filled block by block."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from opd.objectives.kernels.rows import ScorerValues, TermValues, TokenValues
from opd.objectives.kernels.subset import Subset


class Columns:
    """Columns [T] by owner and name, NaN where nothing was put."""

    def __init__(self, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self._columns: dict[tuple[str, str, str], Tensor] = {}
        self._tokens, self._dtype, self._device = tokens, dtype, device

    def put(self, kind: str, owner: str, start: int, rows: Subset, **values_K: Tensor) -> None:
        """Values at rows of the block that begins at token `start`; kind is "student", "term" or "scorer"."""
        for name, value_K in values_K.items():
            key = (kind, owner, name)
            if key not in self._columns:
                self._columns[key] = self._empty()
            rows.write_to(self._columns[key], start, value_K)

    def values(self, terms: list[str], scorers: list[str]) -> TokenValues:
        """Everything that was put. A term or scorer without a token here has NaN in its required columns."""
        return TokenValues(
            terms={name: TermValues(**self._of("term", name, ("value_T", "ratio_T"), TermValues)) for name in terms},
            scorers={name: ScorerValues(**self._of("scorer", name, ("logprob_T",), ScorerValues)) for name in scorers},
            logprob_T=self._get("student", "", "logprob_T"),
            entropy_T=self._get("student", "", "entropy_T"),
        )

    def drawn(self, start: int, stop: int) -> Tensor:
        """[stop - start]: the student's log-probabilities of drawn tokens, as far as blocks have been noted."""
        return self._columns["student", "", "logprob_T"][start:stop]

    def _get(self, kind: str, owner: str, name: str) -> Tensor:
        column_T = self._columns.get((kind, owner, name))
        return self._empty() if column_T is None else column_T

    def _empty(self) -> Tensor:
        return torch.full((self._tokens,), torch.nan, dtype=self._dtype, device=self._device)

    def _of(self, kind: str, owner: str, always: tuple[str, ...], into: type) -> dict[str, Tensor]:
        names = [f.name for f in fields(into)]
        found = {n: self._get(kind, owner, n) for n in names if n in always or (kind, owner, n) in self._columns}
        if "unresolved_T" in found:
            found["unresolved_T"] = found["unresolved_T"] == 1
        return found
