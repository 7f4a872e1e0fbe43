"""A span's advantage is every student token's (methods 1.7): student spans of two tokens, one teacher score each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd.objectives import oracle

V, SPANS, WIDTH = 3, 2, 2
TREE = oracle.tree(V, SPANS * WIDTH)


def span_scores(seed: int) -> Tensor:
    """[N, SPANS]: the teacher's log-probability of each span of each answer, given the spans before it."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(V**WIDTH, generator=generator, dtype=torch.float64).log_softmax(-1)
    second = torch.randn(V**WIDTH, V**WIDTH, generator=generator, dtype=torch.float64).log_softmax(-1)
    index = TREE.token_NT[:, 0::2] * V + TREE.token_NT[:, 1::2]
    return torch.stack([first[index[:, 0]], second[index[:, 0], index[:, 1]]], dim=-1)


def by_span(value_NT: Tensor) -> Tensor:
    """[N, SPANS, WIDTH]."""
    return value_NT.view(-1, SPANS, WIDTH)


def exact(student: Tensor, score_NS: Tensor) -> Tensor:
    """The gradient of sum over spans of KL(span), the spans before it held fixed."""
    table = student.clone().requires_grad_()
    logp_NS = by_span(TREE.at_tokens(TREE.logprobs(table))).sum(-1)
    # p(first) [KL of the first] + sg(p(first)) [KL of the second given the first], summed over whole answers.
    first = (logp_NS.sum(-1).exp() * (logp_NS[:, 0] - score_NS[:, 0])).sum()
    second = (logp_NS[:, 0].exp().detach() * logp_NS[:, 1].exp() * (logp_NS[:, 1] - score_NS[:, 1])).sum()
    # Summed over second spans, p(second | first) is 1: the first term has no second span in it.
    (gradient,) = torch.autograd.grad(first + second, table)
    return gradient


def broadcast(a_NS: Tensor, logp: Tensor) -> Tensor:
    return a_NS[..., None].expand(-1, -1, WIDTH)


def causal(a_NS: Tensor, logp: Tensor) -> Tensor:
    """What the student said earlier in the span is taken out again: it does not depend on this token."""
    earlier = logp.cumsum(-1) - logp
    return a_NS[..., None] + earlier


def last_only(a_NS: Tensor, logp: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(a_NS), a_NS], dim=-1)


def equal_split(a_NS: Tensor, logp: Tensor) -> Tensor:
    return a_NS[..., None].expand(-1, -1, WIDTH) / WIDTH


RULES = {"broadcast": broadcast, "causal": causal, "last_only": last_only, "equal_split": equal_split}


def bias_of(rule: str, seed: int) -> oracle.Bias:
    student, score_NS = TREE.random_table(seed), span_scores(seed + 10)

    def estimator(drawn: oracle.Drawn) -> Tensor:
        logp = by_span(drawn.logp_NT())
        a_NS = score_NS - logp.detach().sum(-1)
        return -(RULES[rule](a_NS, logp.detach()) * logp).sum((1, 2))

    made = oracle.expected_gradient(TREE, student, student, estimator)
    return oracle.bias(made, exact(student, score_NS))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["broadcast", "causal"])
def test_A_8_broadcast_and_its_causal_variant_are_exact(rule: str, seed: int) -> None:
    assert bias_of(rule, seed).relative < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_A_8_last_token_only_and_equal_split_are_wrong(seed: int) -> None:
    # Absolute errors of a published toy: .26 for the last token only, .13 for equal shares.
    last, split = bias_of("last_only", seed), bias_of("equal_split", seed)
    assert 0.1 < split.norm < 1 and 0.1 < last.norm < 1
    assert split.relative == pytest.approx(0.5, abs=1e-12)  # half of everything, for spans of two tokens
    assert last.relative > 0.3 and last.cosine < 0.95
