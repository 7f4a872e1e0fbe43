"""What a head does, as a function of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.types import Head


def head_logits(hidden_TD: Tensor, head: Head) -> Tensor:
    """[T, vocab_size], float32 (float64 for float64 states); padding rows left out, permuted when the head says so.

    Products run in the dtype of `hidden_TD`; where the device can, they are accumulated and returned in float32.
    """
    weight_VD = head.weight_VD[: head.vocab_size].to(hidden_TD.dtype)
    if hidden_TD.is_cuda and hidden_TD.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled():
        logits_TV = torch.mm(hidden_TD, weight_VD.T, out_dtype=torch.float32)
    else:
        logits_TV = (hidden_TD @ weight_VD.T).to(torch.promote_types(hidden_TD.dtype, torch.float32))
    if head.bias_V is not None:
        logits_TV = logits_TV + head.bias_V[: head.vocab_size]
    if head.scale != 1.0:
        logits_TV = logits_TV * head.scale
    if head.softcap is not None:
        logits_TV = head.softcap * torch.tanh(logits_TV / head.softcap)
    if head.order_V is not None:
        logits_TV = logits_TV.index_select(1, head.order_V)
    return logits_TV
