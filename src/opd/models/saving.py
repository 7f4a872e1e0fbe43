"""A trained student as a folder: a whole model that transformers loads, or an adapter that peft loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from opd.config.schema import Student
from opd.journal.atomic import discard, room_for, sync
from opd.models.adapters import base_tensors
from opd.models.causal import CausalLM

Form = Literal["merged", "adapter"]


def export_form(spec: Student) -> Form:
    """What `save: auto` means: a whole model, except where the frozen weights are quantised, whose few bits would round
    the adapter away."""
    if spec.lora is None or spec.lora.save == "merged":
        return "merged"
    if spec.lora.save == "adapter" or spec.quantisation != "none":
        return "adapter"
    return "merged"


def save_model(
    model: CausalLM,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    end_ids: Sequence[int],
    form: Form = "merged",
) -> None:
    """Writes weights (safetensors), config, tokenizer and generation config; the live model stays as it is.

    form   merged: a whole model in `dtype`, an adapter added to its base (in float32, then rounded to `dtype`);
           adapter: A and B alone in float32, with the name and revision of their base.

    The generation config names the tokens that the student was trained to end with, so that `generate` stops there.
    A kill at any moment leaves the old folder, the new one, or the old one under FOLDER.old (see `recover`).
    Raises OutOfSpace when it does not fit; the old folder stays.
    """
    recover(folder)
    temporary = _beside(folder, ".tmp")
    discard(temporary)
    module = model.module
    own_ends, module.generation_config.eos_token_id = module.generation_config.eos_token_id, list(end_ids)
    with room_for(folder):
        try:
            if form == "adapter":
                _write_adapter(model, temporary)
            else:
                _write_merged(model, temporary, dtype)
            tokenizer.save_pretrained(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            module.generation_config.eos_token_id = own_ends
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        _swap(temporary, folder)


def recover(folder: Path) -> None:
    """Ends a swap that a kill cut short: the old folder comes back where there is no new one, and goes where there is.
    Does nothing otherwise."""
    old = _beside(folder, ".old")
    if not old.is_dir():
        return
    if folder.is_dir():
        discard(old)
    else:
        os.replace(old, folder)
        sync(folder.parent)


def _swap(new: Path, folder: Path) -> None:
    """Puts `new` in the place of `folder`. Two renames, since a folder cannot be replaced in one; `recover` knows of a
    kill between them."""
    old = _beside(folder, ".old")
    if folder.is_dir():
        os.replace(folder, old)
        sync(folder.parent)
    os.replace(new, folder)
    sync(folder.parent)
    discard(old)


def _beside(folder: Path, ending: str) -> Path:
    return folder.with_name(folder.name + ending)


def _write_merged(model: CausalLM, folder: Path, dtype: torch.dtype) -> None:
    adapter = model.adapter
    state = {}
    for key, value in _unique(model.module.state_dict() if adapter is None else base_tensors(model.module)).items():
        added = None if adapter is None else adapter.added_to(key)
        if added is not None:
            assert value.is_floating_point(), f"{key} is quantised: merging into it would round the adapter away"
            value = value.float() + added.float()
        state[key] = value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
    model.module.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    # transformers writes the type of the live parameters; what it loads the folder in is the type that is stored.
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_adapter(model: CausalLM, folder: Path) -> None:
    assert model.adapter is not None, f"{model.name} has no adapter"
    model.adapter.peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a card that says nothing
    model.module.generation_config.save_pretrained(folder)


def _unique(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors once: they share storage, and safetensors stores every tensor on its own."""
    seen: set[tuple[int, torch.Size]] = set()
    kept: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        place = (value.data_ptr(), value.shape)
        if place not in seen or not value.numel():
            seen.add(place)
            kept[key] = value
    return kept
