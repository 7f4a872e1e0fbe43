"""What a step saw at its tokens: sums for metrics and every token's numbers, read from the device at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from opd.objectives.kernels.tiled import TokenValues
from opd.types import Batch, Rollout, ScorerRows, TokenScores

Invalid = dict[str, NDArray[np.bool_]]


class Tally:
    """Filled micro-batch by micro-batch; `metrics` and `scores` read it."""

    def __init__(self) -> None:
        self._loss: list[torch.Tensor] = []
        self._sums: dict[str, list[torch.Tensor]] = {}
        self._rollouts: list[Rollout] = []
        self._tokens: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, values: TokenValues, batch: Batch, scorer: ScorerRows | None) -> None:
        valid_T = batch.mask_T if scorer is None else batch.mask_T & scorer.valid_T
        facts = {f"term/{name}": value_T for name, value_T in values.terms.items()}
        facts |= {"entropy": values.entropy_T, "student_logprob": values.logprob_T}
        if values.reverse_kl_T is not None:
            facts["reverse_kl"] = values.reverse_kl_T
        on_policy_T = valid_T & torch.isfinite(batch.behaviour_T)
        gap_T = torch.where(on_policy_T, values.logprob_T - batch.behaviour_T, 0.0)
        self._loss.append(loss)
        self._rollouts += batch.rollouts
        nothing_T = torch.full_like(values.logprob_T, torch.nan)
        seen = (values.logprob_T, values.teacher_T, values.reverse_kl_T)
        rows_3T = torch.stack([nothing_T if value_T is None else value_T for value_T in seen])
        self._tokens.append(torch.where(valid_T, rows_3T, nothing_T).float())
        for name, value_T in facts.items():
            self._append(name, torch.where(valid_T, value_T, 0.0).sum())
        self._append("valid", valid_T.sum())
        self._append("on_policy", on_policy_T.sum())
        self._append("policy_gap", gap_T.abs().sum())
        self._append("policy_gap_max", gap_T.abs().max())

    def metrics(self, rollouts_N: Sequence[Rollout], invalid: Invalid) -> dict[str, float]:
        """Means per trained token. `policy_gap` is |log p now - log p when sampled|, zero when on-policy."""
        total = {k: float(torch.stack(v).sum()) for k, v in self._sums.items()}
        tokens, on_policy = total.pop("valid"), total.pop("on_policy")
        gap = total.pop("policy_gap")
        total.pop("policy_gap_max")
        metrics = {"loss": float(torch.stack(self._loss).sum())}
        metrics |= {k: v / max(tokens, 1.0) for k, v in total.items()}
        metrics["trained_tokens"] = tokens
        metrics["masked_tokens"] = float(sum(len(r.mask) for r in rollouts_N)) - tokens
        metrics["invalid_scores"] = float(sum(m.sum() for m in invalid.values()))
        if on_policy:
            metrics["policy_gap"] = gap / on_policy
            metrics["policy_gap_max"] = float(torch.stack(self._sums["policy_gap_max"]).max())
        return metrics

    def scores(self) -> dict[str, TokenScores]:
        """Rollout id to what was seen at its tokens."""
        columns_3T = torch.cat(self._tokens, dim=1).cpu().numpy()
        ends = np.cumsum([len(rollout.response_ids) for rollout in self._rollouts])[:-1]
        pieces = np.split(columns_3T, ends, axis=1)
        return {r.id: TokenScores(**_named(piece)) for r, piece in zip(self._rollouts, pieces, strict=True)}

    def _append(self, name: str, value: torch.Tensor) -> None:
        self._sums.setdefault(name, []).append(value)


def _named(columns_3T: NDArray[np.float32]) -> Mapping[str, NDArray[np.float32]]:
    names = ("student_logprobs", "teacher_logprobs", "reverse_kl")
    return dict(zip(names, columns_3T, strict=True))
