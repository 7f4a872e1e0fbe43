"""Divergence shapes. A shape is D_f(q || p) = E_p[f(r)], r = q / p, of the student p from its target q.

Its gradient with respect to the student's logits is -p_v (h(r_v) - E_p[h]) with h(r) = r f'(r) - f(r), normalised
so that h(1) = 0: student = target gives zero for every shape and under every weight.

Each shape is three functions of log p and log q (same shape, natural logarithms, float):

    f_mass   p f(r): summed over the vocabulary it is the divergence in nats
    h_mass   p h(r): what the full-vocabulary gradient needs, without ever forming r
    h        h(r) at single tokens: the advantage of a sampled term

    reverse KL   KL(p || q)                              f = -log r          h = log r
    forward KL   KL(q || p)                              f = r log r         h = r - 1
    JSD(beta)    beta KL(q || m) + (1 - beta) KL(p || m) h = (1 - beta) log(beta r + 1 - beta)
                 with m = beta q + (1 - beta) p
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.config.objective import ForwardKL, JensenShannon, ReverseKL

Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ShapeMaths:
    """The three functions of a shape; each takes (log p, log q)."""

    f_mass: Field
    h_mass: Field
    h: Field


def maths(spec: ReverseKL | ForwardKL | JensenShannon) -> ShapeMaths:
    """The functions of a configured shape."""
    if isinstance(spec, ReverseKL):
        return REVERSE_KL
    if isinstance(spec, ForwardKL):
        return FORWARD_KL
    assert isinstance(spec, JensenShannon), f"the shape {spec.kind} has no maths here"
    return jensen_shannon(spec.beta, normalised=spec.normalised)


def _gap(logp: Tensor, logq: Tensor) -> Tensor:
    """log q - log p; where both have no mass the ratio is taken as 1, so that 0 * log(0/0) adds nothing."""
    return (logq - logp).masked_fill_((logp == -math.inf) & (logq == -math.inf), 0.0)


def _weighted(logp: Tensor, value: Tensor) -> Tensor:
    """p * value with 0 * inf = 0."""
    return (logp.exp() * value).masked_fill_(logp == -math.inf, 0.0)


REVERSE_KL = ShapeMaths(
    f_mass=lambda logp, logq: _weighted(logp, -_gap(logp, logq)),
    h_mass=lambda logp, logq: _weighted(logp, _gap(logp, logq)),
    h=_gap,
)

FORWARD_KL = ShapeMaths(
    f_mass=lambda logp, logq: _weighted(logq, _gap(logp, logq)),
    h_mass=lambda logp, logq: logq.exp() - logp.exp(),
    h=lambda logp, logq: torch.expm1(_gap(logp, logq)),
)


def jensen_shannon(beta: float, *, normalised: bool) -> ShapeMaths:
    """GKD's generalised JSD; `normalised` divides by beta (1 - beta): forward KL in the limit 0, reverse KL in 1."""
    constant = 1.0 / (beta * (1.0 - beta)) if normalised else 1.0
    log_beta, log_rest = math.log(beta), math.log1p(-beta)

    def log_mixture(logp: Tensor, logq: Tensor) -> Tensor:
        return torch.logaddexp(logq + log_beta, logp + log_rest)

    def f_mass(logp: Tensor, logq: Tensor) -> Tensor:
        logm = log_mixture(logp, logq)
        teacher = _weighted(logq, _gap(logm, logq))
        student = _weighted(logp, _gap(logm, logp))
        return constant * (beta * teacher + (1.0 - beta) * student)

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        return constant * (1.0 - beta) * _gap(logp, log_mixture(logp, logq))

    return ShapeMaths(f_mass=f_mass, h_mass=lambda logp, logq: _weighted(logp, h(logp, logq)), h=h)
