"""What scorers could not say: by scorer and rollout, the tokens whose evidence is missing or not finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import Batch, ScorerRows

Invalid = dict[str, dict[str, NDArray[np.bool_]]]  # scorer to rollout id to bool [T]


def read_and_valid(batch: Batch, scorer: ScorerRows) -> tuple[Tensor, Tensor]:
    """bool [T] each, over the whole micro-batch: tokens that the scorer's rows are about, and those it can use."""
    if scorer.index_T is None:
        return torch.ones_like(scorer.valid_T), scorer.valid_T
    read_T = torch.zeros_like(batch.mask_T)
    valid_T = read_T.clone()
    read_T[scorer.index_T] = True
    valid_T[scorer.index_T] = scorer.valid_T
    return read_T, valid_T


def note_invalid(batch: Batch, scorers: Sequence[ScorerRows], found: Invalid) -> None:
    """Adds to `found`, by rollout, the tokens that may be trained and came back without a usable score."""
    for scorer in scorers:
        read_T, valid_T = read_and_valid(batch, scorer)
        bad_T = (batch.mask_T & read_T & ~valid_T).cpu().numpy()
        if not bad_T.any():
            continue
        ends = np.cumsum([len(r.response_ids) for r in batch.rollouts])[:-1]
        for rollout, part_T in zip(batch.rollouts, np.split(bad_T, ends), strict=True):
            if part_T.any():
                found.setdefault(scorer.name, {})[rollout.id] = part_T.copy()


def merge(found: Invalid, known: Invalid) -> bool:
    """Adds what was found to what was known; True when that was news."""
    news = False
    for name, by_id in found.items():
        have = known.setdefault(name, {})
        for key, mask_T in by_id.items():
            news |= key not in have or bool((mask_T & ~have[key]).any())
            have[key] = have[key] | mask_T if key in have else mask_T
    return news
