"""Each shape against its definition: D = E_p[f(r)], h = r f' - f up to a constant, h(1) = f(1) = 0."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config.shapes import (
    SHAPES,
    ClippedKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    TanhKL,
    TotalVariation,
    VerifierGatedKL,
)
from opd.objectives.shapes import Pair, maths, skew_forward, skew_reverse

RIGHT, WRONG = torch.tensor(True), torch.tensor(False)
CASES = {
    "reverse": (ReverseKL(), None),
    "forward": (ForwardKL(), None),
    **{f"jsd_{b}_{n}": (JensenShannon(beta=b, normalised=n), None) for b in (0.1, 0.5, 0.9) for n in (False, True)},
    "skew_forward": (SkewForwardKL(alpha=0.1), None),
    "skew_reverse": (SkewReverseKL(alpha=0.3), None),
    "tv": (TotalVariation(), None),
    "tv_wide": (TotalVariation(dead_zone=0.2), None),
    "clipped": (ClippedKL(low=-1.0, high=0.5), None),
    "floored": (ClippedKL(low=-1.0, high=None), None),
    "capped": (ClippedKL(low=None, high=0.7), None),
    "tanh": (TanhKL(), None),
    "tanh_2.5": (TanhKL(scale=2.5), None),
    "tanh_0.3": (TanhKL(scale=0.3), None),
    "right": (VerifierGatedKL(), RIGHT),
    "wrong": (VerifierGatedKL(), WRONG),
}
every_shape = pytest.mark.parametrize("spec, right", CASES.values(), ids=CASES.keys())
seeds = given(seed=st.integers(0, 10_000))


def pair(seed: int, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(2, width, dtype=torch.float64) * 2
    return torch.log_softmax(logits[0], -1), torch.log_softmax(logits[1], -1)


def field_of(spec, right, x: float) -> float:
    """h by its formula, of x = log r."""
    r = math.exp(x)
    match spec:
        case ReverseKL():
            return x
        case ForwardKL():
            return r - 1
        case JensenShannon(beta=b, normalised=n):
            return (1 - b) * math.log(b * r + 1 - b) / (b * (1 - b) if n else 1)
        case SkewForwardKL(alpha=a):
            return (1 - a) * r / (a * r + 1 - a) - (1 - a)
        case SkewReverseKL(alpha=a):
            u = (1 - a) * r + a
            return math.log(u) + a / u - a
        case TotalVariation(dead_zone=d):
            return 0.0 if abs(x) <= d else math.copysign(0.5, x)
        case ClippedKL(low=a, high=b):
            return max(x if b is None else min(x, b), -math.inf if a is None else a)
        case TanhKL(scale=s):
            return s * math.tanh(x / s)
        case VerifierGatedKL():
            return max(x, 0.0) if right else min(x, 0.0)
    raise AssertionError(spec)


def definition(spec, right, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The divergence, written from probabilities and, for shapes that are named by their h, from its integral."""
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    match spec:
        case ReverseKL():
            return kl(p, q)
        case ForwardKL():
            return kl(q, p)
        case JensenShannon(beta=b, normalised=n):
            m = b * q + (1 - b) * p
            return (b * kl(q, m) + (1 - b) * kl(p, m)) / (b * (1 - b) if n else 1)
        case SkewForwardKL(alpha=a):
            return kl(q, a * q + (1 - a) * p)
        case SkewReverseKL(alpha=a):
            return kl(p, (1 - a) * q + a * p)
    node, weight = np.polynomial.legendre.leggauss(400)
    total = torch.zeros((), dtype=torch.float64)
    for p_v, q_v in zip(p.tolist(), q.tolist(), strict=True):
        x = math.log(q_v / p_v)
        # r * integral of h(e^t) e^-t dt from 0 to x, in pieces: h may have a corner.
        corners = [c for c in (-1.0, -0.2, -1e-4, 1e-4, 0.2, 0.5, 0.7) if min(0, x) < c < max(0, x)]
        edges = [0.0, *(corners if x > 0 else corners[::-1]), x]
        for a, b in pairwise(edges):
            t = a + (node + 1) * (b - a) / 2
            inside = 1e-15 * (b - a)
            value = sum(
                w * field_of(spec, right, float(np.clip(u, min(a, b) + inside, max(a, b) - inside))) * math.exp(-u)
                for u, w in zip(t, weight, strict=True)
            )
            total += q_v * float(value) * (b - a) / 2
    return total


def test_every_configured_shape_is_tested() -> None:
    assert {type(spec) for spec, _ in CASES.values()} == set(SHAPES)


@every_shape
@settings(max_examples=5)
@seeds
def test_O_13_value_is_the_textbook_divergence(spec, right, seed: int) -> None:
    logp, logq = pair(seed)
    ours = maths(spec, right).f_mass(logp, logq).sum()
    assert ours.item() == pytest.approx(definition(spec, right, logp.exp(), logq.exp()).item(), abs=2e-9)


@every_shape
@seeds
def test_h_is_r_f_prime_minus_f_by_autograd(spec, right, seed: int) -> None:
    """Up to the constant that makes h(1) = 0; and slope 0 of the tilted f at r = 1."""
    shape = maths(spec, right)
    x = (torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2).requires_grad_()
    f = shape.f(torch.zeros_like(x), x)
    (slope,) = torch.autograd.grad(f.sum(), x)  # df / dlog r = r f'
    expected = slope - f + shape.tilt
    torch.testing.assert_close(shape.h(torch.zeros_like(x), x).detach(), expected.detach(), atol=1e-7, rtol=1e-7)
    one = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(shape.f(one, one + 1e-6) / 1e-6, one - shape.tilt, atol=2e-5, rtol=0)


@every_shape
@seeds
def test_h_is_the_one_in_the_table_and_f_mass_is_p_f(spec, right, seed: int) -> None:
    logp, logq = pair(seed)
    shape = maths(spec, right)
    expected = [field_of(spec, right, x) for x in (logq - logp).tolist()]
    torch.testing.assert_close(shape.h(logp, logq), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(logp.exp() * shape.f(logp, logq), shape.f_mass(logp, logq), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(logp.exp() * shape.h(logp, logq), shape.h_mass(logp, logq), atol=1e-12, rtol=1e-9)
    h_mass, mean, value = shape.field(Pair.of(logp, logq))
    torch.testing.assert_close(h_mass, shape.h_mass(logp, logq))
    torch.testing.assert_close(mean, h_mass.sum())
    torch.testing.assert_close(value, shape.f_mass(logp, logq).sum())


@every_shape
@seeds
def test_gradient_with_respect_to_logits_is_minus_p_times_centred_h(spec, right, seed: int) -> None:
    logp, logq = pair(seed)
    shape = maths(spec, right)
    z = logp.clone().requires_grad_()
    log_student = torch.log_softmax(z, -1)
    (log_student.exp() * shape.f(log_student, logq)).sum().backward()
    h_mass = shape.h_mass(logp, logq)
    torch.testing.assert_close(-(h_mass - logp.exp() * h_mass.sum()), z.grad, atol=1e-8, rtol=1e-7)


@every_shape
def test_T_01_h_and_f_are_zero_at_ratio_one(spec, right) -> None:
    logp, _ = pair(3)
    shape = maths(spec, right)
    for value in (shape.h(logp, logp), shape.f(logp, logp), shape.h_mass(logp, logp), shape.f_mass(logp, logp)):
        assert value.abs().max().item() < 1e-15


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_h_grows_and_everything_is_finite_80_nats_away(spec, right, dtype) -> None:
    shape = maths(spec, right)
    x = torch.linspace(-80, 80, 641, dtype=dtype)
    base = torch.zeros_like(x)
    h, f = shape.h(base, x), shape.f(base, x)
    assert (h.diff() >= -4 * torch.finfo(dtype).eps * h.abs().max()).all() and h[-1] > h[0]
    assert torch.isfinite(h).all() and torch.isfinite(f).all()
    exact = torch.tensor([field_of(spec, right, v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(h.double(), exact, atol=1e-5, rtol=1e-4)
    for logp, logq in ((x.clamp(max=0), (-x).clamp(max=0)), (base, x.clamp(max=0)), (x.clamp(max=0), base)):
        for mass in (shape.h_mass(logp, logq), shape.f_mass(logp, logq), shape.field(Pair.of(logp, logq))[0]):
            assert torch.isfinite(mass).all()


@every_shape
def test_M_2_tokens_without_mass_add_nothing(spec, right) -> None:
    """Both models may give a token no probability at all; 0 * log(0 / 0) is 0, not NaN."""
    logp, logq = pair(5)
    wider = [torch.cat([x, torch.tensor([-math.inf], dtype=x.dtype)]) for x in (logp, logq)]
    shape = maths(spec, right)
    fields = [shape.f_mass, shape.h_mass, *(lambda p, q, n=n: shape.field(Pair.of(p, q))[n] for n in range(3))]
    for field in fields:
        assert field(*wider).sum().item() == pytest.approx(field(logp, logq).sum().item(), abs=1e-12)


@every_shape
def test_M_2_a_student_without_mass_where_the_target_has_some(spec, right) -> None:
    """p = 0 < q: the limit of p h(r) and p f(r), never NaN. (q = 0 < p is infinite for reverse KL, rightly.)"""
    logp, logq = (torch.tensor(x, dtype=torch.float64) for x in ([-math.inf, 0.0], [math.log(0.5)] * 2))
    near = torch.tensor([-300.0, 0.0], dtype=torch.float64)
    shape = maths(spec, right)
    if isinstance(spec, ForwardKL) or (right is None and isinstance(spec, ReverseKL)):
        return  # forward KL is infinite there; reverse KL's h_mass is 0, which is tested by the field below
    for mass in (shape.h_mass, shape.f_mass):
        torch.testing.assert_close(mass(logp, logq), mass(near, logq), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("beta, limit", [(1e-6, ForwardKL()), (1 - 1e-6, ReverseKL())])
def test_O_12_normalised_jsd_is_continuous_to_both_kls(beta: float, limit) -> None:
    logp, logq = pair(11)
    value = maths(JensenShannon(beta=beta, normalised=True)).f_mass(logp, logq).sum().item()
    assert value == pytest.approx(maths(limit).f_mass(logp, logq).sum().item(), rel=1e-4)
    plain = maths(JensenShannon(beta=beta)).f_mass(logp, logq).sum().item()
    assert plain < 1e-4, "GKD's own form collapses at the ends; the normalised one is the way around it"


@seeds
def test_skew_shapes_lead_to_the_plain_ones(seed: int) -> None:
    logp, logq = pair(seed)
    for skewed, plain in ((skew_forward(1e-9), ForwardKL()), (skew_reverse(1e-9), ReverseKL())):
        torch.testing.assert_close(skewed.h(logp, logq), maths(plain).h(logp, logq), atol=1e-5, rtol=1e-5)


def test_bounds_of_the_bounded_shapes() -> None:
    far = torch.tensor([-1e3, 1e3], dtype=torch.float64)
    for spec, bounds in (
        (SkewForwardKL(alpha=0.1), (-0.9, 0.81 / 0.1)),
        (TotalVariation(), (-0.5, 0.5)),
        (ClippedKL(), (-5.0, 5.0)),
        (TanhKL(scale=3.0), (-3.0, 3.0)),
    ):
        assert maths(spec).h(torch.zeros_like(far), far).tolist() == pytest.approx(bounds, rel=1e-12)


def test_a_gated_shape_without_verdicts_is_refused() -> None:
    with pytest.raises(ValueError, match="verdict"):
        maths(VerifierGatedKL())


def test_verdicts_may_differ_between_tokens() -> None:
    logp, logq = (torch.stack([x, x]) for x in pair(8))
    mixed = maths(VerifierGatedKL(), torch.tensor([[True], [False]])).h(logp, logq)
    assert (mixed[0] >= 0).all() and (mixed[1] <= 0).all()
    torch.testing.assert_close(mixed.sum(0), (logq - logp)[0])
