"""Expectations by going over all answers, one by one: a loss for every token of one, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.oracle.presets.tables import World


@dataclass(frozen=True)
class Answer:
    """One answer, as a loss sees it.

    logp_TV         log-probabilities of the student; carries the gradient.
    scored          scorer to [T, V].
    token_T         the tokens; drawn_T their log-probability when they were drawn.
    domain, reward  of the answer.
    place           prompt and number of the answer.
    """

    logp_TV: Tensor
    scored: Mapping[str, Tensor]
    token_T: Tensor
    drawn_T: Tensor
    domain: str
    reward: float
    place: tuple[int, int]

    @property
    def logq_TV(self) -> Tensor:
        return self.scored["teacher"]

    @property
    def p_TV(self) -> Tensor:
        return self.logp_TV.exp()

    @property
    def q_TV(self) -> Tensor:
        return self.logq_TV.exp()

    @property
    def logp_T(self) -> Tensor:
        return self.at(self.logp_TV)

    @property
    def logq_T(self) -> Tensor:
        return self.at(self.logq_TV)

    @property
    def ratio_T(self) -> Tensor:
        return (self.logp_T - self.drawn_T).exp()

    def at(self, value_TV: Tensor) -> Tensor:
        return value_TV[torch.arange(len(self.token_T)), self.token_T]


Loss = Callable[[Answer], Tensor]  # to a loss for every token [T]; NaN at tokens that are not trained


def held(value: Tensor) -> Tensor:
    return value.detach()


def mean_over_answers(world: World, loss: Loss, *, by_answer: bool = False) -> Tensor:
    """[P, S, V]: the gradient of E[sum of losses] / E[number of trained tokens], answers drawn by the writer.

    by_answer  of E[mean of an answer's own losses] instead (over answers with a trained token).
    """
    table = world.student.clone().requires_grad_()
    total, count = torch.zeros((), dtype=torch.float64), 0.0
    for prompt, domain in world.asked.items():
        for n in range(world.tree.answers):
            token_T = torch.tensor(world.answer(n))
            state_T = torch.tensor([world.tree.states.index(world.answer(n)[:t]) for t in range(len(token_T))])
            logs = {
                name: torch.log_softmax(values, -1)
                for name, values in (
                    ("student", table[prompt][state_T]),
                    ("writer", world.writer[prompt][state_T]),
                    *((key, world.scorer(key, prompt)[state_T]) for key in world.scorers),
                )
            }
            made = Answer(
                logp_TV=logs.pop("student"),
                scored=logs,
                token_T=token_T,
                drawn_T=logs["writer"][torch.arange(len(token_T)), token_T],
                domain=domain,
                reward=math.nan if world.rewards is None else float(world.rewards[n]),
                place=(prompt, n),
            )
            chance = float(made.drawn_T.sum().exp())
            loss_T = loss(made)
            loss_T = loss_T[~held(loss_T).isnan()]
            if len(loss_T):
                total = total + chance * (loss_T.mean() if by_answer else loss_T.sum())
                count += chance * (1 if by_answer else len(loss_T))
    (made,) = torch.autograd.grad(total / count, table)
    return made


def in_pairs(world: World, loss: Loss) -> Loss:
    """The mean of a loss over the second answer of a group of two: `reward` becomes (r - mean) / deviation [3.4]"""

    def mean(a: Answer) -> Tensor:
        prompt, n = a.place
        assert world.rewards is not None
        total = torch.zeros_like(a.logp_T)
        for other, chance in enumerate(world.tree.chances(world.writer[prompt]).tolist()):
            group = torch.stack([world.rewards[n], world.rewards[other]])
            spread = group.std(correction=0)
            advantage = float((group[0] - group.mean()) / spread) if spread > 0 else 0.0
            total = total + chance * loss(replace(a, reward=advantage))
        return total

    return mean


def standardised(world: World) -> World:
    """The world with rewards that are (r - mean) / deviation over all answers to a prompt."""
    assert world.rewards is not None and len(world.asked) == 1
    (prompt,) = world.asked
    chance_N = world.tree.chances(world.writer[prompt])
    gap_N = world.rewards - (chance_N * world.rewards).sum()
    return replace(world, rewards=gap_N / (chance_N * gap_N.square()).sum().sqrt())
