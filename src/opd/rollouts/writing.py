"""The loop in which answers are written: slots are filled, every active row gets a token, finished rows leave.

How a model reads a prompt and one more token is a `Decoder`'s business (`lean.py`, `generic.py`); when rows come and
go is decided here, once for both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.rollouts.answers import Answers

PREFILL_TOKENS = 8192  # padded prompt tokens read at once: bounds the activations, changes no result


class Decoder(Protocol):
    """A model with a batch of rows in it, each at its own position.

    joins   whether rows may join a batch that is under way.
    pads    whether prompts of different lengths are read together.
    """

    joins: bool
    pads: bool

    def prefill_size(self, lengths: Sequence[int]) -> int:
        """How many of the next prompts (lengths in falling order) can be read together without padding that hurts."""
        ...

    def prefill(self, prompts: Sequence[Any]) -> tuple[Any, Tensor]:
        """Reads each prompt once: int64 [T] ids, or what else the decoder takes as a prompt. Returns what `join` starts
        rows from, and float32 [P, V] logits of the next token."""
        ...

    def join(self, prefilled: Any, prompt_n: list[int]) -> None:
        """Appends a row per entry, each starting behind that prompt of `prefilled`; an entry may occur many times."""
        ...

    def step(self, token_N: Tensor) -> Tensor:
        """Appends int64 [N] one token to every row; float32 [N, V] logits of the next."""
        ...

    def keep(self, row_n: list[int]) -> None:
        """Row i of the batch becomes what row `row_n[i]` was; `row_n[i] >= i`, and the other rows are dropped."""
        ...


def write(decoder: Decoder, prompts: Sequence[Sized], answers: Answers, *, samples: int, slots: int) -> None:
    """Writes `samples` answers to every prompt into `answers`: rollout n answers prompt n // samples.

    Long prompts go first: prompts read together are then of similar length, and the batch shrinks at the end. A prompt
    is read once for all its samples, also when they do not fit into the free slots at once.
    """
    waiting = deque(sorted(range(len(prompts)), key=lambda p: -len(prompts[p])))
    ready: deque[tuple[int, int]] = deque()  # (prompt within `prefilled`, rollout): read, but not begun
    prefilled: Any = None
    first_PV = torch.empty(0)
    active_N = np.empty(0, dtype=np.int64)  # the rollout in each row
    token_N = torch.empty(0, dtype=torch.int64)
    while waiting or ready or len(active_N):
        while (ready or waiting) and len(active_N) < slots and (decoder.joins or not len(active_N)):
            free = slots - len(active_N)
            if not ready:
                wanted = min(len(waiting), -(-free // samples))
                lengths = [len(prompts[waiting[i]]) for i in range(wanted)]
                chosen = [waiting.popleft() for _ in range(decoder.prefill_size(lengths))]
                prefilled, first_PV = decoder.prefill([prompts[p] for p in chosen])
                ready.extend((i, p * samples + s) for i, p in enumerate(chosen) for s in range(samples))
            begun = [ready.popleft() for _ in range(min(free, len(ready)))]
            rollout_N = np.array([rollout for _, rollout in begun])
            row_N = np.array([row for row, _ in begun])
            drawn_N, goes_on_N = answers.draw(first_PV[torch.from_numpy(row_N).to(first_PV.device)], rollout_N)
            if goes_on_N.any():
                decoder.join(prefilled, row_N[goes_on_N].tolist())
                drawn_N = drawn_N[torch.from_numpy(goes_on_N).to(drawn_N.device)]
                token_N = torch.cat([token_N, drawn_N]) if len(active_N) else drawn_N
                active_N = np.concatenate([active_N, rollout_N[goes_on_N]])
        if not len(active_N):
            continue
        token_N, goes_on_N = answers.draw(decoder.step(token_N), active_N)
        if not goes_on_N.all():
            stay_N = _closed_up(goes_on_N)
            decoder.keep(stay_N.tolist())
            active_N = active_N[stay_N]
            token_N = token_N[torch.from_numpy(stay_N).to(token_N.device)]


def _closed_up(stays_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The staying rows, dense: those behind the new end fill the holes before it, the others keep their place."""
    count = int(stays_N.sum())
    row_n = np.arange(count)
    row_n[~stays_N[:count]] = np.flatnonzero(stays_N[count:]) + count
    return row_n
