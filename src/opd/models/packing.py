"""Rollouts into micro-batches: of similar length, answers to one prompt together where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from opd.models.families import WORTH, Padded, families
from opd.objectives.transfer import onto
from opd.types import Batch, Rollout


def plan(
    rollouts_N: Sequence[Rollout], tokens_per_micro_batch: int, *, share_prompts: bool = False
) -> list[list[Rollout]]:
    """Groups of rollouts of similar length whose padded rectangles hold at most `tokens_per_micro_batch` tokens.

    share_prompts   the model will read a prompt once for all its answers in a group (`answer_states`). Answers to one
                    prompt then stay together where that saves tokens; the others are grouped as without it, and so are
                    all where it saves little of the whole. A group counts as what is really held: the rectangle of
                    prompts, that of answers, and the prompts' keys and values again for each answer, as an eighth of a
                    token each.

    A single sequence longer than the budget gets a micro-batch of its own. Ties keep an order that depends on ids only,
    so the same set of rollouts gives the same plan in whatever order it arrives.
    """
    ordered = sorted(rollouts_N, key=lambda r: (_length(r), r.id))
    plain = _by_length(ordered, tokens_per_micro_batch)
    if not share_prompts:
        return plain
    together = _together(ordered, tokens_per_micro_batch)
    taken = {r.id for group in together for r in group}
    alone = [r for r in ordered if r.id not in taken]
    shared = _by_length(alone, tokens_per_micro_batch) + _joined(together, tokens_per_micro_batch)
    enough = 1.0 if len(shared) <= len(plain) else WORTH  # more micro-batches cost time of their own
    return shared if sum(map(_read, shared)) <= enough * sum(map(_read, plain)) else plain


def pack(rollouts: Sequence[Rollout], *, device: torch.device) -> Batch:
    """One micro-batch, response tokens flattened."""
    lengths = [len(r.response_ids) for r in rollouts]
    return Batch(
        rollouts=tuple(rollouts),
        row_T=_tensor([np.repeat(np.arange(len(rollouts)), lengths)], torch.int64, device),
        token_T=_tensor([r.response_ids for r in rollouts], torch.int64, device),
        behaviour_T=_tensor([r.behaviour_logprobs for r in rollouts], torch.float32, device),
        mask_T=_tensor([r.mask for r in rollouts], torch.bool, device),
    )


def _by_length(ordered: Sequence[Rollout], budget: int) -> list[list[Rollout]]:
    groups: list[list[Rollout]] = []
    for rollout in ordered:  # ascending: the newest member is the longest of its group
        if groups and (len(groups[-1]) + 1) * _length(rollout) <= budget:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
    return groups


def _together(ordered: Sequence[Rollout], budget: int) -> list[list[Rollout]]:
    """Answers that share a prompt, longest first. An answer joins a longer one while the padding that it needs is no
    more than the prompt that it saves. What does not beat reading its answers one by one is left out."""
    family_N, firsts = families([r.prompt.ids for r in ordered])
    groups: list[list[Rollout]] = []
    for number in range(len(firsts)):
        members = [ordered[n] for n in np.flatnonzero(family_N == number).tolist()][::-1]
        prompt = len(members[0].prompt.ids)
        parts: list[list[Rollout]] = []
        for rollout in members:
            padding = len(parts[-1][0].response_ids) - len(rollout.response_ids) if parts else 0
            if parts and padding <= prompt and _padded([*parts[-1], rollout], 1).held <= budget:
                parts[-1].append(rollout)
            else:
                parts.append([rollout])
        groups += [part for part in parts if _pays(part)]
    return groups


def _pays(part: Sequence[Rollout]) -> bool:
    """Against groups of one length, which need hardly any padding."""
    return len(part) > 1 and _padded(part, 1).shared <= WORTH * sum(map(_length, part))


def _joined(together: Sequence[Sequence[Rollout]], budget: int) -> list[list[Rollout]]:
    """Families of similar length in one micro-batch."""
    parts = [(_padded(part, 1), part) for part in together]
    parts.sort(key=lambda p: (p[0].longest_prompt, p[0].longest_answer))  # what is equal stays as it is
    groups: list[tuple[Padded, list[Rollout]]] = []
    for padded, part in parts:
        both = groups[-1][0] + padded if groups else padded
        if groups and both.pays and both.held <= budget:
            groups[-1] = both, [*groups[-1][1], *part]
        else:
            groups.append((padded, [*part]))
    return [group for _, group in groups]


def _read(group: Sequence[Rollout]) -> int:
    return _padded(group, len(families([r.prompt.ids for r in group])[1])).read


def _padded(rollouts: Sequence[Rollout], prompts: int) -> Padded:
    return Padded.of([len(r.prompt.ids) for r in rollouts], [len(r.response_ids) for r in rollouts], prompts)


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt.ids) + len(rollout.response_ids)


def _tensor(parts: Sequence[np.ndarray], dtype: torch.dtype, device: torch.device) -> Tensor:
    return onto(np.concatenate(parts), device, dtype)
