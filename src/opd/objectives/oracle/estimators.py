"""What an estimator does on average: its exact expected gradient, its bias and its variance.

An estimator makes a loss from sampled answers. Its gradient is a random quantity; here every answer is drawn once, with
the probability it has, so that expectation and variance are sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives.oracle.tabular import Tree


@dataclass(frozen=True)
class Drawn:
    """All answers of a tree at once, as a loss function sees a batch.

    student_NTV    [N, T, V] logits, a leaf that requires a gradient; row n belongs to answer n alone.
    teacher_NTV    [N, T, V] logits.
    token_NT       int64; mask_NT bool; behaviour_NT log-probability of each token under whoever drew it (0 outside).
    """

    student_NTV: Tensor
    teacher_NTV: Tensor
    token_NT: Tensor
    mask_NT: Tensor
    behaviour_NT: Tensor

    def logp_NT(self) -> Tensor:
        """[N, T]: the student's log-probability of each drawn token."""
        return _at_tokens(self.student_NTV, self.token_NT)

    def logq_NT(self) -> Tensor:
        """[N, T]: the teacher's log-probability of each drawn token."""
        return _at_tokens(self.teacher_NTV, self.token_NT)


Estimator = Callable[[Drawn], Tensor]  # to a loss for each answer [N], or for each token [N, T]


@dataclass(frozen=True)
class Moments:
    """mean_SV: the expected gradient; variance: the expected squared distance of one answer's gradient from it."""

    mean_SV: Tensor
    variance: float


@dataclass(frozen=True)
class Bias:
    """How far a gradient is from the declared one: |g - field|, that over |field|, and the cosine between the two."""

    norm: float
    relative: float
    cosine: float


def moments(
    tree: Tree, student_SV: Tensor, teacher_SV: Tensor, estimator: Estimator, behaviour_SV: Tensor | None = None
) -> Moments:
    """Mean and variance of the estimator's gradient over one answer, drawn by `behaviour_SV` (None: the student)."""
    writer_SV = student_SV if behaviour_SV is None else behaviour_SV
    drawn = all_answers(tree, student_SV, teacher_SV, writer_SV)
    loss = estimator(drawn)
    if loss.shape == drawn.token_NT.shape:
        loss = torch.where(drawn.mask_NT, loss, 0.0)
    (gradient_NTV,) = torch.autograd.grad(loss.sum(), drawn.student_NTV, allow_unused=True)
    if gradient_NTV is None:
        return Moments(torch.zeros_like(student_SV), 0.0)
    return over_answers(tree, gradient_NTV, tree.chances(writer_SV.detach()))


def expected_gradient(
    tree: Tree, student_SV: Tensor, teacher_SV: Tensor, estimator: Estimator, behaviour_SV: Tensor | None = None
) -> Tensor:
    """[S, V]: the mean of `moments`."""
    return moments(tree, student_SV, teacher_SV, estimator, behaviour_SV).mean_SV


def all_answers(tree: Tree, student_SV: Tensor, teacher_SV: Tensor, writer_SV: Tensor) -> Drawn:
    """Every answer of the tree; `writer_SV` is who drew them."""
    return Drawn(
        student_NTV=student_SV.detach()[tree.state_NT].requires_grad_(),
        teacher_NTV=teacher_SV.detach()[tree.state_NT],
        token_NT=tree.token_NT,
        mask_NT=tree.mask_NT,
        behaviour_NT=tree.at_tokens(tree.logprobs(writer_SV.detach())),
    )


def over_answers(tree: Tree, gradient_NTV: Tensor, chance_N: Tensor) -> Moments:
    """Moments from the gradient that each answer alone gives with respect to the logits along it."""
    on_table_NSV = gradient_NTV.new_zeros(tree.answers, len(tree.states), tree.vocab_size)
    answer_NT = torch.arange(tree.answers)[:, None].expand_as(tree.state_NT)
    on_table_NSV[answer_NT[tree.mask_NT], tree.state_NT[tree.mask_NT]] = gradient_NTV[tree.mask_NT]
    mean_SV = torch.einsum("n,nsv->sv", chance_N, on_table_NSV)
    spread_N = (on_table_NSV - mean_SV).square().sum((1, 2))
    return Moments(mean_SV, float((chance_N * spread_N).sum()))


def bias(gradient: Tensor, field: Tensor) -> Bias:
    """Of a gradient against the declared field, any equal shapes. The cosine is NaN where one of them is zero."""
    gradient, field = gradient.detach(), field.detach()
    gap = float((gradient - field).norm())
    size, target = float(gradient.norm()), float(field.norm())
    cosine = float((gradient * field).sum()) / (size * target) if size and target else float("nan")
    return Bias(gap, gap / target if target else float("inf") if gap else 0.0, cosine)


def _at_tokens(logits_NTV: Tensor, token_NT: Tensor) -> Tensor:
    return torch.log_softmax(logits_NTV, -1).gather(-1, token_NT[..., None])[..., 0]
