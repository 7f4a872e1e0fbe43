"""Weights that are known before a tile is made: ratios of whole answers, the frozen ratio of a proximal anchor, and
how much a prefix matters. Ratios of single tokens under the student as it is now are made in the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.config.objective import DataTerm, DivergenceTerm, Term
from opd.config.slots import TIS, IcePop, NoImportance, PPOClip, Weighting
from opd.objectives.tokens import on_drawn_tokens


def weighting(term: Term) -> Weighting:
    """The importance weights that the term uses: none where it has no drawn tokens to weight."""
    if isinstance(term, DataTerm) or not on_drawn_tokens(term):
        return NoImportance()
    return term.importance


def needs_look(term: Term) -> bool:
    """Whether a weight of the term needs the student's log-probabilities before the loss is made."""
    rule = weighting(term)
    if not isinstance(rule, NoImportance) and (rule.level == "sequence" or rule.against == "proximal"):
        return True
    return isinstance(term, DivergenceTerm) and term.tokens.importance_of_prefix > 0


def known_ratio(
    rule: Weighting,
    *,
    logprob_T: Tensor,
    behaviour_T: Tensor,
    proximal_T: Tensor | None,
    strength_T: Tensor | None,
    trained_T: Tensor,
    row_T: Tensor,
    rows: int,
) -> Tensor | None:
    """float [T] by which a token's weight is multiplied before the kernel sees it; None where there is nothing.

        sequence, sampler    the rule on exp(mean over the answer's trained tokens of log p - log mu)
        token, proximal      the rule on pi_prox / mu; the kernel has pi / pi_prox
        sequence, proximal   both of the above at the level of the answer: rule(pi / pi_prox) rule(pi_prox / mu)

    All of them are numbers under the student as it is now, or frozen in the step; none carries a gradient. PPO's clip
    holds what moves, pi / pi_prox; pi_prox / mu does not move, and enters it as it is.

    logprob_T    of the student now.
    proximal_T   of the student at the first update on these answers; None: this is it.
    strength_T   advantage of the drawn tokens, whose sign decides for PPO; only read for PPO at the level of answers.
    row_T, rows  the answer that each token belongs to, and how many there are.
    """
    if isinstance(rule, NoImportance) or (rule.level == "token" and rule.against == "sampler"):
        return None
    then_T = logprob_T if proximal_T is None else proximal_T
    frozen = (then_T - behaviour_T).to(logprob_T.dtype)
    moving = logprob_T - then_T if rule.against == "proximal" else (logprob_T - behaviour_T).to(logprob_T.dtype)
    if rule.level == "sequence":
        moving, frozen = (_mean_by_row(x, trained_T, row_T, rows) for x in (moving, frozen))
    ratio_T = torch.ones_like(logprob_T)
    if rule.level == "sequence":
        ratio_T = bounded(rule, moving.exp(), strength_T)
    if rule.against == "proximal":
        ratio_T = ratio_T * (frozen.exp() if isinstance(rule, PPOClip) else bounded(rule, frozen.exp(), None))
    return torch.where(trained_T, ratio_T, 1.0)


def bounded(rule: Weighting, ratio_T: Tensor, strength_T: Tensor | None) -> Tensor:
    """The weight that a rule makes of a ratio. `strength_T` is what PPO's clip looks at."""
    if isinstance(rule, TIS):
        return ratio_T.clamp(max=rule.cap)
    if isinstance(rule, IcePop):
        return torch.where((ratio_T >= rule.low) & (ratio_T <= rule.high), ratio_T, 0.0)
    if isinstance(rule, PPOClip):
        assert strength_T is not None, "PPO's clip depends on the sign of the advantage"
        outside_T = ((strength_T > 0) & (ratio_T > 1 + rule.high)) | ((strength_T < 0) & (ratio_T < 1 - rule.low))
        return torch.where(outside_T, 0.0, ratio_T)
    return ratio_T


def clipped(rule: Weighting, used_T: Tensor) -> Tensor:
    """bool [T]: where a rule changed the ratio, read from the weight that it left."""
    return (used_T == 0) | (used_T >= rule.cap if isinstance(rule, TIS) else torch.zeros_like(used_T, dtype=torch.bool))


def prefix_weight(gap_T: Tensor, trained_T: Tensor, lengths: list[int], gamma: float) -> Tensor:
    """[T]: 1 + gamma (1 - sum_{k < t} |A_k| / sum_k |A_k|) over an answer's trained tokens (IW-OPD, arXiv 2606.22600).

    gap_T    log q~ - log p of the drawn tokens. Where it is infinite, the share before is 0 and the share after is 1;
             an answer without any gap has share 0.
    lengths  tokens of each answer, in the order in which they are laid end to end.
    """
    size_T = torch.where(trained_T, gap_T.abs().double(), 0.0)
    shares = [_share_before(size) for size in size_T.split(lengths)]
    share_T = torch.cat(shares) if shares else size_T
    return (1.0 + gamma * (1.0 - share_T)).to(gap_T.dtype)


def _share_before(size_T: Tensor) -> Tensor:
    sum_T = size_T.cumsum(0)
    before_T = torch.cat([sum_T.new_zeros(1), sum_T[:-1]])[: len(size_T)]
    share_T = torch.where(before_T > 0, before_T / sum_T[-1:], 0.0)
    return torch.where(torch.isinf(before_T), 1.0, share_T)


def _mean_by_row(value_T: Tensor, trained_T: Tensor, row_T: Tensor, rows: int) -> Tensor:
    """[T]: at every token the mean over the trained tokens of its answer."""
    kept_T = torch.where(trained_T, value_T.double(), 0.0)
    sums_2N = torch.zeros(2, rows, dtype=torch.float64, device=value_T.device)
    sums_2N.index_add_(1, row_T, torch.stack([kept_T, trained_T.double()]))
    return (sums_2N[0] / sums_2N[1].clamp(min=1.0))[row_T].to(value_T.dtype)
