"""Models that are tables, behind the real learner: every answer of a step is there as often as it is likely.

A table model is a real module for `CausalLM`: its body looks up which state a prefix is (one-hot), and its head's
weight is the table, so that the gradient of the head is the gradient of the table, [P, S, V] for P prompts, S states of
`oracle.Tree` and V tokens. Student, scorers and answers go through the real `LocalLearner`, `Objective`, `Panel` and
kernel.

**What an expectation is here.** Writers have probabilities that are multiples of 1 / units, so a step of units^longest
answers can hold every answer exactly as often as it is likely. The gradient of such a *population step* is the limit of
large batches: sums are expectations, and denominators (tokens of the step for token_mean, answers for sequence_mean)
are the code's own, nothing is undone afterwards. A 1 / |y| inside the expectation would show. What steps of few answers
add to it is measured in `test_denominators.py`.

Recorded log-probabilities are float32 on the wire. Here they are kept in float64 (`conftest.py`), so that what is
measured is the estimator; what the rounding does is a number in `test_denominators.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from opd.config.objective import Objective as ObjectiveSpec
from opd.models.causal import CausalLM
from opd.objectives.oracle.tabular import Tree
from opd.teachers.local import LocalTeacher
from opd.text.agreement import Agreement
from opd.types import Prompt, Rollout, Row
from tests import rooms


class Body(nn.Module):
    """Prefixes to one-hot states; a prefix that is no state gives zeros."""

    def __init__(self, tree: Tree, prompts: int) -> None:
        super().__init__()
        keys = [(p, *state) for p in range(prompts) for state in tree.states]
        self.index: dict[tuple[int, ...], int] = {key: n for n, key in enumerate(keys)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        hidden_NSD = torch.zeros(*input_ids.shape, len(self.index), dtype=torch.float64)
        for n, (ids, there) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            read: tuple[int, ...] = ()
            for s, (token, real) in enumerate(zip(ids, there, strict=True)):
                read = (*read, token) if real else read
                if real and read in self.index:
                    hidden_NSD[n, s, self.index[read]] = 1.0
        return SimpleNamespace(last_hidden_state=hidden_NSD)


class TableModule(nn.Module):
    """What `CausalLM` needs of a transformers model."""

    def __init__(self, tree: Tree, table_PSV: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.body = Body(tree, len(table_PSV))
        self.head = nn.Linear(len(self.body.index), tree.vocab_size, bias=False, dtype=torch.float64)
        self.head.weight.data.copy_(table_PSV.flatten(0, 1).T)

    def get_decoder(self) -> Body:
        return self.body

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body(input_ids, attention_mask).last_hidden_state))


def table_model(tree: Tree, table_PSV: Tensor) -> CausalLM:
    return CausalLM(
        TableModule(tree, table_PSV), vocab_size=tree.vocab_size, compute_dtype=torch.float64, name="a table"
    )


class BareFormat:
    """Prompt ids without text. `instead` says which prompt a scorer reads in the place of the student's."""

    fingerprint = "bare-format"
    tokenizer = SimpleNamespace(vocab_size=0)  # the models have all that there is of it

    def __init__(self, instead: Mapping[int, int] | None = None) -> None:
        self.instead = instead or {}

    def prompt_ids(self, row: Row) -> np.ndarray:
        asked = int(row.columns["prompt"])
        return np.array([self.instead.get(asked, asked)], dtype=np.int64)


@dataclass(frozen=True)
class World:
    """Student, scorers and writer of a step, as tables of logits [P, S, V].

    asked    the prompts of the step, and the domain of each.
    instead  scorer to {prompt of the student: prompt that it reads}.
    rewards  of every answer of the tree, [N].
    temperatures  scorer to what its logits are divided by, where that is not 1.
    """

    tree: Tree
    student: Tensor
    writer: Tensor
    scorers: Mapping[str, Tensor] = field(default_factory=dict)
    asked: Mapping[int, str] = field(default_factory=lambda: {0: "x"})
    instead: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    rewards: Tensor | None = None
    temperatures: Mapping[str, float] = field(default_factory=dict)

    def scorer(self, name: str, prompt: int) -> Tensor:
        """[S, V]: the scorer's table for a prompt of the student."""
        return self.scorers[name][self.instead.get(name, {}).get(prompt, prompt)]

    def answer(self, n: int) -> tuple[int, ...]:
        return tuple(self.tree.token_NT[n][self.tree.mask_NT[n]].tolist())


def shares(tree: Tree, units: Sequence[int], *, seed: int, prompts: int = 1) -> Tensor:
    """[P, S, V]: logits of distributions that hold the numbers in `units` over their sum, shuffled in every state."""
    shuffled = np.random.default_rng(seed)
    rows = [shuffled.permutation(units) for _ in range(prompts * len(tree.states))]
    made = torch.from_numpy(np.stack(rows)).double().view(prompts, len(tree.states), tree.vocab_size)
    return (made / sum(units)).log()


def noisy(table: Tensor, scale: float, seed: int) -> Tensor:
    """The table with normal noise on its logits."""
    made = torch.Generator().manual_seed(seed)
    return table + scale * torch.randn(table.shape, generator=made, dtype=table.dtype)


def counts(tree: Tree, table_SV: Tensor, units: int) -> list[int]:
    """How often each answer occurs among units^longest."""
    exact = tree.chances(table_SV) * float(units) ** tree.longest
    made = exact.round()
    assert float((exact - made).abs().max()) < 1e-6, "the writer's probabilities are no multiples of 1 / units"
    return [int(n) for n in made]


def rollout(world: World, prompt: int, n: int, key: str, row: str, behaviour: str = "student") -> Rollout:
    """The answer n of the tree with the writer's own log-probabilities; NaN where it is the data's."""
    tree, ids = world.tree, world.answer(n)
    logprobs_T = tree.at_tokens(tree.logprobs(world.writer[prompt]))[n, : len(ids)].numpy()
    asked = Row(id=row, domain=world.asked[prompt], prompt="", columns={"prompt": prompt})
    return Rollout(
        id=key,
        prompt=Prompt(row=asked, ids=np.array([prompt], dtype=np.int64)),
        response_ids=np.array(ids, dtype=np.int64),
        behaviour_logprobs=np.full_like(logprobs_T, np.nan) if behaviour == "dataset" else logprobs_T,
        mask=np.ones(len(ids), dtype=np.bool_),
        policy_version=0,
        behaviour=behaviour,  # type: ignore[arg-type]
        finish_reason="stop" if ids[-1] == tree.end else "length",
        reward=None if world.rewards is None else float(world.rewards[n]),
    )


def population(world: World, units: int, behaviour: str = "student") -> list[Rollout]:
    """One group of answers for every prompt: each as often as the writer gives it."""
    made: list[Rollout] = []
    for prompt in world.asked:
        for n, often in enumerate(counts(world.tree, world.writer[prompt], units)):
            one = rollout(world, prompt, n, "one", f"x/{prompt}", behaviour)
            made += [dataclasses.replace(one, id=f"{behaviour}/{prompt}/{n}/{copy}") for copy in range(often)]
    return made


def pairs(world: World, units: int) -> list[Rollout]:
    """Groups of two answers to one prompt: every pair as often as the writer gives it."""
    made: list[Rollout] = []
    for prompt in world.asked:
        often = counts(world.tree, world.writer[prompt], units)
        drawn = [rollout(world, prompt, n, "one", "x") for n, copies in enumerate(often) for _ in range(copies)]
        for i, first in enumerate(drawn):
            for j, second in enumerate(drawn):
                row = dataclasses.replace(first.prompt.row, id=f"x/{prompt}/{i}/{j}")
                asked = dataclasses.replace(first.prompt, row=row)
                made += [
                    dataclasses.replace(one, id=f"{row.id}/{k}", prompt=asked) for k, one in enumerate((first, second))
                ]
    return made


def gradient(
    world: World, spec: ObjectiveSpec, rollouts_N: Sequence[Rollout], *, special_ids: frozenset[int] = frozenset()
) -> Tensor:
    """[P, S, V]: what the real learner leaves in the gradient of the student's table after one step."""
    student = table_model(world.tree, world.student)
    members = [
        LocalTeacher(
            table_model(world.tree, table),
            BareFormat(world.instead.get(name)),  # type: ignore[arg-type]
            Agreement(vocab_size=world.tree.vocab_size),
            name=name,
            temperature=world.temperatures.get(name, 1.0),
            chunk_tokens=4096,
            share_prompts=True,
        )
        for name, table in world.scorers.items()
    ]
    learner = rooms.learner(
        student, spec, special_ids=special_ids, tokens_per_micro_batch=100_000, learner={"chunk_tokens": 4096}
    )
    learner.gradients(rollouts_N, rooms.panel(*members).evidence(rollouts_N) if members else None)
    made = student.module.head.weight.grad
    return made.T.reshape(world.student.shape).clone()
