"""Weights that never leave the process: learner and sampler hold the same module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModuleWeights:
    """The live parameters and buffers of a module, as version `version`."""

    module: Any
    version: int

    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self.module.state_dict(keep_vars=True)
