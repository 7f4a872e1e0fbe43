"""Where training on the teacher's top-k alone ends, tail by tail."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from opd.config.objective import DivergenceTerm
from opd.config.slots import Full, TopK
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_loss
from opd.types import Head, ScorerRows

V, K, MASS = 50, 5, 0.690  # vocabulary, size of the support, the teacher's mass on it


@cache
def teacher() -> torch.Tensor:
    """log q [V]: a power law whose first five entries hold that mass."""
    rank = torch.arange(1, V + 1, dtype=torch.float64)
    low, high = 0.0, 5.0
    for _ in range(60):
        power = (low + high) / 2
        logq = torch.log_softmax(-power * rank.log(), 0)
        low, high = (power, high) if logq[:K].exp().sum() < MASS else (low, power)
    return logq


def start() -> torch.Tensor:
    """A student with little mass on the teacher's five."""
    z = torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:K] -= 0.3
    return z


def descend(value_of) -> torch.Tensor:
    z = start().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [z], max_iter=300, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = value_of(z)
        value.backward()
        return value.detach()

    optimiser.step(closure)
    return torch.log_softmax(z.detach(), 0)


def kernel(support):
    """The term's value as a function of the logits: the head is the identity, so hidden states are logits."""
    eye, ones = torch.eye(V, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    scorer = ScorerRows("a", ones > 0, 1.0, hidden_TD=teacher()[None], head=Head(eye, V))
    rows = TokenRows(torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    term = TermRows(DivergenceTerm(name="x", support=support), ones, {"a": ones}, True)
    return lambda z: tiled_loss(z[None], Head(eye, V), rows, [term], [scorer], student_temperature=1.0, chunk_tokens=1)[
        0
    ]


def facts(logp: torch.Tensor) -> tuple[float, float]:
    """Mass on the teacher's five, and KL(p || q) over the vocabulary."""
    return logp[:K].exp().sum().item(), (logp.exp() * (logp - teacher())).sum().item()


def test_the_full_vocabulary_ends_at_the_teacher() -> None:
    mass, kl = facts(descend(kernel(Full())))
    assert mass == pytest.approx(MASS, abs=1e-4) and kl < 1e-6


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_O_6_bucket_and_drop_keep_the_teachers_mass_on_the_support(tail: str) -> None:
    logp = descend(kernel(TopK(kind="teacher_top_k", k=K, tail=tail)))
    mass, kl = facts(logp)
    assert mass == pytest.approx(MASS, abs=1e-4)
    torch.testing.assert_close(logp[:K], teacher()[:K], atol=1e-4, rtol=0)
    assert kl > 0.05, "the tail has the student's own shape"


def test_O_6_the_truncated_sum_differentiated_empties_the_support() -> None:
    """Plain autograd, nothing of ours: its optimum is q / e on the support. This is why it is not on offer."""

    def naive(z: torch.Tensor) -> torch.Tensor:
        logp = torch.log_softmax(z, 0)
        return (logp[:K].exp() * (logp[:K] - teacher()[:K])).sum()

    logp = descend(naive)
    mass, _ = facts(logp)
    assert mass == pytest.approx(MASS / math.e, abs=1e-4)
    torch.testing.assert_close(logp[:K], teacher()[:K] - 1.0, atol=1e-3, rtol=0)


def test_O_7_renormalising_says_nothing_about_the_mass_on_the_support() -> None:
    """Scaling the support up or down has gradient 0; the end has the teacher's shape there and not its mass."""
    support = TopK(kind="teacher_top_k", k=K, tail="renormalise")
    z = start().requires_grad_()
    kernel(support)(z).backward()
    assert z.grad[:K].abs().max() > 1e-3 and abs(z.grad[:K].sum().item()) < 1e-15 and z.grad[K:].abs().max() == 0
    before = torch.log_softmax(z.detach(), 0)[:K].exp().sum().item()
    logp = descend(kernel(support))
    mass, _ = facts(logp)
    torch.testing.assert_close(logp[:K].log_softmax(0), teacher()[:K].log_softmax(0), atol=1e-4, rtol=0)
    assert before < 0.2 and mass < 0.35, "far below the teacher's, wherever it started"


def test_O_7_a_bucket_gives_the_mass_a_gradient() -> None:
    z = start().requires_grad_()
    kernel(TopK(kind="teacher_top_k", k=K))(z).backward()
    assert z.grad[:K].sum().item() < -1e-2  # descending it adds to the support
