"""Each shape against its definition: D = E_p[f(r)], h = r f' - f up to a constant, h(1) = 0."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.config.objective import ForwardKL, JensenShannon, ReverseKL
from opd.objectives.shapes import maths

SHAPES = [
    ReverseKL(),
    ForwardKL(),
    *(JensenShannon(beta=b, normalised=n) for b in (0.1, 0.5, 0.9) for n in (False, True)),
]


def pair(seed: int, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    logits = torch.randn(2, width, dtype=torch.float64) * 2
    return torch.log_softmax(logits[0], -1), torch.log_softmax(logits[1], -1)


def definition(spec, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The textbook divergence, written from probabilities."""
    if isinstance(spec, ReverseKL):
        return (p * (p / q).log()).sum()
    if isinstance(spec, ForwardKL):
        return (q * (q / p).log()).sum()
    b = spec.beta
    m = b * q + (1 - b) * p
    value = b * (q * (q / m).log()).sum() + (1 - b) * (p * (p / m).log()).sum()
    return value / (b * (1 - b)) if spec.normalised else value


@pytest.mark.parametrize("spec", SHAPES, ids=str)
@given(seed=st.integers(0, 10_000))
def test_O_13_value_is_the_textbook_divergence(spec, seed: int) -> None:
    logp, logq = pair(seed)
    ours = maths(spec).f_mass(logp, logq).sum()
    assert ours.item() == pytest.approx(definition(spec, logp.exp(), logq.exp()).item(), abs=1e-11)


@pytest.mark.parametrize("spec", SHAPES, ids=str)
@given(seed=st.integers(0, 10_000))
def test_gradient_with_respect_to_logits_is_minus_p_times_centred_h(spec, seed: int) -> None:
    logp, logq = pair(seed)
    z = logp.clone().requires_grad_()
    definition(spec, torch.softmax(z, -1), logq.exp()).backward()
    h_mass = maths(spec).h_mass(logp, logq)
    field = -(h_mass - logp.exp() * h_mass.sum())
    torch.testing.assert_close(field, z.grad, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_h_is_zero_at_ratio_one_grows_and_agrees_with_h_mass(spec) -> None:
    shape = maths(spec)
    logp, logq = pair(3)
    assert shape.h(logp, logp).abs().max().item() < 1e-15
    torch.testing.assert_close(logp.exp() * shape.h(logp, logq), shape.h_mass(logp, logq), atol=1e-13, rtol=1e-10)
    ratios = torch.linspace(-4, 4, 50, dtype=torch.float64)
    values = shape.h(torch.full_like(ratios, -1.0), ratios - 1.0)
    assert (values.diff() > 0).all()


@pytest.mark.parametrize("beta, limit", [(1e-6, ForwardKL()), (1 - 1e-6, ReverseKL())])
def test_O_12_normalised_jsd_is_continuous_to_both_kls(beta: float, limit) -> None:
    logp, logq = pair(11)
    value = maths(JensenShannon(beta=beta, normalised=True)).f_mass(logp, logq).sum().item()
    assert value == pytest.approx(maths(limit).f_mass(logp, logq).sum().item(), rel=1e-4)
    plain = maths(JensenShannon(beta=beta)).f_mass(logp, logq).sum().item()
    assert plain < 1e-4, "GKD's own form collapses at the ends; the normalised one is the way around it"


@pytest.mark.parametrize("spec", SHAPES, ids=str)
def test_tokens_without_mass_add_nothing(spec) -> None:
    """Both models may give a token no probability at all; 0 * log(0 / 0) is 0, not NaN."""
    logp, logq = pair(5)
    wider = [torch.cat([x, torch.tensor([-math.inf], dtype=x.dtype)]) for x in (logp, logq)]
    shape = maths(spec)
    for field in (shape.f_mass, shape.h_mass):
        assert field(*wider).sum().item() == pytest.approx(field(logp, logq).sum().item(), abs=1e-12)
