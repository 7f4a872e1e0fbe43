"""Divergences of a student p from its target q, written from their definitions as sums over the vocabulary.

Nothing here is shared with the training code: these are what it is compared with. Every function takes log p and log q
of shape [..., V] and gives [...], in nats; gradients come from autograd. Sources: f-divergences, Csiszar 1967; the
generalised JSD, GKD (arXiv 2306.13649); skew KL, DistiLLM (arXiv 2402.03898).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def kl(loga: Tensor, logb: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v log(a_v / b_v)."""
    return (loga.exp() * (loga - logb)).sum(-1)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q)."""
    return kl(logp, logq)


def forward_kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(q || p)."""
    return kl(logq, logp)


def mixture(loga: Tensor, logb: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(loga + math.log(share), logb + math.log1p(-share))


def jensen_shannon(beta: float) -> Divergence:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p."""

    def divergence(logp: Tensor, logq: Tensor) -> Tensor:
        logm = mixture(logq, logp, beta)
        return beta * kl(logq, logm) + (1 - beta) * kl(logp, logm)

    return divergence


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(q || alpha q + (1 - alpha) p)."""
    return lambda logp, logq: kl(logq, mixture(logq, logp, alpha))


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(p || (1 - alpha) q + alpha p)."""
    return lambda logp, logq: kl(logp, mixture(logp, logq, alpha))


def total_variation(logp: Tensor, logq: Tensor) -> Tensor:
    """sum_v |p_v - q_v| / 2."""
    return (logp.exp() - logq.exp()).abs().sum(-1) / 2


def f_divergence(f: Callable[[Tensor], Tensor]) -> Divergence:
    """E_p[f(q / p)] for any convex f with f(1) = 0."""
    return lambda logp, logq: (logp.exp() * f((logq - logp).exp())).sum(-1)


LOG_ZERO = -1e30  # stands for log 0: exp of it is 0, and differences of two of them are 0 and not NaN

# ---- truncated to a set of tokens ------------------------------------------------------------------------------


def top_k_mask(logp: Tensor, k: int) -> Tensor:
    """bool [..., V]: the k most likely tokens; no gradient through the choice."""
    chosen = torch.zeros(logp.shape, dtype=torch.bool)
    return chosen.scatter(-1, logp.detach().topk(k, dim=-1).indices, True)


def naive_truncation(logp: Tensor, logq: Tensor, kept: Tensor) -> Tensor:
    """sum over the set of p log(p / q), whatever lies outside left out. No divergence: it can be negative."""
    return torch.where(kept, logp.exp() * (logp - logq), 0.0).sum(-1)


def unnormalised_kl(logp: Tensor, logq: Tensor, kept: Tensor) -> Tensor:
    """sum over the set of p log(p / q) - p + q: the KL of measures that need not add up to 1."""
    return torch.where(kept, logp.exp() * (logp - logq) - logp.exp() + logq.exp(), 0.0).sum(-1)


def within(logp: Tensor, kept: Tensor) -> Tensor:
    """log of p rescaled to add up to 1 on the set, `LOG_ZERO` outside."""
    inside = logp.masked_fill(~kept, LOG_ZERO)
    return inside - torch.logsumexp(inside, -1, keepdim=True)


def renormalised(divergence: Divergence) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The divergence of both distributions rescaled to the set."""

    def on_set(logp: Tensor, logq: Tensor, kept: Tensor) -> Tensor:
        # Outside the set both are 0 and equal: nothing is added there, and no gradient flows.
        return divergence(within(logp, kept), within(logq, kept))

    return on_set


def bucketed(divergence: Divergence) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The divergence of the two distributions over the set and one class for the rest."""

    def with_rest(logp: Tensor, logq: Tensor, kept: Tensor) -> Tensor:
        return divergence(_with_rest(logp, kept), _with_rest(logq, kept))

    return with_rest


def _with_rest(logp: Tensor, kept: Tensor) -> Tensor:
    rest = torch.logsumexp(logp.masked_fill(kept, LOG_ZERO), -1, keepdim=True)
    return torch.cat([logp.masked_fill(~kept, LOG_ZERO), rest], dim=-1)


NAMED: Mapping[str, Divergence] = {
    "reverse KL": reverse_kl,
    "forward KL": forward_kl,
    "JSD(0.1)": jensen_shannon(0.1),
    "JSD(0.5)": jensen_shannon(0.5),
    "JSD(0.9)": jensen_shannon(0.9),
    "skew forward KL(0.1)": skew_forward_kl(0.1),
    "skew reverse KL(0.1)": skew_reverse_kl(0.1),
    "total variation": total_variation,
}
