"""The student changes: one update from rollouts, lazily pulled evidence and an objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from opd.config.schema import Learner as LearnerSpec
from opd.config.schema import Optim
from opd.errors import ModelError, TrainingDiverged
from opd.learner.optim import learning_rate, make_optimizer
from opd.learner.tally import Invalid, Tally
from opd.models.causal import CausalLM
from opd.models.packing import pack, plan
from opd.models.weights import ModuleWeights
from opd.objectives.kernels.tiled import TokenRows, tiled_loss
from opd.objectives.objective import Objective, TermWeights, batch_weights
from opd.protocols import EvidenceHandle
from opd.types import Batch, Rollout, ScorerRows, StepReport

SMALLEST_CHUNK = 16  # tokens in a tile, below which less memory is not worth the time


class LocalLearner:
    """Trains a model that lives in this process.

    step                    passes of the loop so far.
    tokens_per_micro_batch  as configured, or less after the device ran out of memory; no result depends on it.
    chunk_tokens            likewise.

    on_bad_step    called with (step, facts) before a step with a non-finite loss or gradient is skipped.
    before_change  called when the gradient of a batch is whole, before the first thing that belongs to the learner's
                   state is changed: until `update` returns and the step is written down, the student is neither the
                   old nor the new one.
    on_less        called with a sentence when micro-batches had to become smaller.
    padding_side   of micro-batches; no result depends on it.
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
        before_change: Callable[[], None] | None = None,
        on_less: Callable[[str], None] | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> None:
        self.model = model
        self.objective = objective
        self.optimizer = make_optimizer(model, optim)
        self.step = 0
        self.updates = 0
        self.bad_in_a_row = 0
        self.bad_in_all = 0
        self.tokens_per_micro_batch = spec.tokens_per_micro_batch
        self.chunk_tokens = spec.chunk_tokens
        self._optim = optim
        self._spec = spec
        self._total_updates = total_steps * spec.updates_per_batch
        self._on_bad_step = on_bad_step
        self._before_change = before_change
        self._on_less = on_less
        self._padding_side: Literal["left", "right"] = padding_side

    def lowered(self) -> dict[str, int]:
        """The limits that are lower than configured, because memory ran out."""
        names = ("tokens_per_micro_batch", "chunk_tokens")
        return {name: getattr(self, name) for name in names if getattr(self, name) < getattr(self._spec, name)}

    def weights(self) -> ModuleWeights:
        """The student's weights now; the version counts updates."""
        return ModuleWeights(self.model.module, version=self.updates)

    def update(self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None) -> StepReport:
        """One pass of the loop: `updates_per_batch` optimiser steps on these rollouts.

        A step whose loss or gradient is not finite changes nothing, is counted and reported; too many in a row raise
        TrainingDiverged.
        """
        applied, metrics, tally = False, {}, Tally()
        try:
            for n in range(self._spec.updates_per_batch):
                metrics, tally = self._accumulate(rollouts_N, evidence)
                if n == 0 and self._before_change is not None:
                    self._before_change()
                applied = self._apply(rollouts_N, metrics)
        finally:
            if evidence is not None:
                evidence.release()
        self.step += 1
        report = StepReport(step=self.step, applied=applied, metrics=metrics, scores=tally.scores())
        if self.bad_in_a_row >= self._spec.max_bad_steps:
            raise TrainingDiverged(
                f"{self.bad_in_a_row} updates in a row had a non-finite loss or gradient (learner.max_bad_steps = "
                f"{self._spec.max_bad_steps}). The weights are those of the last good one. Lower optim.lr "
                f"(now {metrics['lr']:g}), or look at the dumped steps in the run folder.",
                report,
            )
        return report

    def gradients(self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None) -> dict[str, float]:
        """Leaves the step's gradient in the parameters' `.grad`, unclipped, and returns the metrics."""
        return self._accumulate(rollouts_N, evidence)[0]

    def _accumulate(
        self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None
    ) -> tuple[dict[str, float], Tally]:
        """Gradient of the whole step. Evidence turns out invalid only when it is pulled; then denominators were wrong,
        and the pass is made again with these tokens masked from the start. Out of memory, it is made again with
        smaller micro-batches: the same gradient."""
        invalid: Invalid = {}
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            weights = self.objective.weights(rollouts_N, invalid)
            tally = Tally()
            found: Invalid = {}
            full: str | None = None
            try:
                for group in plan(rollouts_N, self.tokens_per_micro_batch):
                    self._micro_batch(group, evidence, weights, tally, found)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                full = str(error).splitlines()[0]
            if full is not None:  # outside the except block: the error holds the tensors of the frames it came from
                self._take_less(rollouts_N, full)
                continue
            if not _adds(found, invalid):
                return tally.metrics(rollouts_N, invalid), tally
            for key, mask_T in found.items():
                invalid[key] = invalid.get(key, np.zeros_like(mask_T)) | mask_T

    def _take_less(self, rollouts_N: Sequence[Rollout], said: str) -> None:
        """Halves micro-batches, and then tiles, until a single short tile of the longest answer does not fit."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        longest = max(len(r.prompt.ids) + len(r.response_ids) for r in rollouts_N)
        padded = len(rollouts_N) * longest
        if self.tokens_per_micro_batch > longest:
            self.tokens_per_micro_batch = max(longest, min(self.tokens_per_micro_batch, padded) // 2)
            what = f"learner.tokens_per_micro_batch goes down to {self.tokens_per_micro_batch}"
        elif self.chunk_tokens > SMALLEST_CHUNK:
            self.chunk_tokens = max(SMALLEST_CHUNK, self.chunk_tokens // 2)
            what = f"learner.chunk_tokens goes down to {self.chunk_tokens}"
        else:
            raise ModelError(
                f"out of memory with one answer of {longest} tokens in a micro-batch and {self.chunk_tokens} tokens in "
                f"a tile ({said}). Shorten answers (sampling.max_tokens), set student.gradient_checkpointing=true, "
                "train an adapter (student.lora), or take a smaller model."
            )
        if self._on_less is not None:
            self._on_less(f"out of memory: {what}; the gradient stays the same")

    def _micro_batch(
        self,
        group: list[Rollout],
        evidence: EvidenceHandle | None,
        weights: TermWeights,
        tally: Tally,
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
            chunk_tokens=self.chunk_tokens,
        )
        loss.backward()
        tally.add(loss.detach(), values, batch, scorer)

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
        lr = learning_rate(self._optim, self.updates, self._total_updates)
        metrics |= {"grad_norm": norm, "lr": lr}
        applied = bool(np.isfinite(norm) and np.isfinite(metrics["loss"]))
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.bad_in_a_row = 0
            self.updates += 1
        else:
            self.bad_in_a_row += 1
            self.bad_in_all += 1
            if self._on_bad_step is not None:
                facts = {"loss": metrics["loss"], "grad_norm": norm, "lr": lr, "rollouts": [r.id for r in rollouts_N]}
                self._on_bad_step(self.step + 1, facts)
        metrics["bad_steps"] = float(self.bad_in_all)
        self.optimizer.zero_grad(set_to_none=True)
        return applied


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused memory. torch says it of CUDA with a class, of the host in words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
