"""Rollouts into micro-batches: sorted by length, padded to a rectangle, response tokens flattened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opd.models.padding import pad
from opd.types import Batch, Rollout


def plan(rollouts_N: Sequence[Rollout], tokens_per_micro_batch: int) -> list[list[Rollout]]:
    """Groups of rollouts of similar length whose padded rectangles hold at most `tokens_per_micro_batch` tokens.

    A single sequence longer than the budget gets a micro-batch of its own. Ties keep an order that depends on ids only,
    so the same set of rollouts gives the same plan in whatever order it arrives.
    """
    ordered = sorted(rollouts_N, key=lambda r: (_length(r), r.id))
    groups: list[list[Rollout]] = []
    for rollout in ordered:  # ascending: the newest member is the longest of its group
        if groups and (len(groups[-1]) + 1) * _length(rollout) <= tokens_per_micro_batch:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return groups


def pack(rollouts: Sequence[Rollout], *, device: torch.device, side: Literal["left", "right"] = "right") -> Batch:
    """One micro-batch. The state at a token's predecessor predicts it, hence column = its own column - 1."""
    sequences = [np.concatenate([r.prompt.ids, r.response_ids]) for r in rollouts]
    ids_NS, attention_NS, positions_NS = pad(sequences, device=device, side=side)
    width = ids_NS.shape[1]
    rows, columns = [], []
    for n, rollout in enumerate(rollouts):
        start = width - len(sequences[n]) if side == "left" else 0
        first = start + len(rollout.prompt.ids) - 1
        rows.append(np.full(len(rollout.response_ids), n))
        columns.append(np.arange(first, first + len(rollout.response_ids)))
    row_T = _tensor(rows, torch.int64, device)
    return Batch(
        rollouts=tuple(rollouts),
        ids_NS=ids_NS,
        attention_NS=attention_NS,
        positions_NS=positions_NS,
        row_T=row_T,
        column_T=_tensor(columns, torch.int64, device),
        token_T=_tensor([r.response_ids for r in rollouts], torch.int64, device),
        behaviour_T=_tensor([r.behaviour_logprobs for r in rollouts], torch.float32, device),
        mask_T=_tensor([r.mask for r in rollouts], torch.bool, device),
    )


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.ids) + len(rollout.response_ids)


def _tensor(parts: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(device=device, dtype=dtype)
