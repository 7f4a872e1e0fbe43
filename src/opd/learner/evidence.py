"""What scorers could not say: by scorer and rollout, the tokens whose evidence is missing or not finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import Batch, Rollout, ScorerRows

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


class Findings:
    """The tokens of a step that may be trained and came back without a usable score.

    They stay on their device until all micro-batches are under way: reading them one by one would make the host wait
    for each before it can ask for the next.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[str, tuple[Rollout, ...], Tensor]] = []

    def note(self, batch: Batch, scorers: Sequence[ScorerRows]) -> None:
        """Adds what scorers said about one micro-batch."""
        for scorer in scorers:
            read_T, valid_T = read_and_valid(batch, scorer)
            self._noted.append((scorer.name, batch.rollouts, batch.mask_T & read_T & ~valid_T))

    def read(self) -> Invalid:
        """All of it, by scorer and rollout; only those with such a token are there."""
        found: Invalid = {}
        if not self._noted:
            return found
        bad = torch.cat([bad_T for _, _, bad_T in self._noted]).cpu().numpy()
        if not bad.any():
            return found
        start = 0
        for name, rollouts, _ in self._noted:
            for rollout in rollouts:
                part_T = bad[start : start + len(rollout.response_ids)]
                start += len(part_T)
                if part_T.any():
                    found.setdefault(name, {})[rollout.id] = part_T.copy()
        return found


def merge(found: Invalid, known: Invalid) -> bool:
    """Adds what was found to what was known; True when that was news."""
    news = False
    for name, by_id in found.items():
        have = known.setdefault(name, {})
        for key, mask_T in by_id.items():
            news |= key not in have or bool((mask_T & ~have[key]).any())
            have[key] = have[key] | mask_T if key in have else mask_T
    return news
