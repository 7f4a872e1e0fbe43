"""A tiny autoregressive model as a table of logits, small enough that every answer can be written down.

A *state* is what has been written so far. The table has one row of logits for every state: softmax(table[s]) is the
distribution of the next token. Expectations over answers are sums over all of them: exact up to float64 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.errors import BadInput

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Every state and every answer over `vocab_size` tokens.

    end          the token that ends an answer; None: all answers are `longest` tokens long.
    longest      an answer without the end token is cut off after so many tokens.
    states       prefixes that something follows, shortest first; `table_SV[i]` belongs to `states[i]`.
    token_NT     int64 [N, T]: all answers, T = longest; 0 where an answer is over.
    mask_NT      bool [N, T]: True at tokens of the answer.
    state_NT     int64 [N, T]: the state that each token was drawn in; 0 where an answer is over.
    """

    vocab_size: int
    end: int | None
    longest: int
    states: tuple[Prefix, ...]
    token_NT: Tensor
    mask_NT: Tensor
    state_NT: Tensor

    @property
    def answers(self) -> int:
        return self.token_NT.shape[0]

    def logprobs(self, table_SV: Tensor) -> Tensor:
        """[S, V]: log-probability of every next token in every state."""
        return torch.log_softmax(table_SV, dim=-1)

    def at_tokens(self, value_SV: Tensor) -> Tensor:
        """[N, T]: a value of (state, token) along every answer, 0 where the answer is over."""
        return torch.where(self.mask_NT, value_SV[self.state_NT, self.token_NT], 0.0)

    def answer_logprobs(self, table_SV: Tensor) -> Tensor:
        """[N]: log-probability of every answer."""
        return self.at_tokens(self.logprobs(table_SV)).sum(-1)

    def chances(self, table_SV: Tensor) -> Tensor:
        """[N]: probability of every answer; they add up to 1."""
        return self.answer_logprobs(table_SV).exp()

    def visits(self, table_SV: Tensor) -> Tensor:
        """[S]: probability that an answer passes through the state."""
        chance_NT = self.chances(table_SV)[:, None].expand_as(self.state_NT)
        visits_S = table_SV.new_zeros(len(self.states))
        return visits_S.index_add(0, self.state_NT[self.mask_NT], chance_NT[self.mask_NT])

    def random_table(self, seed: int, scale: float = 1.0) -> Tensor:
        """float64 [S, V]: normally distributed logits."""
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(len(self.states), self.vocab_size, generator=generator, dtype=torch.float64)


def tree(vocab_size: int, longest: int, end: int | None = None) -> Tree:
    """All answers over `vocab_size` tokens, with at most `longest` of them; `end` is the token that ends one.

    With longest = 1 there is one state, and the model is one distribution over `vocab_size` tokens.
    Raises BadInput for sizes that have no answers, or an end token outside the vocabulary.
    """
    if vocab_size < 2 or longest < 1:
        raise BadInput(f"a tree needs two tokens and one step or more, not {vocab_size} tokens and {longest} steps")
    if end is not None and not 0 <= end < vocab_size:
        raise BadInput(
            f"the end token {end} is outside the vocabulary of {vocab_size}; name one of its tokens, or None"
        )
    states: list[Prefix] = []
    answers: list[Prefix] = []
    level: list[Prefix] = [()]
    for length in range(longest):
        states += level
        longer = [(*prefix, v) for prefix in level for v in range(vocab_size)]
        over = [prefix for prefix in longer if prefix[-1] == end or length + 1 == longest]
        level = [prefix for prefix in longer if prefix[-1] != end]
        answers += over
    index = {prefix: i for i, prefix in enumerate(states)}
    shape = (len(answers), longest)
    token_NT, state_NT = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    mask_NT = torch.zeros(shape, dtype=torch.bool)
    for n, answer in enumerate(answers):
        token_NT[n, : len(answer)] = torch.tensor(answer)
        state_NT[n, : len(answer)] = torch.tensor([index[answer[:t]] for t in range(len(answer))])
        mask_NT[n, : len(answer)] = True
    return Tree(vocab_size, end, longest, tuple(states), token_NT, mask_NT, state_NT)
