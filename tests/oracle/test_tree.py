"""The oracle's own parts: the enumeration is complete, the fields are gradients, and rest is where the flow ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import BadInput
from opd.objectives import oracle
from opd.objectives.oracle import divergences


@settings(max_examples=20, deadline=None)
@given(v=st.integers(2, 4), longest=st.integers(1, 3), ends=st.booleans(), seed=st.integers(0, 99))
def test_every_answer_is_there_once_and_visits_are_sums_of_chances(v: int, longest: int, ends: bool, seed: int) -> None:
    tree = oracle.tree(v, longest, end=0 if ends else None)
    table = tree.random_table(seed, scale=2.0)
    chances = tree.chances(table)
    assert float(chances.sum()) == pytest.approx(1.0, abs=1e-12)
    written = {tuple(t[m].tolist()) for t, m in zip(tree.token_NT, tree.mask_NT, strict=True)}
    assert len(written) == tree.answers
    assert all(len(a) == longest or a[-1] == 0 for a in written)
    visits = tree.visits(table)
    for i, state in enumerate(tree.states):
        through = [c for c, t in zip(chances, tree.token_NT, strict=True) if tuple(t[: len(state)].tolist()) == state]
        longer = sum(float(c) for c in through)
        assert float(visits[i]) == pytest.approx(longer, abs=1e-12)


def test_sequence_objective_is_kl_over_whole_answers_and_its_field_is_the_return_with_discount_1() -> None:
    tree = oracle.tree(4, 3, end=1)
    student, teacher = tree.random_table(0).requires_grad_(), tree.random_table(1)
    logp, logq = tree.answer_logprobs(student), tree.answer_logprobs(teacher)
    whole = (logp.exp() * (logp - logq)).sum()
    torch.testing.assert_close(
        oracle.sequence_objective(tree, student, teacher, divergences.reverse_kl), whole, atol=1e-14, rtol=0
    )
    (by_hand,) = torch.autograd.grad(whole, student)
    reward = (tree.logprobs(teacher) - tree.logprobs(student)).detach()
    for made in (
        oracle.sequence_field(tree, student, teacher, divergences.reverse_kl),
        oracle.return_field(tree, student, reward, 1.0),
    ):
        torch.testing.assert_close(made.detach(), by_hand, atol=1e-14, rtol=0)
    local = oracle.local_field(tree, student, teacher, divergences.reverse_kl)
    torch.testing.assert_close(local, oracle.return_field(tree, student, reward, 0.0), atol=1e-14, rtol=0)
    assert oracle.bias(local, by_hand).relative > 0.1  # the two are not the same thing


def test_moments_are_those_of_drawn_answers() -> None:
    tree = oracle.tree(3, 2, end=0)
    student, teacher = tree.random_table(3), tree.random_table(4)

    def estimator(drawn: oracle.Drawn) -> torch.Tensor:
        return (drawn.logp_NT() - drawn.logq_NT()).detach() * drawn.logp_NT()

    exact = oracle.moments(tree, student, teacher, estimator)
    drawn = torch.multinomial(
        tree.chances(student), 20_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    one_by_one = []
    for n in range(tree.answers):
        table = student.clone().requires_grad_()
        logp, logq = tree.logprobs(table), tree.logprobs(teacher)
        pairs = [(s, t) for s, t, m in zip(tree.state_NT[n], tree.token_NT[n], tree.mask_NT[n], strict=True) if m]
        loss = sum((logp[s, t] - logq[s, t]).detach() * logp[s, t] for s, t in pairs)
        (gradient,) = torch.autograd.grad(loss, table)  # pyright: ignore[reportArgumentType]
        one_by_one.append(gradient)
    sampled = torch.stack(one_by_one)[drawn]
    torch.testing.assert_close(sampled.mean(0), exact.mean_SV, atol=0.02, rtol=0)
    spread = float((sampled - sampled.mean(0)).square().sum((1, 2)).mean())
    assert spread == pytest.approx(exact.variance, rel=0.05)


def test_a_fixed_point_is_where_small_steps_of_gradient_descent_end() -> None:
    tree = oracle.tree(3, 1)
    start, teacher = tree.random_table(0), tree.random_table(1)

    def field(table: torch.Tensor) -> torch.Tensor:
        return oracle.local_field(tree, table, teacher, divergences.forward_kl)

    table = start.clone()
    for _ in range(4000):
        table = table - 0.1 * field(table)
    found = oracle.fixed_point(field, start)
    torch.testing.assert_close(tree.logprobs(found), tree.logprobs(table), atol=1e-9, rtol=0)
    with pytest.raises(ArithmeticError, match="no fixed point after 3 steps"):
        oracle.fixed_point(field, start, most_steps=3)


@pytest.mark.parametrize(("v", "longest", "end"), [(1, 2, None), (3, 0, None), (3, 2, 3)])
def test_sizes_without_answers_are_refused(v: int, longest: int, end: int | None) -> None:
    with pytest.raises(BadInput):
        oracle.tree(v, longest, end)
