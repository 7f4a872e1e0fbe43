"""A vocabulary as large as real ones: what float32 sums over 150,000 entries do to gradients."""

from __future__ import annotations

import pytest
import torch

from opd.config.objective import DivergenceTerm
from opd.config.slots import Full, Sampled, TopK
from opd.objectives.kernels.mixing import Target
from opd.objectives.kernels.reading import Reading, log_softmax, softmax
from opd.objectives.kernels.subset import Subset
from opd.objectives.kernels.tiled import TermRows, TokenRows, tiled_loss
from opd.types import Head, ScorerRows
from tests.objectives.test_tiled import SHAPES

T, V, D = 3, 150_001, 4
CASES = {
    "reverse": ("reverse", Full()),
    "forward": ("forward", Full()),
    "jsd": ("jsd", Full()),
    "sampled": ("reverse", Sampled()),
    "teacher_top_k": ("reverse", TopK(kind="teacher_top_k", k=32)),
    "student_top_k": ("jsd", TopK(kind="student_top_k", k=32)),
}


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("shape, support", CASES.values(), ids=CASES)
def test_O_14_rounding_does_not_grow_with_the_vocabulary(shape: str, support, spread: float) -> None:
    """float32 against float64 of the same numbers; logits of a spread of 4 nats leave most fields nearly cancelled."""
    g = torch.Generator().manual_seed(0)
    states, weights, bias = torch.randn(2, T, D, generator=g), torch.randn(2, V, D, generator=g), torch.zeros(V)
    token_T, ones = torch.randint(0, V, (T,), generator=g), torch.ones(T)
    weights *= spread / D**0.5
    gradients = []
    for dtype in (torch.float64, torch.float32):
        hidden, teacher, weight, head = (x.to(dtype) for x in (*states, *weights))
        bias_V = bias.to(dtype, copy=True).requires_grad_()
        scorer = ScorerRows("a", ones > 0, 1.0, hidden_TD=teacher, head=Head(head, V))
        spec = DivergenceTerm(name="x", shape=SHAPES[shape], support=support)
        term = TermRows(spec, ones.to(dtype), {"a": ones.to(dtype)}, True)
        rows = TokenRows(token_T, ones.to(dtype))
        loss, _ = tiled_loss(
            hidden, Head(weight, V, bias_V), rows, [term], [scorer], student_temperature=1.0, chunk_tokens=2
        )
        loss.backward()
        gradients.append(bias_V.grad)  # of the logits themselves, summed over tokens
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_the_distance_of_log_probabilities_is_exact_where_they_are_far_from_zero() -> None:
    g = torch.Generator().manual_seed(1)
    ours, theirs = torch.randn(2, 3, V, generator=g)
    theirs += 20.0  # a constant says nothing
    every, token = Subset(3), torch.zeros(3, dtype=torch.int64)
    student, scorer = (Reading(every, token, logits_RV=x) for x in (ours, theirs))
    ones = torch.ones(3)
    target = Target(every, {"a": scorer}, {"a": ones}, {"a": every}, unit=True, token_M=token)
    exact = theirs.double().log_softmax(-1) - ours.double().log_softmax(-1)
    assert (target.gap(student, every) - exact).abs().max() < 3e-6
    near = Target(every, {"a": student}, {"a": ones}, {"a": every}, unit=True, token_M=token)
    assert not near.gap(student, every).any()


def test_probabilities_sum_to_one() -> None:
    logits = 4.0 * torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    logp, made = log_softmax(logits), softmax(logits)
    p = made.unscaled_RV / made.sum_R1
    assert (p.double().sum(-1) - 1.0).abs().max() < 2e-7
    torch.testing.assert_close(logp.double(), torch.log_softmax(logits.double(), -1), atol=4e-6, rtol=0)
    assert (logp.double().exp().sum(-1) - 1.0).abs().max() < 1e-6
