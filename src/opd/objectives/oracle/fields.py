"""What can be meant by "the gradient": of the local field, of the sequence-level divergence, or of a return.

The *local field* is the gradient of sum_s d(s) D(s) with the distribution d of states held fixed: how the student
should move in the states it visits, as in GKD and Thinking Machines' OPD. The *sequence-level* gradient also counts
that a token changes which states are visited. Both are [S, V], with respect to the student's table, and exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opd.objectives.oracle.divergences import Divergence
from opd.objectives.oracle.tabular import Tree


def local_objective(
    tree: Tree, student_SV: Tensor, teacher_SV: Tensor, divergence: Divergence, states_of: Tensor | None = None
) -> Tensor:
    """Scalar: sum over states of visits x divergence, the visits held fixed.

    states_of   the table whose answers decide how often a state is visited; None: the student's own.
    """
    visits_S = tree.visits((student_SV if states_of is None else states_of).detach())
    return (visits_S * divergence(tree.logprobs(student_SV), tree.logprobs(teacher_SV))).sum()


def sequence_objective(tree: Tree, student_SV: Tensor, teacher_SV: Tensor, divergence: Divergence) -> Tensor:
    """Scalar: the same sum with visits that follow the student. For reverse KL it is KL(p(answer) || q(answer))."""
    return (tree.visits(student_SV) * divergence(tree.logprobs(student_SV), tree.logprobs(teacher_SV))).sum()


def gradient(objective: Tensor, table_SV: Tensor) -> Tensor:
    """[S, V]: of a scalar made from `table_SV`, still differentiable; zeros when it does not depend on it."""
    (made,) = torch.autograd.grad(objective, table_SV, create_graph=True, allow_unused=True)
    return torch.zeros_like(table_SV) if made is None else made


def local_field(
    tree: Tree, student_SV: Tensor, teacher_SV: Tensor, divergence: Divergence, states_of: Tensor | None = None
) -> Tensor:
    """[S, V]: the gradient of `local_objective`; differentiable when the student's table is."""
    return _of(lambda student: local_objective(tree, student, teacher_SV, divergence, states_of), student_SV)


def sequence_field(tree: Tree, student_SV: Tensor, teacher_SV: Tensor, divergence: Divergence) -> Tensor:
    """[S, V]: the gradient of `sequence_objective`; differentiable when the student's table is."""
    return _of(lambda student: sequence_objective(tree, student, teacher_SV, divergence), student_SV)


def return_field(tree: Tree, student_SV: Tensor, reward_SV: Tensor, discount: float) -> Tensor:
    """[S, V]: minus E_y[sum_t G_t grad log p(y_t)], G_t = sum_{t' >= t} discount^(t' - t) reward(s_t', y_t').

    The gradient to *descend*. Differentiable in both tables: a reward that follows the student says so by its graph,
    but enters as a number, as in every policy gradient.
    """
    reward_NT = tree.at_tokens(reward_SV)
    credit_NT = discounted(reward_NT, discount)
    strength_NT = tree.chances(student_SV)[:, None] * credit_NT
    pull_SV = torch.zeros_like(student_SV).index_put(
        (tree.state_NT[tree.mask_NT], tree.token_NT[tree.mask_NT]), strength_NT[tree.mask_NT], accumulate=True
    )
    # grad log p(y | s) = one_hot(y) - p(. | s), summed over answers.
    return -(pull_SV - pull_SV.sum(-1, keepdim=True) * tree.logprobs(student_SV).exp())


def discounted(value_NT: Tensor, discount: float) -> Tensor:
    """[N, T]: sum_{t' >= t} discount^(t' - t) value_t'."""
    total_N = torch.zeros_like(value_NT[:, 0])
    returns: list[Tensor] = []
    for value_N in value_NT.flip(-1).unbind(-1):
        total_N = value_N + discount * total_N
        returns.append(total_N)
    return torch.stack(returns[::-1], dim=-1)


def _of(objective: Callable[[Tensor], Tensor], table_SV: Tensor) -> Tensor:
    if table_SV.requires_grad:
        return gradient(objective(table_SV), table_SV)
    table = table_SV.detach().requires_grad_()
    return gradient(objective(table), table).detach()
