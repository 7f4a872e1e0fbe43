"""A folder with a peft adapter in place of a model: which base it belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from opd.errors import ModelError

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class AdapterFolder:
    """base, revision: what its adapter_config.json names as the model it was trained on."""

    path: Path
    base: str
    revision: str | None

    @property
    def has_tokenizer(self) -> bool:
        return any((self.path / name).is_file() for name in _TOKENIZERS)


def adapter_folder(source: str, role: str) -> AdapterFolder | None:
    """The adapter in a local folder; None when `source` is a model, or a name of the hub.

    Raises ModelError when the folder names no base, or has its weights in pickle.
    """
    path = Path(source).expanduser()
    if not (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return None
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        base, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise ModelError(
            f"{role}.model: {source!r} is an adapter, but its adapter_config.json names no base_model_name_or_path. "
            "Name the model that it was trained on there."
        ) from e
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise ModelError(
            f"{role}.model: the adapter in {source!r} gives {base!r} as its base_model_name_or_path (revision "
            f"{revision!r}). Name the model that it was trained on in its adapter_config.json."
        )
    if not (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{role}.model: the adapter in {source!r} has no adapter_model.safetensors; other formats can run code "
            "when they are read"
        )
    return AdapterFolder(path, base, revision)
