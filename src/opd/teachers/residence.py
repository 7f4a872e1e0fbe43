"""Where a scorer's weights are while nobody asks it anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from opd.models.causal import CausalLM


class Residence(Protocol):
    """Brings a model to its device, and lets it go."""

    @property
    def device(self) -> torch.device:
        """Where the model is when it is asked."""
        ...

    def fetch(self) -> CausalLM:
        """The model, on its device; brings it when it is not there."""
        ...

    def release(self) -> None: ...


class Resident:
    """Stays where it is."""

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    @property
    def device(self) -> torch.device:
        return self._model.device

    def fetch(self) -> CausalLM:
        return self._model

    def release(self) -> None: ...


class InHostMemory:
    """On its device only while it is asked."""

    def __init__(self, model: CausalLM) -> None:
        self.device = model.device
        self._model, self._away = model, False

    def fetch(self) -> CausalLM:
        if self._away:
            self._model.module.to(self.device)
            self._away = False
        return self._model

    def release(self) -> None:
        if not self._away:
            self._model.module.to("cpu")
            self._away = True


class OnDisk:
    """Loaded whenever it is asked, and in no memory in between."""

    def __init__(self, load: Callable[[], CausalLM]) -> None:
        self._load = load
        self._model: CausalLM | None = load()
        self.device = self._model.device

    def fetch(self) -> CausalLM:
        if self._model is None:
            self._model = self._load()
        return self._model

    def release(self) -> None:
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def resident(load: Callable[[], CausalLM], offload: str) -> Residence:
    """`offload` as in the config: none, cpu or disk. On a CPU there is no other memory to go to, so cpu is none."""
    if offload == "disk":
        return OnDisk(load)
    model = load()
    return InHostMemory(model) if offload == "cpu" and model.device.type != "cpu" else Resident(model)
