"""Tiny students with an adapter that says something."""

from __future__ import annotations

import torch
from torch import Tensor

from opd.config.schema import Lora
from opd.models.adapters import add_adapter
from opd.models.causal import CausalLM
from tests import rooms


def adapted(
    kind: str = "qwen3", *, moved: bool = True, rank: int = 4, targets: tuple[str, ...] = (), **model
) -> CausalLM:
    """A student whose adapter is random (`moved`), or as training begins: A random, B zero."""
    student = rooms.causal(kind, **model)
    torch.manual_seed(1)
    add_adapter(student, Lora(rank=rank, alpha=2.0 * rank, targets=targets), base="base")
    if moved:
        move(student)
    return student


def move(student: CausalLM, seed: int = 2) -> None:
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in student.module.named_parameters():
            if parameter.requires_grad:
                spread = 0.2 if "lora_B" in name else 0.1
                parameter += spread * torch.randn(parameter.shape, generator=noise)


def batch(width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and positions of two sequences."""
    ids = torch.randint(3, 290, (2, width), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids), torch.arange(width).expand(2, width)


@torch.no_grad()
def logprobs(module) -> Tensor:
    return module(input_ids=batch()[0]).logits.float().log_softmax(-1)
