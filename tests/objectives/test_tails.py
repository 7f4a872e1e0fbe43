"""What is done about the rest of the vocabulary, where it has next to no mass."""

from __future__ import annotations

import math

import pytest
import torch

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ForwardKL, ReverseKL
from opd.config.slots import TopK
from opd.objectives.kernels.tiled import TermRows, TermValues, TokenRows, tiled_loss
from opd.types import Head, ScorerRows

V, K, FLOOR = 40, 2, 1e-6


def logits(tail: float, dtype: torch.dtype, *, first: float = 0.6) -> torch.Tensor:
    """Log-probabilities whose first two entries share all mass but `tail`, which is spread over the others evenly."""
    mass = [first * (1 - tail), (1 - first) * (1 - tail), *[tail / (V - K)] * (V - K)]
    return torch.tensor(mass, dtype=dtype).log()


def bucket(z: torch.Tensor, logq: torch.Tensor, shape=None) -> tuple[torch.Tensor, TermValues]:
    """Gradient with respect to the logits, and facts, of a bucket around the teacher's two likeliest."""
    z = z.clone().requires_grad_()
    eye, ones = torch.eye(V, dtype=z.dtype), torch.ones(1, dtype=z.dtype)
    scorer = ScorerRows("a", ones > 0, 1.0, hidden_TD=logq[None], head=Head(eye, V))
    term = DivergenceTerm(name="x", shape=shape or ReverseKL(), support=TopK(kind="teacher_top_k", k=K, floor=FLOOR))
    rows = TokenRows(torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    loss, values = tiled_loss(
        z[None], Head(eye, V), rows, [TermRows(term, ones, {"a": ones}, True)], [scorer], student_temperature=1.0,
        chunk_tokens=1,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, z)
    return gradient, values.terms["x"]


def test_tail_masses_are_sums_over_the_tail() -> None:
    """In float32, 1 - P_S of a tail of 5e-6 is off by a hundredth of it, and the gradient by as much."""
    p, q = 5e-6, 2e-5
    expected = -p * (
        math.log(q / p) - math.log((1 - q) / (1 - p))
    )  # -p_tail (h_tail - E_p[h]), E_p[h] = h on S up to p
    found = {}
    for dtype in (torch.float32, torch.float64):
        gradient, values = bucket(logits(p, dtype), logits(q, dtype))
        assert not values.unresolved_T.any()
        found[dtype] = gradient[K:].double().sum().item()
    assert found[torch.float64] == pytest.approx(expected, rel=1e-4)
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-4)


@pytest.mark.parametrize("shape", [ReverseKL(), ForwardKL()], ids=lambda shape: shape.kind)
@pytest.mark.parametrize("q", [1e-9, 1e-14])
def test_the_targets_tail_is_held_above_the_floor(shape, q: float) -> None:
    """Where the student has a tail and the target none to speak of, h of the tail is that of the floor: log(floor / p)
    of reverse KL, and not hundreds of nats from rounding noise."""
    p = 0.2
    gradient, values = bucket(logits(p, torch.float64), logits(q, torch.float64), shape)
    on_s = [0.6 * (1 - p), 0.4 * (1 - p)]
    ratios = [0.6 * (1 - q) / on_s[0], 0.4 * (1 - q) / on_s[1], FLOOR / p]
    h = [math.log(r) if isinstance(shape, ReverseKL) else r - 1 for r in ratios]
    mean = on_s[0] * h[0] + on_s[1] * h[1] + p * h[2]
    expected = [-on_s[0] * (h[0] - mean), -on_s[1] * (h[1] - mean), -p * (h[2] - mean)]
    assert [*gradient[:K].tolist(), gradient[K:].sum().item()] == pytest.approx(expected, rel=1e-9)
    assert not values.unresolved_T.any() and values.target_mass_T.item() == pytest.approx(1 - q)
