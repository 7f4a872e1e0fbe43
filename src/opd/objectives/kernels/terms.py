"""What one term of the objective does at the tokens of a block.

    full support       d loss / d z_v = -w p_v (h(r_v) - E_p[h])
    a few entries      as `supports.py` says
    merged spans       as `merged.py` says
    drawn token y      d loss / d z_v = -w s (1[v = y] - p_v)

with the strength s held fixed: rho (h(r_y) - b + extra) for a divergence, rho extra for an outcome, 1 for data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.config.alignments import Gold
from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm
from opd.config.shapes import ReverseKL
from opd.config.slots import Full, NoImportance, PPOClip, Sampled
from opd.objectives.importance import bounded
from opd.objectives.kernels.block import Block
from opd.objectives.kernels.columns import Columns
from opd.objectives.kernels.gradient import BlockGradient
from opd.objectives.kernels.merged import SpansInBlock, merged_field
from opd.objectives.kernels.mixing import Target
from opd.objectives.kernels.rows import TermRows
from opd.objectives.kernels.supports import shared_field, top_k_field
from opd.objectives.shapes import Pair, ShapeMaths, maths


def normalises(term: DivergenceTerm) -> bool:
    """Whether log q~ of a mixture is taken with its normaliser: where the term itself asks for the whole vocabulary at
    every token. What other terms ask of the same scorers must not change it. With a discount it never is: the future
    of a log-linear reward has no normaliser in it."""
    exact = term.credit.baseline == "exact" and term.credit.discount == 0
    return not isinstance(term.support, Sampled) or exact


class TermOnBlock:
    """One term at the tokens of a block that it trains: [K] of the block's [B]."""

    def __init__(self, rows: TermRows, block: Block, gradient: BlockGradient | None, columns: Columns) -> None:
        weight_B = block.weight(rows)
        self.rows, self.block, self.gradient, self.columns = rows, block, gradient, columns
        self.kept = block.kept(rows, weight_B)
        self._weight_B, self.weight_K = weight_B, self.kept.of(weight_B)
        self.drawn_K = self.kept.of(block.drawn_B)

    def run(self) -> Tensor:
        """The weighted sum of the term's values; its field goes to the gradient, its facts to the columns."""
        if len(self.kept) == 0:
            return self.weight_K.sum()
        term = self.rows.term
        if isinstance(term, DataTerm):
            value_K = self._pull(term, torch.ones_like(self.drawn_K), value_K=-self.drawn_K)
        elif isinstance(term, OutcomeTerm):
            assert self.rows.extra_T is not None, f"the outcome term {term.name} needs its advantage (extra_T)"
            value_K = self._pull(term, self._of(self.rows.extra_T))
        else:
            value_K = self._merged(term, term.alignment) if isinstance(term.alignment, Gold) else self._divergence(term)
        if self.rows.value_T is not None:
            value_K = self._of(self.rows.value_T)
        self._put(value_T=value_K)
        return (self.weight_K * value_K).sum()

    def _divergence(self, term: DivergenceTerm) -> Tensor:
        target = self.block.target(self.rows)
        right_T = self.rows.right_T
        right_K = None if right_T is None else self.kept.of(self.block.of(right_T))
        wide = maths(term.shape, None if right_K is None else right_K[:, None])
        narrow = maths(term.shape, right_K)
        whole = not isinstance(term.support, Sampled)
        logq_K = self.kept.among(target.rows, target.drawn(normalised=normalises(term))).to(self.drawn_K.dtype)
        h_K, f_K = self._at_drawn(term, narrow, logq_K)
        self._put(h_T=h_K, f_T=f_K, target_T=logq_K)
        if isinstance(term.support, Full):
            return self._full(term, wide, target)
        if whole:
            return self._top_k(term, wide, target, h_K)
        strength_K = h_K if term.credit.now else torch.zeros_like(h_K)
        if term.credit.now and term.credit.baseline == "exact":
            strength_K = strength_K - self._mean_h(term, wide, target)
        if self.rows.extra_T is not None:
            strength_K = strength_K + self._of(self.rows.extra_T)
        return self._pull(term, strength_K)

    def _merged(self, term: DivergenceTerm, alignment: Gold) -> Tensor:
        """Spans are compared at their last tokens; those before are pulled by what the look has seen there."""
        block, spans = self.block, SpansInBlock(self.rows, self.block)
        before_K, value_B, right_T = spans.before(self.columns), torch.zeros_like(block.drawn_B), self.rows.right_T
        for name, c_T in self.rows.known_mix.items():
            mine_B = spans.last_B & (block.known(c_T) != 0)
            rows, reading = block.subset(mine_B), block.readings[name]
            if len(rows) == 0:
                continue
            shape = maths(term.shape, None if right_T is None else rows.of(block.of(right_T))[:, None])
            mine_before_K = rows.among(spans.last, before_K)
            field = merged_field(alignment, shape, rows.of(block.logp_BV), mine_before_K, reading, rows)
            if self.gradient is not None:
                self.gradient.field(rows, field.h_mass_KV, field.pull_K, rows.of(self._weight_B))
            rows.write_to(value_B, 0, field.value_K)
            self.columns.put("term", term.name, block.start, rows, pull_T=field.pull_K)
            tokens, share_M = spans.each(rows.among(reading.rows, reading.drawn_R), mine_B)
            self.columns.put("term", term.name, spans.start, tokens, target_T=share_M)
            if reading.foreign:  # the others are noted where all readings are
                self.columns.put("scorer", name, spans.start, tokens, logprob_T=share_M)
        if self.gradient is not None and self.rows.extra_T is not None:
            before = block.subset(block.known(self.rows.trained_T) & ~spans.last_B)
            extra_K = before.of(block.of(self.rows.extra_T)).to(value_B.dtype)
            self.gradient.drawn(before, before.of(self._weight_B) * extra_K)
        self._put(ratio_T=torch.ones_like(self.drawn_K))
        return self.kept.of(value_B)

    def _full(self, term: DivergenceTerm, shape: ShapeMaths, target: Target) -> Tensor:
        if target.foreign:
            return self._shared(term, shape, target)
        h_mass_KV, mean_K, value_K = shape.field(self._pair(target))
        if self.gradient is not None:
            self.gradient.field(self.kept, h_mass_KV, mean_K, self.weight_K)
        if isinstance(term.shape, ReverseKL) and target.single is not None:
            target.single.reverse_kl = (self.kept, value_K)
        self._put(ratio_T=torch.ones_like(value_K))
        return value_K

    def _shared(self, term: DivergenceTerm, shape: ShapeMaths, target: Target) -> Tensor:
        """The same for a target that lacks some of the student's tokens."""
        field = shared_field(shape, self._pair(target), target.partial(self.kept))
        if self.gradient is not None:
            self.gradient.field(self.kept, field.h_mass_KV, field.mean_K, self.weight_K)
        if isinstance(term.shape, ReverseKL) and target.single is not None:
            target.single.reverse_kl = (self.kept, field.value_K)
        self._put(student_mass_T=field.student_mass_K, target_mass_T=field.target_mass_K)
        self._put(unresolved_T=field.unresolved_K, ratio_T=torch.ones_like(field.value_K))
        return field.value_K

    def _mean_h(self, term: DivergenceTerm, shape: ShapeMaths, target: Target) -> Tensor:
        """E_p[h]."""
        return shape.field(self._pair(target))[1]

    def _top_k(self, term: DivergenceTerm, shape: ShapeMaths, target: Target, h_K: Tensor) -> Tensor:
        assert not isinstance(term.support, Full | Sampled)
        pair = self._pair(target)
        named_BK = self.block.student_top_BK
        named_KS = None if named_BK is None else self.kept.of(named_BK)
        partial = None
        if target.foreign:
            theirs = None if term.support.kind == "student_top_k" else term.support.k
            partial = target.partial(self.kept, theirs)
        field = top_k_field(term.support, shape, pair.p, pair.logp, pair.q, pair.logq, named_KS, partial)
        self._put(student_mass_T=field.student_mass_K, target_mass_T=field.target_mass_K)
        self._put(unresolved_T=field.unresolved_K)
        if self.gradient is not None:
            self.gradient.top_k(self.kept, field, self.weight_K)
        if term.support.tail != "sampled_correction":
            self._put(ratio_T=torch.ones_like(field.value_K))
            return field.value_K
        assert field.tail_h_K is not None
        in_tail_K = ~field.entries.holds(self.kept.of(self.block.token_B))
        self._pull(term, torch.where(in_tail_K, h_K - field.tail_h_K, 0.0))
        return field.value_K

    def _at_drawn(self, term: DivergenceTerm, shape: ShapeMaths, logq_K: Tensor) -> tuple[Tensor, Tensor]:
        """h(r) and f(r) of the drawn token."""
        then = {"student": self.block.drawn_B, "sampler": self.block.behaviour_B, "proximal": self.block.proximal_B}
        base_K = self.kept.of(then[term.advantage_under])
        return shape.h(base_K, logq_K), shape.f(base_K, logq_K)

    def _pull(
        self, term: DivergenceTerm | OutcomeTerm | DataTerm, strength_K: Tensor, value_K: Tensor | None = None
    ) -> Tensor:
        """A policy gradient of the drawn token; returns the value of its surrogate."""
        ratio_K, bound_K = torch.ones_like(strength_K), None
        if not isinstance(term, DataTerm):
            ratio_K, bound_K = self._ratio(term, strength_K)
        if self.gradient is not None:
            self.gradient.drawn(self.kept, self.weight_K * strength_K * ratio_K)
        self._put(ratio_T=ratio_K)
        return -strength_K * (ratio_K if bound_K is None else bound_K) if value_K is None else value_K

    def _ratio(self, term: DivergenceTerm | OutcomeTerm, strength_K: Tensor) -> tuple[Tensor, Tensor | None]:
        """The importance weight; and PPO's clipped ratio, which its value has where its gradient has stopped."""
        rule = term.importance
        if isinstance(rule, NoImportance) or rule.level == "sequence":
            return torch.ones_like(strength_K), None
        then_B = self.block.behaviour_B if rule.against == "sampler" else self.block.proximal_B
        ratio_K = torch.exp(self.drawn_K - self.kept.of(then_B))
        used_K = bounded(rule, ratio_K, strength_K)
        if not isinstance(rule, PPOClip):
            return used_K, None
        return used_K, torch.where(used_K == 0, ratio_K.clamp(1 - rule.low, 1 + rule.high), used_K)

    def _pair(self, target: Target) -> Pair:
        """p and q~ over the vocabulary."""
        kept, block = self.kept, self.block
        return Pair(
            lambda: kept.of(block.logp_BV),
            lambda: kept.among(target.rows, target.logq_MV),
            p=lambda: kept.of(block.p_BV),
            q=lambda: kept.among(target.rows, target.q_MV),
            gap=lambda: target.gap(block.student, kept),
        )

    def _of(self, values_T: Tensor) -> Tensor:
        return self.kept.of(self.block.of(values_T).to(self.weight_K.dtype))

    def _put(self, **values_K: Tensor) -> None:
        self.columns.put("term", self.rows.term.name, self.block.start, self.kept, **values_K)
