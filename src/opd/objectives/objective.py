"""A configured objective, ready to be evaluated: which evidence it needs, which tokens each term trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from opd.config.objective import Objective as ObjectiveSpec
from opd.config.objective import Term
from opd.errors import DataError
from opd.objectives.reduction import token_weights
from opd.types import Batch, Resolution, Rollout

TermWeights = dict[str, dict[str, NDArray[np.float32]]]


@dataclass(frozen=True)
class Objective:
    """A sum of terms (`spec.terms`) with its two temperatures."""

    spec: ObjectiveSpec

    @property
    def terms(self) -> tuple[Term, ...]:
        return self.spec.terms

    @property
    def resolution(self) -> Resolution | None:
        """The evidence that all terms together need from the teacher; None when no term reads it."""
        supports = {t.support for t in self.terms if t.target == "teacher"}
        if "full" in supports:
            return "full"
        return "sampled" if supports else None

    def weights(self, rollouts_N: Sequence[Rollout], invalid: Mapping[str, NDArray[np.bool_]]) -> TermWeights:
        """Term name to rollout id to float32 [T] weights, from the masks of the whole step.

        invalid   rollout id to bool [T]: tokens whose evidence is missing or not finite; they leave both the loss and
                  its denominator for every term that reads the teacher.
        Raises DataError when a term is left without a single token.
        """
        weights: TermWeights = {}
        for term in self.terms:
            masks = {r.id: trained_mask(term, r, invalid.get(r.id)) for r in rollouts_N}
            if not any(mask.any() for mask in masks.values()):
                raise DataError(
                    f"objective term {term.name!r} has no token to train in this step: {len(rollouts_N)} answers, all "
                    "of their tokens masked. Check that prompts have answers and that the teacher gives finite scores."
                )
            weights[term.name] = token_weights(term, masks)
        return weights


def trained_mask(term: Term, rollout: Rollout, invalid_T: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """bool [T]: the rollout's own mask, without tokens that lack the evidence this term reads. Applied last."""
    mask_T = rollout.mask.copy()
    if term.target == "teacher" and invalid_T is not None:
        mask_T &= ~invalid_T
    if term.support == "sampled" and (term.importance == "ratio" or term.advantage_under == "sampler"):
        mask_T &= np.isfinite(rollout.behaviour_logprobs)
    return mask_T


def batch_weights(weights: TermWeights, batch: Batch) -> dict[str, torch.Tensor]:
    """Term name to float32 [T]: the step's weights in the order of a micro-batch's flattened tokens, by rollout id."""
    device = batch.token_T.device
    return {
        name: torch.from_numpy(np.concatenate([by_id[r.id] for r in batch.rollouts])).to(device)
        for name, by_id in weights.items()
    }
