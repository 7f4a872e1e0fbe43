"""Answers to one prompt are a family: how many padded tokens it costs to read its prompt once, or again for each.

A prompt that is read once costs less, but its answers then stand in a rectangle of their own, which is padded too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WORTH = 0.75  # of the plain tokens: below this, two passes through the layers are faster than one even on a few tokens
CACHE_SHARE = 8  # a layer keeps at least eight times as much of a token as its key and value (costs/memory.py)


def families(prompts_N: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.int64], list[int]]:
    """int64 [N], the number of each one's family, counted as they come; and per family the first that belongs to it.

    Two belong together when their prompts are the same ids.
    """
    numbers: dict[bytes, int] = {}
    firsts: list[int] = []
    family_N = np.empty(len(prompts_N), dtype=np.int64)
    for n, prompt in enumerate(prompts_N):
        key = prompt.tobytes()
        if key not in numbers:
            numbers[key] = len(firsts)
            firsts.append(n)
        family_N[n] = numbers[key]
    return family_N, firsts


@dataclass(frozen=True)
class Padded:
    """The rectangles of some answers, in tokens, from the lengths alone. `+` puts two sets of families together.

    prompts  distinct prompts.          longest_prompt  of them.
    answers  answers of all of them.    longest_answer  of them.
    longest  the longest prompt and answer together.
    """

    prompts: int
    answers: int
    longest_prompt: int
    longest_answer: int
    longest: int

    @classmethod
    def of(cls, prompt_lengths_N: Sequence[int], answer_lengths_N: Sequence[int], prompts: int) -> Padded:
        """Lengths of each answer and of the prompt before it, `prompts` of which are distinct."""
        longest = max(p + a for p, a in zip(prompt_lengths_N, answer_lengths_N, strict=True))
        return cls(prompts, len(answer_lengths_N), max(prompt_lengths_N), max(answer_lengths_N), longest)

    def __add__(self, other: Padded) -> Padded:
        return Padded(
            self.prompts + other.prompts,
            self.answers + other.answers,
            max(self.longest_prompt, other.longest_prompt),
            max(self.longest_answer, other.longest_answer),
            max(self.longest, other.longest),
        )

    @property
    def plain(self) -> int:
        """Every answer behind a prompt of its own."""
        return self.answers * self.longest

    @property
    def shared(self) -> int:
        """Every prompt once, and the answers without their last token, which predicts nothing."""
        return self.prompts * self.longest_prompt + self.answers * max(self.longest_answer - 1, 0)

    @property
    def pays(self) -> bool:
        """Whether prompts should be read once."""
        return self.prompts < self.answers and self.shared <= WORTH * self.plain

    @property
    def read(self) -> int:
        """Tokens that go through the layers in the better of the two ways."""
        return self.shared if self.pays else self.plain

    @property
    def held(self) -> int:
        """What sharing holds in memory: its tokens, and keys and values of the prompt again for each answer."""
        return self.shared + self.answers * self.longest_prompt // CACHE_SHARE
