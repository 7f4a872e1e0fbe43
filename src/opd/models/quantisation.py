"""Weights in 8 or 4 bits through bitsandbytes, for models that are read and not changed.

int8  LLM.int8 (Dettmers et al. 2022): weights by row; activations are quantised too, through float16.
int4  NF4 in blocks of 64 (Dettmers et al. 2023): 4.5 bits with the scales; products run in the compute type.

Both run on CUDA and on the CPU. Linear layers alone are quantised: embeddings, head, norms and experts that are fused
into one parameter keep the compute type.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Literal

import torch

from opd.errors import ModelError


def settings(kind: Literal["int8", "int4"], dtype: torch.dtype, role: str) -> Any:
    """What transformers is told when it loads the weights; ModelError when bitsandbytes is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks of every cast it makes
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as e:
        raise ModelError(f"{role}.quantisation: {kind} needs bitsandbytes: pip install 'opd[quantisation]'") from e
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def settle(module: Any, kind: str, role: str) -> None:
    """After loading: keeps 4-bit weights in one layout, and warns when most of the model was not quantised.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 packs 4-bit weights anew in a forward pass without gradients. From
    then on gradients through them are wrong without a word (measured: 98 % off), and so is the model after its state
    was read once.
    """
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    whole = sum(p.numel() for p in module.parameters() if p.is_floating_point())
    packed = sum(p.numel() for p in module.parameters() if not p.is_floating_point())
    packed *= 2 if kind == "int4" else 1
    if whole > packed and any(p.ndim == 3 and p.is_floating_point() for p in module.parameters()):
        warnings.warn(
            f"{role}.quantisation: {kind} reaches {packed / (whole + packed):.0%} of the numbers of "
            f"{type(module).__name__}: bitsandbytes quantises linear layers, and its experts are not stored as such",
            RuntimeWarning,
            stacklevel=4,
        )
