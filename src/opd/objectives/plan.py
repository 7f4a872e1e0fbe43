"""One step of the objective, from all of its answers; and its rows for one micro-batch, as the kernel reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.config.alignments import ALM, Gold, Span
from opd.config.objective import DivergenceTerm, OutcomeTerm, Term
from opd.config.slots import Credit, Full, NoImportance, PPOClip, Tokens
from opd.objectives.credit import future_credit
from opd.objectives.importance import known_ratio, prefix_weight, weighting
from opd.objectives.kernels.rows import KnownRows, SpanRows, TermRows, TokenValues
from opd.objectives.spans import Told, before_last, span_rows, told
from opd.objectives.transfer import onto
from opd.types import Batch

_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True)
class PlannedTerm:
    """One term in one step, by rollout id; only answers that the term reads are there.

    kept        bool [T]: the tokens it trains.
    weight      of each kept token: coefficient x share in the term's mean.
    mix         scorer to c_k.
    advantage   of graded answers, for outcome terms.
    right       verdicts, for verifier-gated shapes; None for others.
    lost        rule to the number of tokens that it took away.
    read        tokens of all answers that the term reads.
    span        int64 [T]: the span of each token, of terms that take spans as one; None for others.
    """

    term: Term
    kept: Mapping[str, NDArray[np.bool_]]
    weight: Mapping[str, float]
    mix: Mapping[str, Mapping[str, float]]
    advantage: Mapping[str, float]
    right: Mapping[str, bool] | None
    lost: Mapping[str, int]
    read: int
    span: Mapping[str, NDArray[np.int64]] | None = None

    def trained(self, batch: Batch) -> Tensor:
        """bool [T]: the tokens of a micro-batch that the term trains."""
        return onto(self.trains(batch), batch.token_T.device)

    def trains(self, batch: Batch) -> NDArray[np.bool_]:
        """The same on the host."""
        return np.concatenate([self.kept.get(r.id, np.zeros(len(r.mask), np.bool_)) for r in batch.rollouts])

    def spans(self, batch: Batch) -> SpanRows | None:
        """The spans of a micro-batch that the term trains; None where tokens do not depend on each other."""
        if self.span is None:
            return None
        pieces = [self.span.get(r.id, np.full(len(r.mask), -1, np.int64)) for r in batch.rollouts]
        return span_rows(self.trains(batch), pieces)


@dataclass(frozen=True)
class StepPlan:
    """What all terms train in a step; the same for every cut into micro-batches."""

    step: int
    terms: tuple[PlannedTerm, ...]

    def here(self, batch: Batch) -> list[PlannedTerm]:
        """The terms that train a token of this micro-batch."""
        ids = [r.id for r in batch.rollouts]
        return [p for p in self.terms if any(p.kept[key].any() for key in ids if key in p.kept)]

    def rows(
        self,
        batch: Batch,
        look: TokenValues | None = None,
        *,
        proximal_T: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> list[TermRows]:
        """The rows of the terms that train a token of this micro-batch.

        look        what `tiled_look` gave for `rows(batch)` on the same hidden states, for objectives that look;
                    without it, the rows to look with.
        proximal_T  the student's log-probabilities at the first update on these answers; None: this is it.
        dtype       of the weights: float64 for float64 models.
        """
        return [self._rows(p, batch, look, proximal_T, dtype) for p in self.here(batch)]

    def looks(self, batch: Batch, dtype: torch.dtype = torch.float32) -> list[TermRows]:
        """The rows of a look at the whole step: for every term that selects tokens by divergence, its divergence over
        the whole vocabulary, whatever its own support is."""
        rows = []
        for p in self.here(batch):
            if p.term.tokens.select is not None and p.term.tokens.select.by != "entropy":
                made = self._rows(p, batch, None, None, dtype)
                whole = {"support": Full(), "credit": Credit(), "importance": NoImportance(), "tokens": Tokens()}
                term = p.term.model_copy(update={**whole, "advantage_under": "student"})
                weight_T = p.trained(batch).to(dtype)  # the coefficient may be 0 in this step
                assert made.known is not None
                known = replace(made.known, trained_T=p.trains(batch))
                rows.append(replace(made, term=term, weight_T=weight_T, extra_T=None, known=known))
        return rows

    def ratios(self, batch: Batch, look: TokenValues | None, proximal_T: Tensor | None = None) -> dict[str, Tensor]:
        """Term name to [T], the importance weight that is part of `weight_T` already: of whole answers, or frozen."""
        found: dict[str, Tensor] = {}
        for p in self.here(batch):
            if look is not None and (ratio_T := _ratio(p, batch, look, proximal_T)) is not None:
                found[p.term.name] = ratio_T
        return found

    def metrics(self) -> dict[str, float]:
        """`term/NAME/tokens`, and `term/NAME/masked/RULE` as shares of all tokens of the answers it reads."""
        numbers: dict[str, float] = {}
        for p in self.terms:
            numbers[f"term/{p.term.name}/tokens"] = float(sum(mask.sum() for mask in p.kept.values()))
            for rule, count in p.lost.items():
                numbers[f"term/{p.term.name}/masked/{rule}"] = count / max(p.read, 1)
        return numbers

    def _rows(
        self,
        p: PlannedTerm,
        batch: Batch,
        look: TokenValues | None,
        proximal_T: Tensor | None,
        dtype: torch.dtype,
    ) -> TermRows:
        term, trained_T, right, device = p.term, p.trained(batch), p.right, batch.token_T.device
        weights_T = np.where(p.trains(batch), _over_tokens(batch, lambda key: p.weight.get(key, 0.0)), 0.0)
        whole_T = onto(weights_T, device)
        weight_T, extra_T, known = whole_T, None, True
        spans, value_T = p.spans(batch), None
        if isinstance(term, OutcomeTerm):
            extra_T = _spread(batch, lambda key: p.advantage.get(key, 0.0), dtype)
        if look is not None:
            if isinstance(term, DivergenceTerm) and has_credit(term):
                extra_T = _future(term, batch, look, trained_T)
            if isinstance(term, DivergenceTerm) and spans is not None:
                extra_T, value_T = _spans(p, term, spans, batch, look, proximal_T)
            if (ratio_T := _ratio(p, batch, look, proximal_T)) is not None:
                weight_T, known = weight_T * ratio_T, False
            if isinstance(term, DivergenceTerm) and (gamma := term.tokens.importance_of_prefix) > 0:
                target_T = _looked(look.terms[term.name].target_T, look)
                seen_T = trained_T & ~target_T.isnan()  # a gate has shut the others
                known = False
                weight_T = weight_T * prefix_weight(target_T - look.logprob_T, seen_T, _lengths(batch), gamma)
        names = sorted({name for r in batch.rollouts for name in p.mix.get(r.id, ())})
        mix = {n: _over_tokens(batch, lambda key, n=n: p.mix.get(key, {}).get(n, 0.0), dtype) for n in names}
        return TermRows(
            term=term if look is None else _for_kernel(term),
            weight_T=torch.where(whole_T == 0, 0.0, weight_T).to(dtype),
            mix={n: onto(c_T, device) for n, c_T in mix.items()},
            unit=bool(names) and all(list(p.mix[r.id].values()) == [1.0] for r in batch.rollouts if r.id in p.mix),
            extra_T=extra_T,
            right_T=None if right is None else _spread(batch, lambda key: float(right.get(key, False)), dtype) > 0,
            known=KnownRows(weights_T.astype(_NUMPY[dtype]) != 0 if known else None, mix),
            spans=spans,
            value_T=value_T,
        )


def _for_kernel(term: Term) -> Term:
    """The term without what its rows hold already: the ratio of whole answers, and what a token's span pulls it by."""
    rule = weighting(term)
    if not isinstance(rule, NoImportance) and rule.level == "sequence":
        term = term.model_copy(update={"importance": NoImportance()})
    if isinstance(term, DivergenceTerm) and isinstance(term.alignment, Span | ALM):
        term = term.model_copy(update={"credit": term.credit.model_copy(update={"now": False})})
    return term


def _spans(
    p: PlannedTerm, term: DivergenceTerm, spans: SpanRows, batch: Batch, look: TokenValues, proximal_T: Tensor | None
) -> Told:
    """What the tokens of spans are pulled by, from what a look saw."""
    seen, nothing_T = look.terms[term.name], torch.zeros_like(look.logprob_T)
    if isinstance(term.alignment, Gold):
        return Told(nothing_T if seen.pull_T is None else before_last(spans, seen.pull_T), None)
    if seen.target_T is None:
        return Told(nothing_T, nothing_T)
    bases = {"student": look.logprob_T, "sampler": batch.behaviour_T.to(look.logprob_T.dtype), "proximal": proximal_T}
    base_T = bases[term.advantage_under]
    right = p.right
    return told(
        term,
        spans,
        base_T=look.logprob_T if base_T is None else base_T.to(look.logprob_T.dtype),
        target_T=seen.target_T,
        right_T=None if right is None else _spread(batch, lambda key: float(right.get(key, False)), torch.float64) > 0,
    )


def has_credit(term: Term) -> bool:
    """Whether drawn tokens answer for what comes after them."""
    return isinstance(term, DivergenceTerm) and (term.credit.discount > 0 or not term.credit.now)


def _future(term: DivergenceTerm, batch: Batch, look: TokenValues, trained_T: Tensor) -> Tensor:
    f_T, credit = _looked(look.terms[term.name].f_T, look), term.credit
    seen_T = trained_T & ~f_T.isnan()  # a gate has shut the others: not trained, they give no credit
    return future_credit(f_T, seen_T, _lengths(batch), discount=credit.discount, length_norm=credit.length_norm)


def _looked(values_T: Tensor | None, look: TokenValues) -> Tensor:
    """[T]: what a look saw of a term; NaN at every token where the term had no weight at any of them."""
    return torch.full_like(look.logprob_T, torch.nan) if values_T is None else values_T


def _ratio(p: PlannedTerm, batch: Batch, look: TokenValues, proximal_T: Tensor | None) -> Tensor | None:
    term, rule, trained_T = p.term, weighting(p.term), p.trained(batch)
    strength_T = None
    if isinstance(rule, PPOClip) and rule.level == "sequence":
        if isinstance(term, OutcomeTerm):
            strength_T = _spread(batch, lambda key: p.advantage.get(key, 0.0), look.logprob_T.dtype)
        else:
            assert isinstance(term, DivergenceTerm)
            strength_T = torch.zeros_like(look.logprob_T)
            if has_credit(term):
                strength_T = _future(term, batch, look, trained_T)
            if (spans := p.spans(batch)) is not None:
                strength_T = _spans(p, term, spans, batch, look, proximal_T).extra_T
            elif term.credit.now:
                strength_T = strength_T + _looked(look.terms[term.name].h_T, look)
    return known_ratio(
        rule,
        logprob_T=look.logprob_T,
        behaviour_T=batch.behaviour_T,
        proximal_T=proximal_T,
        strength_T=strength_T,
        trained_T=trained_T,
        row_T=batch.row_T,
        rows=len(batch.rollouts),
    )


def _lengths(batch: Batch) -> list[int]:
    return [len(r.response_ids) for r in batch.rollouts]


def _spread(batch: Batch, value: Callable[[str], float], dtype: torch.dtype) -> Tensor:
    """[T]: a number of every rollout of the micro-batch at each of its tokens."""
    return onto(_over_tokens(batch, value, dtype), batch.token_T.device)


def _over_tokens(
    batch: Batch, value: Callable[[str], float], dtype: torch.dtype = torch.float64
) -> NDArray[np.floating]:
    """The same on the host."""
    return np.repeat(np.array([value(r.id) for r in batch.rollouts], _NUMPY[dtype]), _lengths(batch))
