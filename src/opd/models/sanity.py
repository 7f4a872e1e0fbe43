"""One look at what a model says, before a run depends on it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import ModelError
from opd.models.causal import CausalLM
from opd.models.padding import pad
from opd.objectives.head import head_logits
from opd.types import Head


@torch.no_grad()
def next_token_logits(model: CausalLM, head: Head, prompts: Sequence[NDArray[np.int64]]) -> Tensor:
    """[P, V]: logits of the token after each prompt; ModelError when any of them is not finite."""
    ids_PS, attention_PS, positions_PS = pad(prompts, device=model.device)
    hidden_PSD = model.hidden(ids_PS, attention_PS, positions_PS)
    last_P = attention_PS.sum(1) - 1
    logits_PV = head_logits(hidden_PSD[torch.arange(len(prompts), device=model.device), last_P], head)
    if not torch.isfinite(logits_PV).all():
        raise ModelError(
            f"{model.name} gives NaN or infinite scores on your first prompts; is its checkpoint whole, and is its "
            f"dtype ({str(model.compute_dtype).removeprefix('torch.')}) one that it was made for?"
        )
    return logits_PV
