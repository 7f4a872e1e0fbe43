"""What presets descend, and the gradients of what they stand for, on models whose every answer is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives.oracle import Tree, discounted, local_field, return_field, sequence_field, tree
from opd.objectives.oracle import divergences as d

Sizes = tuple[int, int, int | None]
SIZES: Sizes = (5, 3, 0)  # tokens, longest answer, end token
REFERENCE, WEAK, WRITER = 200, 300, 400  # added to the seed of the student
NOISE = 0.1  # on the logits of a near student
K = 2  # of top-k presets, in a vocabulary of five
ALPHA, DISCOUNT = 0.2, 0.95  # minillm's
TOP_P = 0.9  # lsm's


@dataclass(frozen=True)
class Models:
    """One student with everybody whom it may learn from; tables [S, V] of one tree."""

    tree: Tree
    student: Tensor
    teacher: Tensor
    reference: Tensor
    weak: Tensor
    writer: Tensor

    def log(self, **weights: float) -> Tensor:
        """[S, V]: sum_k c_k log m_k, not normalised."""
        return torch.stack([c * self.tree.logprobs(getattr(self, name)) for name, c in weights.items()]).sum(0)


Field = Callable[[Models], Tensor]
Table = Callable[[Models], Tensor]


def models(student: int, teacher_seed: int, sizes: Sizes = SIZES) -> Models:
    vocabulary, longest, end = sizes
    world = tree(vocabulary, longest, end)
    seeds = (student, teacher_seed, student + REFERENCE, student + WEAK, student + WRITER)
    return Models(world, *(world.random_table(seed) for seed in seeds))


def near(m: Models, target: Table, seed: int, noise: float = NOISE) -> Models:
    logits = m.tree.logprobs(target(m)) + m.tree.random_table(seed, noise)
    return Models(m.tree, logits, m.teacher, m.reference, m.weak, m.writer)


# ---- targets -----------------------------------------------------------------------------------------------------


def teacher(m: Models) -> Tensor:
    return m.teacher


def writer(m: Models) -> Tensor:
    return m.writer


def between(m: Models) -> Tensor:
    return m.log(teacher=0.5, reference=0.5)


def beyond(m: Models) -> Tensor:
    return m.log(teacher=1.25, reference=-0.25)


def corrected(m: Models) -> Tensor:
    return m.log(teacher=1.25, weak=-0.25)


def gained(m: Models) -> Tensor:
    return m.log(teacher=1.0, weak=-1.0, reference=1.0)


# ---- fields ------------------------------------------------------------------------------------------------------


def local(divergence: d.Divergence, target: Table = teacher, states_of: Table | None = None) -> Field:
    return lambda m: local_field(m.tree, m.student, target(m), divergence, None if states_of is None else states_of(m))


def sequence(divergence: d.Divergence) -> Field:
    return lambda m: sequence_field(m.tree, m.student, m.teacher, divergence)


def to_the_tilt(target: Table) -> Field:
    """Of KL(p(y) || prod_k m_k(y)^c_k / Z): a return whose rewards are log-linear and not normalised by state."""

    def gradient(m: Models) -> Tensor:
        return return_field(m.tree, m.student, target(m) - m.tree.logprobs(m.student), 1.0)

    return gradient


def from_answers_of(target: Table) -> Field:
    """Of KL(m(y) || p(y)): autograd of the sum over all answers."""

    def gradient(m: Models) -> Tensor:
        table = m.student.clone().requires_grad_()
        chance_N = m.tree.chances(target(m))
        value = (chance_N * (chance_N.log() - m.tree.answer_logprobs(table))).sum()
        return torch.autograd.grad(value, table)[0]

    return gradient


def on_top(divergence: d.Divergence, of: str) -> d.Divergence:
    bucketed = d.bucketed(divergence)
    return lambda logp, logq: bucketed(logp, logq, d.top_k_mask(logq if of == "teacher" else logp, K))


def rescaled_on_top(logp: Tensor, logq: Tensor) -> Tensor:
    return d.renormalised(d.reverse_kl)(logp, logq, d.top_k_mask(logq, K))


def cut(m: Models) -> Tensor:
    """The sampler with top_p: the likeliest tokens that hold this much, and next to nothing for the others."""
    p_SV, order_SV = m.tree.logprobs(m.student).exp().sort(-1, descending=True)
    kept_SV = (p_SV.cumsum(-1) - p_SV < TOP_P).gather(-1, order_SV.argsort(-1))
    return m.student.masked_fill(~kept_SV, d.LOG_ZERO)


def minillm(m: Models) -> Tensor:
    """-E_mixture sum_t [grad E_p log(q / p) + (p / mixture) R_{t+1} grad log p]; R is the mean of what follows."""
    logp_SV, logq_SV = m.tree.logprobs(m.student), m.tree.logprobs(m.teacher)
    mixed_SV = d.mixture(logq_SV, logp_SV, ALPHA)
    now_NT, mask_NT = m.tree.at_tokens(logq_SV - logp_SV), m.tree.mask_NT
    follow_NT = mask_NT.double().flip(-1).cumsum(-1).flip(-1) - 1
    later_NT = (discounted(now_NT, DISCOUNT) - now_NT) / follow_NT.clamp(min=1)
    weight_NT = m.tree.chances(mixed_SV)[:, None] * m.tree.at_tokens((logp_SV - mixed_SV).exp()) * later_NT
    table = m.student.clone().requires_grad_()
    surrogate = -(weight_NT * m.tree.at_tokens(m.tree.logprobs(table))).sum()
    return local_field(m.tree, m.student, m.teacher, d.reverse_kl, mixed_SV) + torch.autograd.grad(surrogate, table)[0]


def reward(m: Models) -> Tensor:
    """[N]: an answer's grade, 0 to 1 in quarters."""
    made = torch.Generator().manual_seed(WRITER)
    return torch.randint(0, 5, (m.tree.answers,), generator=made).double() / 4


def large_group(m: Models) -> Tensor:
    """(r - E[r]) / deviation on every token of an answer."""
    chance_N, reward_N = m.tree.chances(m.student), reward(m)
    gap_N = reward_N - (chance_N * reward_N).sum()
    return rewarded(m, gap_N / (chance_N * gap_N.square()).sum().sqrt())


def groups_of_two(m: Models) -> Tensor:
    """(r - mean) / deviation of two answers is 1 for the better, -1 for the worse one."""
    chance_N, reward_N = m.tree.chances(m.student), reward(m)
    return rewarded(m, (chance_N * (reward_N[:, None] - reward_N).sign()).sum(-1))


def rewarded(m: Models, advantage_N: Tensor) -> Tensor:
    table = m.student.clone().requires_grad_()
    strength_N = m.tree.chances(m.student) * advantage_N
    return torch.autograd.grad(-(strength_N * m.tree.answer_logprobs(table)).sum(), table)[0]


def expected_reward(m: Models) -> Tensor:
    """Minus the gradient of E[r], over the deviation held fixed."""
    table = m.student.clone().requires_grad_()
    chance_N, reward_N = m.tree.chances(table), reward(m)
    mean = (chance_N * reward_N).sum()
    deviation = (chance_N * (reward_N - mean).square()).sum().sqrt().detach()
    return torch.autograd.grad(-mean / deviation, table)[0]
