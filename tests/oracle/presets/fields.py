"""Declared fields, made by the exact oracle: what a preset says that it descends, in the states that its writer visits.

All are means per trained token: divided by how many of those an answer has on average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from opd.objectives.oracle.divergences import Divergence
from opd.objectives.oracle.fields import discounted, gradient, local_field
from opd.objectives.oracle.tabular import Tree
from tests.oracle.presets.tables import World

Table = Callable[[World, int], Tensor]  # of a prompt: [S, V]


def teacher(world: World, prompt: int) -> Tensor:
    return world.scorer("teacher", prompt)


def product(weights: Mapping[str, float]) -> Table:
    """[S, V]: sum_k c_k log m_k; as logits they are the normalised target."""

    def table(world: World, prompt: int) -> Tensor:
        logs = [c * world.tree.logprobs(world.scorer(name, prompt)) for name, c in weights.items()]
        return torch.stack(logs).sum(0)

    return table


def tokens(world: World) -> float:
    """Expected tokens of an answer, summed over prompts."""
    return sum(float(world.tree.visits(world.writer[prompt]).sum()) for prompt in world.asked)


def local(world: World, divergence: Divergence, target: Table = teacher) -> Tensor:
    """[P, S, V]: gradient of E[sum_t D(s_t)] / E[tokens], states held fixed, as the writer visits them."""
    made = torch.zeros_like(world.student)
    for prompt in world.asked:
        made[prompt] = local_field(
            world.tree, world.student[prompt], target(world, prompt), divergence, world.writer[prompt]
        )
    return made / tokens(world)


def weighted_local(world: World, divergence: Divergence, weight: Table, target: Table = teacher) -> Tensor:
    """The same where a state counts only with the weight [S] of what the writer does in it."""
    made, total = torch.zeros_like(world.student), 0.0
    for prompt in world.asked:
        table = world.student[prompt].clone().requires_grad_()
        counted_S = world.tree.visits(world.writer[prompt]) * weight(world, prompt)
        value_S = divergence(world.tree.logprobs(table), world.tree.logprobs(target(world, prompt)))
        made[prompt] = gradient((counted_S * value_S).sum(), table).detach()
        total += float(counted_S.sum())
    return made / total


def policy(world: World, credit: Callable[[World, int], Tensor], *, ratio: bool = True) -> Tensor:
    """[P, S, V]: -E_writer[sum_t (p / writer)(y_t) credit_t grad log p(y_t)] / E[tokens], credit [N, T] a number.

    With the student as writer the ratio is 1, and this is `oracle.return_field`'s sum for any credit.
    """
    tree = world.tree
    made = torch.zeros_like(world.student)
    for prompt in world.asked:
        logp_SV, logw_SV = tree.logprobs(world.student[prompt]), tree.logprobs(world.writer[prompt])
        weight_NT = tree.at_tokens((logp_SV - logw_SV).exp()) if ratio else tree.mask_NT.double()
        strength_NT = tree.chances(world.writer[prompt])[:, None] * weight_NT * credit(world, prompt)
        where = (tree.state_NT[tree.mask_NT], tree.token_NT[tree.mask_NT])
        pull_SV = torch.zeros_like(logp_SV).index_put(where, strength_NT[tree.mask_NT], accumulate=True)
        made[prompt] = -(pull_SV - pull_SV.sum(-1, keepdim=True) * logp_SV.exp())
    return made / tokens(world)


def log_ratio(world: World, prompt: int, target: Table = teacher) -> Tensor:
    """[N, T]: log q~ - log p of every token of every answer, q~ as it is (not normalised)."""
    tree = world.tree
    return tree.at_tokens(target(world, prompt) - tree.logprobs(world.student[prompt]))


def to_go(discount: float, target: Table) -> Callable[[World, int], Tensor]:
    """Credit: the discounted log-ratio of a token and all after it."""
    return lambda world, prompt: discounted(log_ratio(world, prompt, target), discount)


def mean_to_come(discount: float) -> Callable[[World, int], Tensor]:
    """Credit: the discounted log-ratio of what follows, over the number of tokens that follow (MiniLLM)."""

    def credit(world: World, prompt: int) -> Tensor:
        now_NT = log_ratio(world, prompt, lambda w, x: w.tree.logprobs(teacher(w, x)))
        follow_NT = world.tree.mask_NT.double().flip(-1).cumsum(-1).flip(-1) - 1
        return (discounted(now_NT, discount) - now_NT) / follow_NT.clamp(min=1)

    return credit


def of_answers(value_N: Tensor, tree: Tree) -> Tensor:
    """[N, T]: a number of whole answers at each of their tokens."""
    return torch.where(tree.mask_NT, value_N[:, None], 0.0)
