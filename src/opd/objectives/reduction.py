"""How much each token counts. Denominators are global to the step, so no split into micro-batches can change them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from opd.config.objective import Term

FloatArray = NDArray[np.float32]


def token_weights(term: Term, masks: Mapping[str, NDArray[np.bool_]]) -> dict[str, FloatArray]:
    """Rollout id to float32 [T]: coefficient x share of the token in the term's mean, 0 where it is masked.

    masks   rollout id to bool [T], the tokens this term trains. All rollouts of the step must be present: the
            denominators are counted over them. A rollout without a single trained token weighs nothing, and is not
            counted as a sequence either.
    """
    counts = {key: int(mask.sum()) for key, mask in masks.items()}
    tokens = sum(counts.values())
    sequences = sum(1 for n in counts.values() if n)
    weights: dict[str, FloatArray] = {}
    for key, mask in masks.items():
        denominator = tokens if term.reduction == "token_mean" else sequences * counts[key]
        share = term.coefficient / denominator if counts[key] else 0.0
        weights[key] = np.where(mask, share, 0.0).astype(np.float32)
    return weights
