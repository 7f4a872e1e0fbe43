"""The student changes: one update from rollouts, lazily pulled evidence and an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from opd.config.schema import Learner as LearnerSpec
from opd.config.schema import Optim
from opd.errors import TrainingDiverged
from opd.learner.optim import learning_rate, make_optimizer
from opd.models.packing import pack, plan
from opd.models.causal import CausalLM
from opd.models.weights import ModuleWeights
from opd.objectives.kernels.tiled import TokenRows, TokenValues, tiled_loss
from opd.objectives.objective import Objective, TermWeights, batch_weights
from opd.protocols import EvidenceHandle
from opd.types import Batch, Rollout, ScorerRows, StepReport

Invalid = dict[str, NDArray[np.bool_]]


class LocalLearner:
    """Trains a model that lives in this process.

    on_bad_step   called with (step, facts) before a step with a non-finite loss or gradient is skipped.
    padding_side  of micro-batches; no result depends on it.
    """

    def __init__(
        self,
        model: CausalLM,
        objective: Objective,
        *,
        optim: Optim,
        spec: LearnerSpec,
        total_steps: int,
        on_bad_step: Callable[[int, dict[str, Any]], None] | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = make_optimizer(model, optim)
        self.step = 0
        self._optim = optim
        self._spec = spec
        self._total_updates = total_steps * spec.updates_per_batch
        self._updates = 0
        self._bad_in_a_row = 0
        self._bad_in_all = 0
        self._on_bad_step = on_bad_step
        self._padding_side: Literal["left", "right"] = padding_side

    def weights(self) -> ModuleWeights:
        """The student's weights now; the version counts updates."""
        return ModuleWeights(self.model.module, version=self._updates)

    def update(self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None) -> StepReport:
        """One pass of the loop: `updates_per_batch` optimiser steps on these rollouts.

        A step whose loss or gradient is not finite changes nothing, is counted and reported; too many in a row raise
        TrainingDiverged.
        """
        applied, metrics = False, {}
        try:
            for _ in range(self._spec.updates_per_batch):
                metrics = self._accumulate(rollouts_N, evidence)
                applied = self._apply(rollouts_N, metrics)
        finally:
            if evidence is not None:
                evidence.release()
        self.step += 1
        report = StepReport(step=self.step, applied=applied, metrics=metrics)
        if self._bad_in_a_row >= self._spec.max_bad_steps:
            raise TrainingDiverged(
                f"{self._bad_in_a_row} updates in a row had a non-finite loss or gradient (learner.max_bad_steps = "
                f"{self._spec.max_bad_steps}). The weights are those of the last good one. Lower optim.lr "
                f"(now {metrics['lr']:g}), or look at the dumped steps in the run folder.",
                report,
            )
        return report

    def gradients(self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None) -> dict[str, float]:
        """Leaves the step's gradient in the parameters' `.grad`, unclipped, and returns the metrics."""
        return self._accumulate(rollouts_N, evidence)

    def _accumulate(self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None) -> dict[str, float]:
        """Gradient of the whole step. Evidence turns out invalid only when it is pulled; then denominators were wrong,
        and the pass is made again with these tokens masked from the start."""
        invalid: Invalid = {}
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            weights = self.objective.weights(rollouts_N, invalid)
            sums = _Sums()
            found: Invalid = {}
            for group in plan(rollouts_N, self._spec.tokens_per_micro_batch):
                self._micro_batch(group, evidence, weights, sums, found)
            if not _adds(found, invalid):
                return sums.metrics(rollouts_N, invalid)
            for key, mask_T in found.items():
                invalid[key] = invalid.get(key, np.zeros_like(mask_T)) | mask_T

    def _micro_batch(
        self,
        group: list[Rollout],
        evidence: EvidenceHandle | None,
        weights: TermWeights,
        sums: _Sums,
        found: Invalid,
    ) -> None:
        batch = pack(group, device=self.model.device, side=self._padding_side)
        scorer = self._pull(batch, evidence)
        if scorer is not None:
            _note_invalid(batch, scorer, found)
        hidden_NSD = self.model.hidden(batch.ids_NS, batch.attention_NS, batch.positions_NS)
        loss, values = tiled_loss(
            hidden_NSD[batch.row_T, batch.column_T],
            self.model.head,
            TokenRows(batch.token_T, batch.behaviour_T, batch_weights(weights, batch)),
            self.objective.terms,
            scorer=scorer,
            student_temperature=self.objective.spec.student_temperature,
            chunk_tokens=self._spec.chunk_tokens,
        )
        loss.backward()
        sums.add(loss.detach(), values, batch, scorer)

    def _pull(self, batch: Batch, evidence: EvidenceHandle | None) -> ScorerRows | None:
        resolution = self.objective.resolution
        if resolution is None:
            return None
        assert evidence is not None, "the objective reads a teacher, but the loop gave no evidence"
        (rows,) = evidence.pull(batch, resolution).values()
        return rows

    def _apply(self, rollouts_N: Sequence[Rollout], metrics: dict[str, float]) -> bool:
        """Clips and steps, or skips when anything is not finite. Adds to `metrics`."""
        parameters = [p for p in self.model.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._optim.clip_norm))
        lr = learning_rate(self._optim, self._updates, self._total_updates)
        metrics |= {"grad_norm": norm, "lr": lr}
        applied = bool(np.isfinite(norm) and np.isfinite(metrics["loss"]))
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._bad_in_a_row = 0
            self._updates += 1
        else:
            self._bad_in_a_row += 1
            self._bad_in_all += 1
            if self._on_bad_step is not None:
                facts = {"loss": metrics["loss"], "grad_norm": norm, "lr": lr, "rollouts": [r.id for r in rollouts_N]}
                self._on_bad_step(self.step + 1, facts)
        metrics["bad_steps"] = float(self._bad_in_all)
        self.optimizer.zero_grad(set_to_none=True)
        return applied


class _Sums:
    """Metrics of a step, summed over micro-batches on the device, read once at the end."""

    def __init__(self) -> None:
        self._loss: list[torch.Tensor] = []
        self._sums: dict[str, list[torch.Tensor]] = {}

    def add(self, loss: torch.Tensor, values: TokenValues, batch: Batch, scorer: ScorerRows | None) -> None:
        valid_T = batch.mask_T if scorer is None else batch.mask_T & scorer.valid_T
        facts = {f"term/{name}": value_T for name, value_T in values.terms.items()}
        facts |= {"entropy": values.entropy_T, "student_logprob": values.logprob_T}
        if values.reverse_kl_T is not None:
            facts["reverse_kl"] = values.reverse_kl_T
        on_policy_T = valid_T & torch.isfinite(batch.behaviour_T)
        gap_T = torch.where(on_policy_T, values.logprob_T - batch.behaviour_T, 0.0)
        self._loss.append(loss)
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

    def _append(self, name: str, value: torch.Tensor) -> None:
        self._sums.setdefault(name, []).append(value)


def _note_invalid(batch: Batch, scorer: ScorerRows, found: Invalid) -> None:
    """Remembers, by rollout, which trained tokens came back without a usable score."""
    bad_T = (batch.mask_T & ~scorer.valid_T).cpu().numpy()
    if not bad_T.any():
        return
    start = 0
    for rollout in batch.rollouts:
        end = start + len(rollout.response_ids)
        if bad_T[start:end].any():
            found[rollout.id] = bad_T[start:end].copy()
        start = end


def _adds(found: Invalid, known: Invalid) -> bool:
    return any(key not in known or (mask_T & ~known[key]).any() for key, mask_T in found.items())
