"""What a step saw at its tokens: sums for metrics and every token's numbers, read from the device at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ReverseKL
from opd.config.slots import Full, NoImportance
from opd.learner.diagnostics import Diagnostics
from opd.learner.evidence import Invalid, read_and_valid
from opd.objectives.importance import clipped, weighting
from opd.objectives.kernels.rows import TermRows, TokenValues
from opd.objectives.plan import PlannedTerm, StepPlan
from opd.objectives.transfer import onto
from opd.types import Batch, Rollout, ScorerRows, TokenScores


class Tally:
    """Filled micro-batch by micro-batch; `metrics`, `scores` and `logprobs` read it.

    diagnostics   filled beside it on the steps that ask for them.
    """

    def __init__(self, diagnostics: Diagnostics | None = None) -> None:
        self.diagnostics = diagnostics
        self._sums: dict[str, list[Tensor]] = {}
        self._rollouts: list[Rollout] = []
        self._tokens: list[Tensor] = []

    def add(
        self,
        loss: Tensor,
        values: TokenValues,
        batch: Batch,
        planned: Sequence[PlannedTerm],
        rows: Sequence[TermRows],
        ratios: Mapping[str, Tensor],
        scorers: Sequence[ScorerRows],
    ) -> None:
        """One micro-batch. `planned` and `rows` are the same terms; `ratios` are weights that `rows` hold already."""
        trained = {p.term.name: p.trained(batch) for p in planned}
        any_T = torch.zeros_like(batch.mask_T)
        for trained_T in trained.values():
            any_T = any_T | trained_T
        self._append("loss", loss)
        self._rollouts += batch.rollouts
        for name in ("entropy", "student_logprob"):
            self._mean(name, values.entropy_T if name == "entropy" else values.logprob_T, any_T)
        self._append("trained", any_T.sum())
        for p in planned:
            self._term(p, values, trained[p.term.name], ratios.get(p.term.name))
        for scorer in scorers:
            self._scorer(scorer, values, batch, any_T)
        target_T, kl_T = _first_target(planned, rows, values, trained)
        self._mean("reverse_kl", kl_T, any_T)
        self._policy_gap(values, batch, any_T)
        nothing_T = torch.full_like(values.logprob_T, torch.nan)
        seen = [torch.where(any_T, x, nothing_T) for x in (values.logprob_T, target_T, kl_T)]
        self._tokens.append(torch.stack([*seen, values.logprob_T]))
        if self.diagnostics is not None:
            self.diagnostics.add(values, batch, planned, trained, scorers, kl_T)

    def add_look(self, values: TokenValues, batch: Batch) -> None:
        """A micro-batch of which nothing is trained, but whose log-probabilities are needed in a later update."""
        self._rollouts += batch.rollouts
        nothing_T = torch.full_like(values.logprob_T, torch.nan)
        self._tokens.append(torch.stack([nothing_T, nothing_T, nothing_T, values.logprob_T]))

    def metrics(self, rollouts_N: Sequence[Rollout], plan: StepPlan, invalid: Invalid) -> dict[str, float]:
        """Plain numbers; a key that has nothing to say is left out.

        loss                            the objective: the weighted sum of all terms
        entropy, student_logprob        of the student, and of the drawn tokens under it: means per trained token
        reverse_kl                      KL(student || target) of the first divergence term that trains a token; of drawn
                                        tokens log p - log q~ where the whole vocabulary is not looked at
        term/NAME                       mean value of a term over the tokens that it trains
        term/NAME/ess, .../clipped      effective sample size of its importance weights as a share of its tokens, and
                                        the share of them that its rule changed
        term/NAME/open                  share of them at which its gate (tokens.where) is open; the others are trained
                                        with weight 0, and stay in its mean
        term/NAME/student_mass, ...     mass of student and target on the top k; share of tokens with an unresolved tail
        term/NAME/tokens, .../masked/   tokens it trains, and shares that a rule took away, see `StepPlan.metrics`
        scorer/NAME/reverse_kl, logprob KL(student || scorer), as above, and log-probability of the drawn tokens, over
                                        the trained tokens that it read
        scorer/NAME/spread              standard deviation of that log-probability
        scorer/NAME/invalid             tokens about which it said nothing usable
                                        (of scorers with another tokenizer more in `learner.evidence.coverage`)
        trained_tokens, masked_tokens   trained by any term, and the others
        policy_gap, policy_gap_max      |log p now - log p when drawn| of the student's own tokens: 0 when on-policy
                                        and drawn from the whole distribution at the objective's temperature
        """
        read = self._read()
        sums = {key: total for key, (total, *_) in read.items() if "!" not in key}
        trained = sums.pop("trained", 0.0)
        metrics = {"loss": sums.pop("loss", 0.0)}
        for key, total in sums.items():
            if key.endswith("#"):
                continue
            if count := sums.get(f"{key}#", 0.0):
                metrics[key] = total / count
        metrics |= _effective(read) | _spreads(read)
        metrics |= plan.metrics()
        metrics["trained_tokens"] = trained
        metrics["masked_tokens"] = float(sum(len(r.mask) for r in rollouts_N)) - trained
        lost = {name: float(sum(mask.sum() for mask in by_id.values())) for name, by_id in invalid.items()}
        metrics |= {f"scorer/{name}/invalid": count for name, count in lost.items()}
        metrics["invalid_scores"] = sum(lost.values())
        if "policy_gap" in metrics:
            metrics["policy_gap_max"] = read["policy_gap_max!"][0]
        return metrics | (self.diagnostics.metrics() if self.diagnostics is not None else {})

    def scores(self) -> dict[str, TokenScores]:
        """Rollout id to what was seen at its tokens."""
        names = ("student_logprobs", "teacher_logprobs", "reverse_kl")
        return {
            key: TokenScores(**dict(zip(names, piece_4T[:3].astype(np.float32), strict=True)))
            for key, piece_4T in self._pieces().items()
        }

    def logprobs(self) -> dict[str, NDArray[np.floating]]:
        """Rollout id to the student's log-probabilities of its tokens, masked ones as well."""
        return {key: piece_4T[3].copy() for key, piece_4T in self._pieces().items()}

    def _pieces(self) -> dict[str, NDArray[np.floating]]:
        if not self._tokens:
            return {}
        columns_4T = torch.cat(self._tokens, dim=1).cpu().numpy()
        ends = np.cumsum([len(rollout.response_ids) for rollout in self._rollouts])[:-1]
        pieces = np.split(columns_4T, ends, axis=1)
        return {r.id: piece for r, piece in zip(self._rollouts, pieces, strict=True)}

    def _term(self, p: PlannedTerm, values: TokenValues, trained_T: Tensor, known_T: Tensor | None) -> None:
        name, seen = f"term/{p.term.name}", values.terms[p.term.name]
        self._mean(name, seen.value_T, trained_T)
        for fact in ("student_mass", "target_mass", "unresolved"):
            if (fact_T := getattr(seen, f"{fact}_T")) is not None:
                self._mean(f"{name}/{fact}", fact_T, trained_T & ~seen.value_T.isnan())
        zero_T = torch.zeros_like(trained_T) if known_T is None else known_T == 0
        if p.term.tokens.where is not None and any(p.weight.values()):
            self._mean(f"{name}/open", (~seen.value_T.isnan()).to(seen.value_T.dtype), trained_T & ~zero_T)
        rule = weighting(p.term)
        if isinstance(rule, NoImportance):
            return
        made_T = seen.ratio_T.masked_fill(zero_T, 0.0)  # with weight 0 the pass says nothing
        weighed_T = trained_T & ~made_T.isnan()  # the others a gate has shut, or the coefficient is 0
        ratio_T = made_T if known_T is None else made_T * known_T
        used_T = torch.where(weighed_T, ratio_T, 0.0).double()
        self._append(f"{name}!weights", torch.stack([used_T.sum(), used_T.square().sum(), weighed_T.sum().double()]))
        held_T = ratio_T if rule.level == "sequence" else made_T
        self._mean(f"{name}/clipped", clipped(rule, held_T).to(ratio_T.dtype), weighed_T)

    def _read(self) -> dict[str, list[float]]:
        """Every key over all micro-batches, from the device in one piece."""
        parts = {}
        for key, values in self._sums.items():
            values_M = torch.stack(values)
            parts[key] = (values_M.max() if key.endswith("_max!") else values_M.sum(0)).double().reshape(-1)
        left = iter(torch.cat(list(parts.values())).tolist() if parts else [])
        return {key: [next(left) for _ in range(len(part))] for key, part in parts.items()}

    def _scorer(self, scorer: ScorerRows, values: TokenValues, batch: Batch, any_T: Tensor) -> None:
        read_T, valid_T = read_and_valid(batch, scorer)
        seen_T, seen = any_T & read_T & valid_T, values.scorers[scorer.name]
        kl_T = seen.reverse_kl_T
        if seen.logprob_T is not None:
            self._mean(f"scorer/{scorer.name}/logprob", seen.logprob_T, seen_T)
            finite_T = seen_T & torch.isfinite(seen.logprob_T)
            logprob_T = torch.where(finite_T, seen.logprob_T, 0.0).double()
            sums = torch.stack([logprob_T.sum(), logprob_T.square().sum(), finite_T.sum().double()])
            self._append(f"scorer/{scorer.name}!spread", sums)
            kl_T = values.logprob_T - seen.logprob_T if kl_T is None else kl_T
        if kl_T is not None:
            self._mean(f"scorer/{scorer.name}/reverse_kl", kl_T, seen_T)

    def _policy_gap(self, values: TokenValues, batch: Batch, any_T: Tensor) -> None:
        own = np.repeat([r.behaviour == "student" for r in batch.rollouts], [len(r.mask) for r in batch.rollouts])
        own_T = any_T & onto(own, any_T.device) & torch.isfinite(batch.behaviour_T)
        gap_T = torch.where(own_T, values.logprob_T - batch.behaviour_T, 0.0).abs()
        self._mean("policy_gap", gap_T, own_T)
        self._append("policy_gap_max!", gap_T.max())

    def _mean(self, name: str, value_T: Tensor, of_T: Tensor) -> None:
        """A mean over the tokens `of_T` of the whole step; NaN says that there is nothing to say."""
        of_T = of_T & ~torch.isnan(value_T)
        self._append(name, torch.where(of_T, value_T, 0.0).double().sum())
        self._append(f"{name}#", of_T.sum().double())

    def _append(self, name: str, value: Tensor) -> None:
        self._sums.setdefault(name, []).append(value)


def _effective(read: Mapping[str, list[float]]) -> dict[str, float]:
    """Effective sample sizes of importance weights, as shares of their tokens."""
    found = {}
    for key, numbers in read.items():
        if key.endswith("!weights") and numbers[2]:
            total, squared, count = numbers
            found[f"{key.removesuffix('!weights')}/ess"] = total**2 / (count * squared) if squared else 0.0
    return found


def _spreads(read: Mapping[str, list[float]]) -> dict[str, float]:
    """Standard deviations of scorers' log-probabilities."""
    found = {}
    for key, numbers in read.items():
        if key.endswith("!spread") and numbers[2]:
            total, squared, count = numbers
            found[f"{key.removesuffix('!spread')}/spread"] = math.sqrt(max(squared / count - (total / count) ** 2, 0.0))
    return found


def _first_target(
    planned: Sequence[PlannedTerm], rows: Sequence[TermRows], values: TokenValues, trained: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """[T] each: log q~ of the drawn token, and the reverse KL from q~, of the first divergence term that trains it."""
    target_T = torch.full_like(values.logprob_T, torch.nan)
    kl_T = target_T.clone()
    open_T = torch.ones_like(values.logprob_T, dtype=torch.bool)
    for p, row in zip(planned, rows, strict=True):
        seen = values.terms[p.term.name]
        if not isinstance(p.term, DivergenceTerm) or seen.target_T is None:
            continue
        here_T = open_T & trained[p.term.name] & ~seen.target_T.isnan()
        target_T = torch.where(here_T, seen.target_T, target_T)
        kl_T = torch.where(here_T, _reverse_kl(p.term, row, values, seen.target_T), kl_T)
        open_T = open_T & ~here_T
    return target_T, kl_T


def _reverse_kl(term: DivergenceTerm, row: TermRows, values: TokenValues, target_T: Tensor) -> Tensor:
    """[T]: over the vocabulary where anything has it, else of the drawn token."""
    if isinstance(term.shape, ReverseKL) and isinstance(term.support, Full):
        return values.terms[term.name].value_T
    kl_T = values.logprob_T - target_T
    parts_T = torch.stack([c_T != 0 for c_T in row.mix.values()]).sum(0)  # `row.unit` speaks of the micro-batch
    for name, c_T in row.mix.items():
        if (whole_T := values.scorers[name].reverse_kl_T if name in values.scorers else None) is not None:
            kl_T = torch.where((c_T == 1) & (parts_T == 1) & ~torch.isnan(whole_T), whole_T, kl_T)
    return kl_T
