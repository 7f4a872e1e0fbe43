"""The student changes: one update from rollouts, lazily pulled evidence and an objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.schema import Learner as LearnerSpec
from opd.config.schema import Optim
from opd.errors import ModelError, NothingToTrain, TrainingDiverged
from opd.learner.diagnostics import Diagnostics
from opd.learner.evidence import Findings, Invalid, coverage, merge
from opd.learner.optim import learning_rate, make_optimizer
from opd.learner.tally import Tally
from opd.models.answer_states import answer_states, can_share
from opd.models.causal import CausalLM
from opd.models.packing import pack, plan
from opd.models.weights import ModuleWeights
from opd.objectives.freed_memory import give_back_freed_memory
from opd.objectives.head import top_tokens
from opd.objectives.kernels.choice import choose_kernel
from opd.objectives.kernels.rows import TermRows, TokenRows, TokenValues
from opd.objectives.objective import Objective
from opd.objectives.plan import StepPlan
from opd.objectives.selection import TokenLook
from opd.objectives.transfer import onto
from opd.protocols import EvidenceHandle
from opd.types import Batch, Rollout, ScorerRows, StepReport, Want

Logprobs = Mapping[str, NDArray[np.floating]]  # rollout id to [T]
SMALLEST_CHUNK = 16  # tokens in a tile, below which less memory is not worth the time


@dataclass(frozen=True)
class _Pass:
    """One pass over a step's answers, made of micro-batches.

    wants      scorer to what is asked of it.
    plan       what every term trains.
    proximal   the student's log-probabilities at the first update on these answers; None: this is it.
    found      noted are tokens that scorers said nothing usable about.
    named      how many of the student's most likely tokens scorers must be told of.
    """

    evidence: EvidenceHandle | None
    wants: Mapping[str, Want]
    plan: StepPlan
    proximal: Logprobs | None
    tally: Tally
    found: Findings
    named: int


class LocalLearner:
    """Trains a model that lives in this process.

    step                    passes of the loop so far.
    tokens_per_micro_batch  as configured, or less after the device ran out of memory; no result depends on it.
    chunk_tokens            likewise.
    kernel                  what makes the pass over the vocabulary; no result depends on it beyond rounding.

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
        self.kernel = choose_kernel(spec.kernel, model.device)
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

        A step whose loss or gradient is not finite, or that has no token to train, changes nothing, is counted and
        reported; too many in a row raise TrainingDiverged. NothingToTrain before the first update of a run: then it is
        probably the config.
        """
        applied, metrics, tally = False, {}, Tally()
        proximal: Logprobs | None = None
        every, last = self._spec.diagnostics_every, self._spec.updates_per_batch - 1
        try:
            for n in range(self._spec.updates_per_batch):
                closer = n == last and every > 0 and self.step % every == 0
                metrics, tally = self._accumulate(rollouts_N, evidence, proximal, diagnostics=closer)
                if n == 0 and self._before_change is not None:
                    self._before_change()
                if n == 0 and self.objective.reads_proximal:
                    proximal = tally.logprobs()
                applied = self._apply(rollouts_N, metrics) or applied
        except NothingToTrain as reason:
            if self.updates == 0:
                raise
            metrics = self._nothing(rollouts_N, reason)
        finally:
            if evidence is not None:
                evidence.release()
        if self.model.device.type == "cpu":
            give_back_freed_memory(4 * self.model.head.weight_VD.numel())
        self.step += 1
        report = StepReport(step=self.step, applied=applied, metrics=metrics, scores=tally.scores())
        if self.bad_in_a_row >= self._spec.max_bad_steps:
            raise TrainingDiverged(
                f"{self.bad_in_a_row} updates in a row had a non-finite loss or gradient, or nothing to train "
                f"(learner.max_bad_steps = {self._spec.max_bad_steps}). The weights are those of the last good one. "
                f"Lower optim.lr (now {metrics['lr']:g}), or look at the dumped steps in the run folder.",
                report,
            )
        return report

    def gradients(
        self, rollouts_N: Sequence[Rollout], evidence: EvidenceHandle | None, *, diagnostics: bool = False
    ) -> dict[str, float]:
        """Leaves the step's gradient in the parameters' `.grad`, unclipped, and returns the metrics."""
        return self._accumulate(rollouts_N, evidence, None, diagnostics=diagnostics)[0]

    def _accumulate(
        self,
        rollouts_N: Sequence[Rollout],
        evidence: EvidenceHandle | None,
        proximal: Logprobs | None,
        *,
        diagnostics: bool,
    ) -> tuple[dict[str, float], Tally]:
        """Gradient of the whole step. Evidence turns out invalid only when it is pulled; then denominators were wrong,
        and the pass is made again with these tokens masked from the start. Out of memory, it is made again with
        smaller micro-batches: the same gradient. What a scorer cannot be asked because it reads other tokens is known
        beforehand, and costs no pass."""
        wants = self.objective.wants(rollouts_N)
        spans = {} if evidence is None else evidence.spans()
        named = 0 if evidence is None else evidence.prepare(wants)
        invalid: Invalid = {}
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            tally = Tally(Diagnostics() if diagnostics else None)
            found = Findings(spans)
            full: str | None = None
            whole = self.objective.plan(self.step, rollouts_N, invalid, spans=spans)
            try:
                if self.objective.looks == "step":
                    look = _Pass(evidence, wants, whole, proximal, tally, Findings(spans), named)
                    looks = self._look_at_step(rollouts_N, look)
                    merge(look.found.read(), invalid)
                    whole = self.objective.plan(self.step, rollouts_N, invalid, looks, spans)
                made = _Pass(evidence, wants, whole, proximal, tally, found, named)
                groups = self._groups(rollouts_N)
                if tally.diagnostics is not None:
                    tally.diagnostics.noise.expect(len(groups))
                for group in groups:
                    self._micro_batch(group, made)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                full = str(error).splitlines()[0]
            if full is not None:  # outside the except block: the error holds the tensors of the frames it came from
                self._take_less(rollouts_N, full)
                continue
            if not merge(found.read(), invalid):
                if tally.diagnostics is not None:
                    tally.diagnostics.noise.end(self._trained())
                return tally.metrics(rollouts_N, whole, invalid) | coverage(rollouts_N, wants, spans), tally

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

    def _micro_batch(self, group: list[Rollout], made: _Pass) -> None:
        batch = pack(group, device=self.model.device)
        planned = made.plan.here(batch)
        if not planned and not self.objective.reads_proximal:
            return
        proximal_T = None if made.proximal is None else _flat(batch, made.proximal)
        with torch.set_grad_enabled(bool(planned)):
            batch, hidden_TD, scorers = self._read(batch, made, scored=bool(planned))
        dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
        rows = made.plan.rows(batch, dtype=dtype)
        look: TokenValues | None = None
        if not planned or self.objective.looks_at_batches:
            look = self._look(batch, hidden_TD, rows, scorers, proximal_T)
            if not planned:
                made.tally.add_look(look, batch)
                return
            rows = made.plan.rows(batch, look, proximal_T=proximal_T, dtype=dtype)
        loss, values = self.kernel.loss(
            hidden_TD,
            self.model.head,
            TokenRows(batch.token_T, batch.behaviour_T, proximal_T, batch.student_top_TK),
            rows,
            scorers,
            student_temperature=self.objective.spec.student_temperature,
            chunk_tokens=self.chunk_tokens,
            diagnostics=made.tally.diagnostics is not None,
        )
        if made.tally.diagnostics is None:
            loss.backward()
        else:
            with made.tally.diagnostics.noise.watch(self._trained()):
                loss.backward()
        ratios = made.plan.ratios(batch, look, proximal_T)
        made.tally.add(loss.detach(), values, batch, planned, rows, ratios, scorers)

    def _look_at_step(self, rollouts_N: Sequence[Rollout], made: _Pass) -> dict[str, TokenLook]:
        """What the student thinks of every token of the step, and how far it is from the targets, without gradients."""
        seen: list[tuple[Batch, TokenValues]] = []
        for group in self._groups(rollouts_N):
            batch = pack(group, device=self.model.device)
            rows = made.plan.looks(batch, torch.promote_types(self.model.compute_dtype, torch.float32))
            with torch.no_grad():
                batch, hidden_TD, scorers = self._read(batch, made, scored=bool(rows))
                seen.append((batch, self._look(batch, hidden_TD, rows, scorers, None)))
        columns = [x for _, v in seen for x in (v.entropy_T, *(term.value_T for term in v.terms.values()))]
        read = iter(torch.cat(columns).cpu().split([len(x) for x in columns]))  # one wait, when all are under way
        looks: dict[str, TokenLook] = {}
        for batch, values in seen:
            ends = np.cumsum([len(r.response_ids) for r in batch.rollouts])[:-1]
            entropy = np.split(next(read).numpy(), ends)
            far = {name: np.split(next(read).numpy(), ends) for name in values.terms}
            for n, rollout in enumerate(batch.rollouts):
                looks[rollout.id] = TokenLook(entropy[n], {name: parts[n] for name, parts in far.items()})
        return looks

    def _look(
        self,
        batch: Batch,
        hidden_TD: Tensor,
        rows: Sequence[TermRows],
        scorers: Sequence[ScorerRows],
        proximal_T: Tensor | None,
    ) -> TokenValues:
        return self.kernel.look(
            hidden_TD.detach(),
            self.model.head,
            TokenRows(batch.token_T, batch.behaviour_T, proximal_T, batch.student_top_TK),
            rows,
            scorers,
            student_temperature=self.objective.spec.student_temperature,
            chunk_tokens=self.chunk_tokens,
        )

    def _read(self, batch: Batch, made: _Pass, *, scored: bool) -> tuple[Batch, Tensor, list[ScorerRows]]:
        """The student's states, and what scorers say, who come first: an offloaded one needs the room. A scorer that
        must be told of the student's most likely tokens can only come after."""
        if not (scored and made.named):
            scorers = self._pull(batch, made) if scored else []
            return batch, self._hidden(batch), scorers
        hidden_TD = self._hidden(batch)
        top_TK = top_tokens(hidden_TD, self.model.head, made.named, chunk_tokens=self.chunk_tokens)
        batch = replace(batch, student_top_TK=top_TK)
        return batch, hidden_TD, self._pull(batch, made)

    def _hidden(self, batch: Batch) -> Tensor:
        prompts, answers = [r.prompt.ids for r in batch.rollouts], [r.response_ids for r in batch.rollouts]
        return answer_states(self.model, prompts, answers, share=self._shares, side=self._padding_side)

    @property
    def _shares(self) -> bool:
        return self._spec.share_prompts and can_share(self.model)

    def _groups(self, rollouts_N: Sequence[Rollout]) -> list[list[Rollout]]:
        return plan(rollouts_N, self.tokens_per_micro_batch, share_prompts=self._shares)

    def _pull(self, batch: Batch, made: _Pass) -> list[ScorerRows]:
        ids = {r.id for r in batch.rollouts}
        wants = {name: want for name, want in made.wants.items() if ids & want.rollouts}
        if not wants:
            return []
        assert made.evidence is not None, f"the objective reads {', '.join(wants)}, but the loop gave no evidence"
        scorers = made.evidence.pull(batch, wants)
        made.found.note(batch, scorers)
        return scorers

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.module.parameters() if p.requires_grad]

    def _nothing(self, rollouts_N: Sequence[Rollout], reason: NothingToTrain) -> dict[str, float]:
        """Counts a step that trains nothing; its metrics."""
        if self._before_change is not None:
            self._before_change()
        self.bad_in_a_row += 1
        self.bad_in_all += 1
        if self._on_bad_step is not None:
            self._on_bad_step(self.step + 1, {"why": str(reason), "rollouts": [r.id for r in rollouts_N]})
        return {
            "lr": learning_rate(self._optim, self.updates, self._total_updates),
            "trained_tokens": 0.0,
            "masked_tokens": float(sum(len(r.mask) for r in rollouts_N)),
            "bad_steps": float(self.bad_in_all),
        }

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


def _flat(batch: Batch, by_id: Logprobs) -> Tensor:
    """[T]: numbers of every rollout, in the order of a micro-batch's tokens."""
    return onto(np.concatenate([by_id[r.id] for r in batch.rollouts]), batch.token_T.device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host refused memory. torch says it of CUDA with a class, of the host in words."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
