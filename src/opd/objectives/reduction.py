"""How much each token counts. Denominators are global to the step, so no split into micro-batches can change them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from opd.config.objective import Reduction


def token_shares(
    reduction: Reduction, masks: Mapping[str, NDArray[np.bool_]], max_tokens: int | None
) -> dict[str, float]:
    """Rollout id to the share of each of its trained tokens in the term's mean; 0 for an answer without any.

        token_mean     1 / trained tokens
        sequence_mean  1 / (answers x trained tokens of the answer)
        constant       1 / (answers x max_tokens)

    masks   rollout id to bool [T], the tokens this term trains. All answers of the step must be present: the
            denominators are counted over them. An answer without a trained token is not counted as an answer.
    """
    counts = {key: int(mask.sum()) for key, mask in masks.items()}
    tokens = sum(counts.values())
    answers = sum(1 for n in counts.values() if n)
    if reduction == "constant":
        assert max_tokens is not None, "the reduction constant divides by the most tokens that an answer may have"
        return {key: 1.0 / (answers * max_tokens) if n else 0.0 for key, n in counts.items()}
    if reduction == "sequence_mean":
        return {key: 1.0 / (answers * n) if n else 0.0 for key, n in counts.items()}
    assert reduction == "token_mean", f"no such reduction: {reduction}"
    return {key: 1.0 / tokens if n else 0.0 for key, n in counts.items()}
