"""AdamW with float32 state, and learning-rate schedules as a pure function of the step."""

from __future__ import annotations

import math

import torch

from opd.config.schema import Optim
from opd.models.causal import CausalLM


def learning_rate(spec: Optim, step: int, total_steps: int) -> float:
    """The rate of update `step` (0-based) out of `total_steps`: linear warm-up, then the schedule down to its end."""
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    if spec.schedule == "constant":
        return spec.lr
    done = (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps)
    if spec.schedule == "linear":
        share = 1.0 - done
    else:
        assert spec.schedule == "cosine", f"no such schedule: {spec.schedule}"
        share = 0.5 * (1.0 + math.cos(math.pi * done))
    return spec.lr * (spec.final_lr_fraction + (1.0 - spec.final_lr_fraction) * share)


def make_optimizer(model: CausalLM, spec: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; vectors (norms, biases) are not decayed."""
    trainable = [p for p in model.module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
