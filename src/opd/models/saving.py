"""A trained student as a folder that transformers loads."""

from __future__ import annotations

import json
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
    own_ends, module.generation_config.eos_token_id = module.generation_config.eos_token_id, list(end_ids)
    try:
        state = {
            key: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
            for key, value in _unique(module.state_dict()).items()
        }
        module.save_pretrained(temporary, state_dict=state, max_shard_size="5GB")
        tokenizer.save_pretrained(temporary)
    finally:
        module.generation_config.eos_token_id = own_ends
    # transformers writes the type of the live parameters; what it loads the folder in is the type that is stored.
    config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
