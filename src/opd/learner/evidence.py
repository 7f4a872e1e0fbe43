"""What scorers could not say: by scorer and rollout, the tokens whose evidence is missing or not finite, and those that
a scorer with another tokenizer does not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import Batch, Rollout, ScorerRows, Spans, Want

Invalid = dict[str, dict[str, NDArray[np.bool_]]]  # scorer to rollout id to bool [T]
SpansOf = Mapping[str, Mapping[str, Spans]]  # scorer to rollout id, see `protocols.EvidenceHandle`


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
    """The tokens of a step that may be trained and came back without a usable score. Where a scorer reads spans, one
    number that is missing takes the whole span with it.

    They stay on their device until all micro-batches are under way: reading them one by one would make the host wait
    for each before it can ask for the next.
    """

    def __init__(self, spans: SpansOf) -> None:
        self._spans = spans
        self._noted: list[tuple[str, tuple[Rollout, ...], Tensor]] = []

    def note(self, batch: Batch, scorers: Sequence[ScorerRows]) -> None:
        """Adds what scorers said about one micro-batch."""
        for scorer in scorers:
            read_T, valid_T = read_and_valid(batch, scorer)
            self._noted.append((scorer.name, batch.rollouts, read_T & ~valid_T))

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
                    bad_T = self._whole(name, rollout.id, part_T) & rollout.mask
                    if bad_T.any():
                        found.setdefault(name, {})[rollout.id] = bad_T
        return found

    def _whole(self, name: str, rollout_id: str, bad_T: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if name not in self._spans:
            return bad_T
        span_T = self._spans[name][rollout_id].span_T
        return bad_T | (np.isin(span_T, span_T[bad_T]) & (span_T >= 0))


def merge(found: Invalid, known: Invalid) -> bool:
    """Adds what was found to what was known; True when that was news."""
    news = False
    for name, by_id in found.items():
        have = known.setdefault(name, {})
        for key, mask_T in by_id.items():
            news |= key not in have or bool((mask_T & ~have[key]).any())
            have[key] = have[key] | mask_T if key in have else mask_T
    return news


def coverage(rollouts_N: Sequence[Rollout], wants: Mapping[str, Want], spans: SpansOf) -> dict[str, float]:
    """Metrics of scorers with another tokenizer, over the answers that they are asked about:

    scorer/NAME/coverage, same                 shares of the tokens that may be trained: those in spans, and those that
                                               are the same one token to both
    scorer/NAME/span_tokens, span_own_tokens   of a span: so many of the student's tokens, and of the scorer's
    """
    metrics: dict[str, float] = {}
    for name in sorted(wants.keys() & spans.keys()):
        asked = [r for r in rollouts_N if r.id in wants[name].rollouts]
        read = [spans[name][r.id] for r in asked]
        tokens = sum(int(r.mask.sum()) for r in asked)
        count = sum(int(s.span_T.max(initial=-1)) + 1 for s in read)
        inside = sum(int((r.mask & (s.span_T >= 0)).sum()) for r, s in zip(asked, read, strict=True))
        same = sum(int((r.mask & s.same_T).sum()) for r, s in zip(asked, read, strict=True))
        if tokens:
            metrics |= {f"scorer/{name}/coverage": inside / tokens, f"scorer/{name}/same": same / tokens}
        if count:
            metrics[f"scorer/{name}/span_tokens"] = sum(int((s.span_T >= 0).sum()) for s in read) / count
            metrics[f"scorer/{name}/span_own_tokens"] = sum(int((s.span_U >= 0).sum()) for s in read) / count
    return metrics
