"""Divergence shapes. A shape is D_f(q || p) = E_p[f(r)], r = q / p, of the student p from its target q.

Its gradient with respect to the student's logits is -p_v (h(r_v) - E_p[h]) with h(r) = r f'(r) - f(r) + constant, the
constant such that h(1) = 0: student = target gives zero for every shape and under every weight. Every non-decreasing h
is the field of some divergence, f(r) = r * integral from 1 to r of h(u) / u^2.

A shape is functions of log p and log q (broadcast together, natural logarithms, float):

    f_mass   p f(r): summed over the vocabulary it is the divergence in nats
    h_mass   p h(r): what the full-vocabulary gradient needs; finite where r is not
    h        h(r) at single tokens: the advantage of a sampled term
    f        f(r) at single tokens: minus what a sampled term pays for

    reverse KL       KL(p || q)                        f = -log r             h = log r
    forward KL       KL(q || p)                        f = r log r            h = r - 1
    JSD(beta)        beta KL(q || m) + (1-beta) KL(p || m), m = beta q + (1-beta) p
                                                                              h = (1-beta) log(beta r + 1 - beta)
    skew forward     KL(q || alpha q + (1-alpha) p)    f = r log(r / m)       h = (1-alpha)^2 (r - 1) / m
                                                       m = alpha r + 1 - alpha
    skew reverse     KL(p || (1-alpha) q + alpha p)    f = -log u             h = log u + alpha / u - alpha
                                                       u = (1-alpha) r + alpha
    total variation  sum |p - q| / 2                   f = |r - 1| / 2        h = sign(r - 1) / 2, 0 in the dead zone
    clipped          to [a, b]                         f = r (1 - e^-h) - h   h = min(max(log r, a), b)
    tanh             scale s                           see `tanh_value.py`    h = s tanh(log r / s)
    verifier-gated   right answers: clipped to [0, inf); wrong ones: to (-inf, 0]

JSD as in GKD (arXiv 2306.13649), skew divergences as in DistiLLM (arXiv 2402.03898).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opd.config.shapes import (
    ClippedKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Shape,
    SkewForwardKL,
    SkewReverseKL,
    TanhKL,
    TotalVariation,
    VerifierGatedKL,
)
from opd.objectives.tanh_value import tanh_value
from opd.objectives.transfer import suspects

FAR = 80.0  # nats; past it r is as good as infinite where it is bounded, and exp(r) still fits a float32
Field = Callable[[Tensor, Tensor], Tensor]


class Pair:
    """Student and target at the same entries. What nobody asks for is not made.

    p, q   their probabilities, which belong to others.
    gap    log q - log p, fresh at every call. From logits it is ten times as exact as from two log-probabilities, which
           at 150,000 entries are far from 0 and are rounded there.
    """

    def __init__(
        self,
        logp: Callable[[], Tensor],
        logq: Callable[[], Tensor],
        *,
        p: Callable[[], Tensor] | None = None,
        q: Callable[[], Tensor] | None = None,
        gap: Callable[[], Tensor] | None = None,
    ) -> None:
        self._logp, self._logq = logp, logq
        self._p, self._q = p or (lambda: self.logp.exp()), q or (lambda: self.logq.exp())
        self.gap = gap or (lambda: self.logq - self.logp)

    @classmethod
    def of(cls, logp: Tensor, logq: Tensor) -> Pair:
        return cls(lambda: logp, lambda: logq)

    @cached_property
    def logp(self) -> Tensor:
        return self._logp()

    @cached_property
    def logq(self) -> Tensor:
        return self._logq()

    @cached_property
    def p(self) -> Tensor:
        return self._p()

    @cached_property
    def q(self) -> Tensor:
        return self._q()


@dataclass(frozen=True)
class ShapeMaths:
    """The functions of a shape; each takes (log p, log q).

    tilt  f(r) + tilt (r - 1) is the same divergence between normalised distributions, with slope 0 at r = 1: what an
          unnormalised sum over a part of the vocabulary needs (tail "drop").
    both  p h(r), its sum over the last axis, and the divergence, where making them together is cheaper.
    """

    f_mass: Field
    h_mass: Field
    h: Field
    f: Field
    tilt: float = 0.0
    both: Callable[[Pair], tuple[Tensor, Tensor, Tensor]] | None = None

    def field(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """p h(r), its mean E_p[h], and the divergence: p f(r) summed over the last axis."""
        if self.both is not None:
            return self.both(pair)
        h_mass = self.h_mass(pair.logp, pair.logq)
        return h_mass, h_mass.sum(-1), self.f_mass(pair.logp, pair.logq).sum(-1)


def maths(spec: Shape, right: Tensor | None = None) -> ShapeMaths:
    """The functions of a configured shape.

    right  bool, broadcast against the log-probabilities: the verdict on the answer, for verifier_gated alone.
    Raises ValueError when verifier_gated comes without it.
    """
    match spec:
        case ReverseKL():
            return REVERSE_KL
        case ForwardKL():
            return FORWARD_KL
        case JensenShannon():
            return jensen_shannon(spec.beta, normalised=spec.normalised)
        case SkewForwardKL():
            return skew_forward(spec.alpha)
        case SkewReverseKL():
            return skew_reverse(spec.alpha)
        case TotalVariation():
            return total_variation(spec.dead_zone)
        case ClippedKL():
            return clipped(spec.low, spec.high)
        case TanhKL():
            return bounded_tanh(spec.scale)
        case VerifierGatedKL():
            return verifier_gated(right)


def _sums_to_nan(x: Tensor) -> Tensor:
    return x.sum().isnan()


def _has_nan(x: Tensor) -> Tensor:
    return x.isnan().any()


def log_ratio(logp: Tensor, logq: Tensor) -> Tensor:
    """log q - log p; where both have no mass the ratio is taken as 1, so that 0 * log(0/0) adds nothing."""
    gap = logq - logp
    if suspects(gap, _sums_to_nan):  # one look at all of it is cheaper than two comparisons of each
        gap = gap.masked_fill((logp == -math.inf) & (logq == -math.inf), 0.0)
    return gap


def _weighted(log_mass: Tensor, value: Tensor, mass: Tensor | None = None) -> Tensor:
    """exp(log_mass) * value with 0 * inf = 0."""
    mass = log_mass.exp() if mass is None else mass
    product = mass * value
    return product.masked_fill_(mass == 0, 0.0) if suspects(product, _sums_to_nan) else product


# The `both` of a shape go over [B, V] as few times as they can, in place. What they leave to the careful functions
# shows in the sums, which are not finite then: entries without mass, and models that return NaN.


def _reverse_both(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    h_mass = pair.gap().mul_(pair.p)
    mean = h_mass.sum(-1)
    if suspects(mean, _has_nan):
        h_mass = _weighted(pair.logp, log_ratio(pair.logp, pair.logq), pair.p)
        mean = h_mass.sum(-1)
    return h_mass, mean, -mean


REVERSE_KL = ShapeMaths(
    f_mass=lambda logp, logq: -_weighted(logp, log_ratio(logp, logq)),
    h_mass=lambda logp, logq: _weighted(logp, log_ratio(logp, logq)),
    h=log_ratio,
    f=lambda logp, logq: -log_ratio(logp, logq),
    tilt=1.0,
    both=_reverse_both,
)


def _r_log_r(logp: Tensor, logq: Tensor) -> Tensor:
    gap = log_ratio(logp, logq)
    return _weighted(gap, gap)


def _forward_both(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    value = pair.gap().mul_(pair.q).sum(-1)
    if suspects(value, _has_nan):
        value = _weighted(pair.logq, log_ratio(pair.logp, pair.logq), pair.q).sum(-1)
    h_mass = pair.q - pair.p
    return h_mass, h_mass.sum(-1), value


FORWARD_KL = ShapeMaths(
    f_mass=lambda logp, logq: _weighted(logq, log_ratio(logp, logq)),
    h_mass=lambda logp, logq: logq.exp() - logp.exp(),
    h=lambda logp, logq: torch.expm1(log_ratio(logp, logq)),
    f=_r_log_r,
    tilt=-1.0,
    both=_forward_both,
)


def _log_mixed(gap: Tensor, share: float) -> Tensor:
    """log(share r + 1 - share) of log r <= FAR: exactly 0 at r = 1, and exact as r goes to 0."""
    return torch.log1p(share * torch.expm1(gap))


def _log_mixed_anywhere(gap: Tensor, share: float) -> Tensor:
    return _log_mixed(gap.clamp(max=FAR), share) + (gap - FAR).clamp(min=0.0)


def jensen_shannon(beta: float, *, normalised: bool) -> ShapeMaths:
    """GKD's generalised JSD; `normalised` divides by beta (1 - beta): forward KL in the limit 0, reverse KL in 1."""
    constant = 1.0 / (beta * (1.0 - beta)) if normalised else 1.0

    def parts(logp: Tensor, logq: Tensor, p: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Per entry: (1 - beta) p log(m / p), and beta q log(q / m)."""
        gap = log_ratio(logp, logq).clamp(max=FAR)
        mixed = _log_mixed(gap, beta)
        of_teacher = _weighted(logq, gap - mixed) * (constant * beta)
        return _weighted(logp, mixed, p) * (constant * (1.0 - beta)), of_teacher

    def both(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        p, q = pair.p, pair.q
        h_mass = (q - p).div_(p).mul_(beta).log1p_()  # `_log_mixed`; r - 1 = (q - p) / p costs less than expm1
        of_teacher = pair.gap().sub_(h_mass).mul_(q).sum(-1) * (constant * beta)
        h_mass.mul_(p).mul_(constant * (1.0 - beta))
        mean = h_mass.sum(-1)
        if suspects(of_teacher - mean, lambda x: ~x.isfinite().all()):  # p is nothing where q is something, too
            h_mass, parts_of_teacher = parts(pair.logp, pair.logq, p)
            of_teacher, mean = parts_of_teacher.sum(-1), h_mass.sum(-1)
        return h_mass, mean, of_teacher - mean

    def f_mass(logp: Tensor, logq: Tensor) -> Tensor:
        h_mass, of_teacher = parts(logp, logq)
        return of_teacher - h_mass

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        return constant * (1.0 - beta) * _log_mixed_anywhere(log_ratio(logp, logq), beta)

    def f(logp: Tensor, logq: Tensor) -> Tensor:
        gap = log_ratio(logp, logq)
        near = gap.clamp(max=FAR)
        return constant * beta * _weighted(gap, near - _log_mixed(near, beta)) - h(logp, logq)

    return ShapeMaths(f_mass=f_mass, h_mass=lambda logp, logq: parts(logp, logq)[0], h=h, f=f, both=both)


def skew_forward(alpha: float) -> ShapeMaths:
    """DistiLLM's KL(q || alpha q + (1 - alpha) p)."""

    def log_share(logp: Tensor, logq: Tensor) -> Tensor:
        gap = log_ratio(logp, logq).clamp(max=FAR)
        return gap - _log_mixed(gap, alpha)

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        excess = torch.expm1(log_ratio(logp, logq).clamp(max=FAR))
        return (1.0 - alpha) ** 2 * excess / (1.0 + alpha * excess)

    return ShapeMaths(
        f_mass=lambda logp, logq: _weighted(logq, log_share(logp, logq)),
        h_mass=lambda logp, logq: _weighted(logp, h(logp, logq)),
        h=h,
        f=lambda logp, logq: _weighted(log_ratio(logp, logq), log_share(logp, logq)),
        tilt=alpha - 1.0,
    )


def skew_reverse(alpha: float) -> ShapeMaths:
    """DistiLLM's KL(p || (1 - alpha) q + alpha p)."""

    def log_u(logp: Tensor, logq: Tensor) -> Tensor:
        return _log_mixed_anywhere(log_ratio(logp, logq), 1.0 - alpha)

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        logarithm = log_u(logp, logq)
        return logarithm + alpha * torch.expm1(-logarithm)

    return ShapeMaths(
        f_mass=lambda logp, logq: -_weighted(logp, log_u(logp, logq)),
        h_mass=lambda logp, logq: _weighted(logp, h(logp, logq)),
        h=h,
        f=lambda logp, logq: -log_u(logp, logq),
        tilt=1.0 - alpha,
    )


def total_variation(dead_zone: float) -> ShapeMaths:
    """sign(r - 1) / 2, and 0 where |log r| <= dead_zone; f is the divergence of exactly this h."""
    wide, narrow = math.exp(dead_zone), math.exp(-dead_zone)

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        gap = log_ratio(logp, logq)
        return 0.5 * ((gap > dead_zone).to(gap.dtype) - (gap < -dead_zone).to(gap.dtype))

    def beyond(p: Tensor | float, q: Tensor) -> Tensor:
        return 0.5 * ((narrow * q - p).clamp(min=0.0) + (p - wide * q).clamp(min=0.0))

    return ShapeMaths(
        f_mass=lambda logp, logq: beyond(logp.exp(), logq.exp()),
        h_mass=lambda logp, logq: _weighted(logp, h(logp, logq)),
        h=h,
        f=lambda logp, logq: beyond(1.0, log_ratio(logp, logq).exp()),
    )


def clipped(low: float | Tensor | None, high: float | Tensor | None) -> ShapeMaths:
    """log r held to [low, high]; None, or an infinity, leaves an end open."""

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        return _clamp(log_ratio(logp, logq), low, high)

    def f_mass(logp: Tensor, logq: Tensor) -> Tensor:
        held = h(logp, logq)
        rest = torch.where(held == -math.inf, logp, logq - held)  # log(r e^-h p): log p itself where nothing is cut
        return logq.exp() - rest.exp() - _weighted(logp, held)

    def f(logp: Tensor, logq: Tensor) -> Tensor:
        gap = log_ratio(logp, logq)
        held = _clamp(gap, low, high)
        return gap.exp() - torch.where(gap == held, 0.0, gap - held).exp() - held

    return ShapeMaths(f_mass=f_mass, h_mass=lambda logp, logq: _weighted(logp, h(logp, logq)), h=h, f=f)


def _clamp(gap: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> Tensor:
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.maximum(torch.minimum(gap, high.to(gap.dtype)), low.to(gap.dtype))
    assert not isinstance(low, Tensor) and not isinstance(high, Tensor)
    return gap.clamp(low, high)


def verifier_gated(right: Tensor | None) -> ShapeMaths:
    """OPDVR: max(log r, 0) where the answer is right, min(log r, 0) where it is wrong."""
    if right is None:
        raise ValueError("the shape verifier_gated needs the verdict on every answer (right), but there is none")
    low = torch.where(right, 0.0, -math.inf)
    high = torch.where(right, math.inf, 0.0)
    return clipped(low, high)


def bounded_tanh(scale: float) -> ShapeMaths:
    """scale * tanh(log r / scale)."""
    value = tanh_value(scale)

    def h(logp: Tensor, logq: Tensor) -> Tensor:
        return scale * torch.tanh(log_ratio(logp, logq) / scale)

    return ShapeMaths(
        f_mass=lambda logp, logq: value.mass(logp, logq, log_ratio(logp, logq)),
        h_mass=lambda logp, logq: _weighted(logp, h(logp, logq)),
        h=h,
        f=lambda logp, logq: value.at(log_ratio(logp, logq)),
    )
