"""A trained student as a folder that transformers loads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from opd.models.causal import CausalLM


def save_model(model: CausalLM, tokenizer: Any, folder: Path, *, dtype: torch.dtype, end_ids: Sequence[int]) -> None:
    """Writes weights (safetensors, in `dtype`), config, tokenizer and generation config; all or nothing.

    The generation config names the tokens that the student was trained to end with, so that `generate` stops there.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    module = model.module
    own_dtype, module.config.dtype = module.config.dtype, dtype
    own_ends, module.generation_config.eos_token_id = module.generation_config.eos_token_id, list(end_ids)
    try:
        state = {key: value.detach().to("cpu", dtype) for key, value in _unique(module.state_dict()).items()}
        module.save_pretrained(temporary, state_dict=state, max_shard_size="5GB")
        tokenizer.save_pretrained(temporary)
    finally:
        module.config.dtype, module.generation_config.eos_token_id = own_dtype, own_ends
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _unique(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors once: they share storage, and safetensors stores every tensor on its own."""
    seen: dict[tuple[int, torch.Size], str] = {}
    kept: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        place = (value.data_ptr(), value.shape)
        if place not in seen or not value.numel():
            seen[place] = key
            kept[key] = value
    return kept
