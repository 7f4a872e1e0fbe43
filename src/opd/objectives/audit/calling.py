"""Calling somebody else's loss function: what it is given, what it may return, and the gradient it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opd.errors import BadInput
from opd.objectives.oracle.estimators import Drawn
from opd.objectives.oracle.tabular import Tree

# (student_logits [N, T, V], teacher_logits [N, T, V], tokens int64 [N, T], mask bool [N, T],
#  behaviour_logprobs [N, T]) -> a scalar, or a loss per token [N, T]. Row t of the logits predicts tokens[:, t].
LossFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def answer(tree: Tree, n: int, student_SV: Tensor, teacher_SV: Tensor, writer_SV: Tensor | None = None) -> Drawn:
    """Answer `n` of the tree alone, without padding: every field is [1, T] or [1, T, V] with T its length."""
    length = int(tree.mask_NT[n].sum())
    state_T, token_T = tree.state_NT[n, :length], tree.token_NT[n, :length]
    writer_SV = student_SV if writer_SV is None else writer_SV
    return Drawn(
        student_NTV=student_SV[state_T][None].clone(),
        teacher_NTV=teacher_SV[state_T][None].clone(),
        token_NT=token_T[None].clone(),
        mask_NT=torch.ones(1, length, dtype=torch.bool),
        behaviour_NT=tree.logprobs(writer_SV)[state_T, token_T][None].clone(),
    )


def padded(drawn: Drawn, length: int, fill: float = 0.0) -> Drawn:
    """The same rows with masked positions behind them up to `length`; their logits and log-probabilities are `fill`."""
    more = length - drawn.token_NT.shape[1]
    N, _, V = drawn.student_NTV.shape
    # Numbers that differ by token: equal logits would be a uniform distribution whatever their size.
    junk_NTV = fill * torch.arange(1, V + 1, dtype=drawn.student_NTV.dtype).expand(N, more, V)
    return Drawn(
        student_NTV=torch.cat([drawn.student_NTV, junk_NTV], 1),
        teacher_NTV=torch.cat([drawn.teacher_NTV, junk_NTV.flip(-1)], 1),
        token_NT=torch.cat([drawn.token_NT, torch.zeros(N, more, dtype=torch.int64)], 1),
        mask_NT=torch.cat([drawn.mask_NT, torch.zeros(N, more, dtype=torch.bool)], 1),
        behaviour_NT=torch.cat([drawn.behaviour_NT, torch.full((N, more), fill, dtype=drawn.behaviour_NT.dtype)], 1),
    )


def together(rows: Sequence[Drawn]) -> Drawn:
    """One batch of several answers, padded to the longest."""
    longest = max(row.token_NT.shape[1] for row in rows)
    same = [padded(row, longest) for row in rows]
    return Drawn(*(torch.cat([getattr(row, f.name) for row in same]) for f in dataclasses.fields(Drawn)))


def masked(drawn: Drawn, mask_NT: Tensor) -> Drawn:
    """The same rows with another mask."""
    return dataclasses.replace(drawn, mask_NT=mask_NT)


def call(loss: LossFunction, drawn: Drawn) -> Tensor:
    """What the function returns for these rows, checked: a scalar, or [N, T].

    Raises BadInput when it raises, or returns anything else.
    """
    try:
        made = loss(drawn.student_NTV, drawn.teacher_NTV, drawn.token_NT, drawn.mask_NT, drawn.behaviour_NT)
    except Exception as error:
        raise BadInput(
            f"the loss function raised {type(error).__name__}: {error}. It is called as loss(student_logits [N, T, V], "
            f"teacher_logits [N, T, V], tokens [N, T], mask [N, T], behaviour_logprobs [N, T]), here with N, T, V = "
            f"{tuple(drawn.student_NTV.shape)}; a top-k must fit into V"
        ) from error
    shape = tuple(drawn.token_NT.shape)
    if not isinstance(made, Tensor) or not made.is_floating_point() or tuple(made.shape) not in ((), shape):
        got = f"{made.dtype} {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise BadInput(f"the loss function returned {got}; return a floating scalar, or a loss per token {shape}")
    return made


def gradient(loss: LossFunction, drawn: Drawn) -> Tensor:
    """[N, T, V]: of the function's loss with respect to the student's logits; 0 when it does not depend on them.

    A loss per token is summed over unmasked tokens. Raises BadInput as `call` does.
    """
    student_NTV = drawn.student_NTV.detach().clone().requires_grad_()
    made = call(loss, dataclasses.replace(drawn, student_NTV=student_NTV))
    if made.dim():
        made = torch.where(drawn.mask_NT, made, 0.0).sum()
    if not made.requires_grad:
        return torch.zeros_like(student_NTV)
    (grad_NTV,) = torch.autograd.grad(made, student_NTV, allow_unused=True)
    return torch.zeros_like(student_NTV) if grad_NTV is None else grad_NTV


def teacher_gradient(loss: LossFunction, drawn: Drawn) -> Tensor:
    """[N, T, V]: with respect to the teacher's logits, which ought to be held fixed."""
    teacher_NTV = drawn.teacher_NTV.detach().clone().requires_grad_()
    student_NTV = drawn.student_NTV.detach().clone().requires_grad_()
    made = call(loss, dataclasses.replace(drawn, student_NTV=student_NTV, teacher_NTV=teacher_NTV))
    if made.dim():
        made = torch.where(drawn.mask_NT, made, 0.0).sum()
    if not made.requires_grad:
        return torch.zeros_like(teacher_NTV)
    (grad_NTV,) = torch.autograd.grad(made, teacher_NTV, allow_unused=True)
    return torch.zeros_like(teacher_NTV) if grad_NTV is None else grad_NTV
