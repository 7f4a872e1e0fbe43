"""What a learner is besides its config, as files: safetensors and JSON, nothing that runs when it is read.

student.safetensors    every trained parameter by name, float32
optimizer.safetensors  AdamW's `step`, `exp_avg` and `exp_avg_sq` of each, as `<parameter>|<name>`
learner.json           counters
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import ModelError
from opd.learner.learner import LocalLearner

COUNTERS = ("step", "updates", "bad_in_a_row", "bad_in_all")
LIMITS = ("tokens_per_micro_batch", "chunk_tokens")  # lowered where memory ran out; how a step is cut shows in its bits
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(learner: LocalLearner, folder: Path) -> None:
    """Writes the three files into `folder`, which exists."""
    trained = _trained(learner)
    save_file({name: p.detach().contiguous() for name, p in trained.items()}, folder / "student.safetensors")
    moments = {
        f"{name}|{key}": value.contiguous()
        for name, parameter in trained.items()
        for key, value in learner.optimizer.state.get(parameter, {}).items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    counters = {name: getattr(learner, name) for name in COUNTERS} | learner.lowered()
    (folder / "learner.json").write_text(json.dumps(counters, indent=2) + "\n", encoding="utf-8")


def load_state(learner: LocalLearner, folder: Path) -> None:
    """Puts the learner where `save_state` found it; ModelError when the files are of another model."""
    trained = _trained(learner)
    weights = load_file(folder / "student.safetensors")
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != saved:
        differing = sorted({*shapes, *saved} - {name for name in shapes if shapes[name] == saved.get(name)})
        raise ModelError(
            f"{folder} was written by another student: {differing[0]} is {saved.get(differing[0], 'not there')} in it "
            f"and {shapes.get(differing[0], 'not there')} in student.model (options student and student.lora)."
        )
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, _, moment = key.rpartition("|")
        moments.setdefault(name, {})[moment] = value
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            if name in moments:
                learner.optimizer.state[parameter] = _moments(moments[name], parameter)
    counters: dict[str, Any] = json.loads((folder / "learner.json").read_text(encoding="utf-8"))
    for name in COUNTERS:
        setattr(learner, name, counters[name])
    for name in LIMITS:
        setattr(learner, name, min(getattr(learner, name), counters.get(name, math.inf)))


def state_bytes(learner: LocalLearner) -> int:
    """Size of the files: a parameter and its two moments."""
    return sum(12 * p.numel() for p in _trained(learner).values()) + 2**20


def _trained(learner: LocalLearner) -> dict[str, Tensor]:
    """What the optimizer changes. Not what requires a gradient: a stop may fall where an adapter is being switched."""
    changed = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in learner.model.module.named_parameters() if id(p) in changed}


def _moments(saved: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """In memory of their own, laid out like the parameter: what a file gives may be aligned in another way."""
    assert saved.keys() == set(MOMENTS), f"an optimizer with {sorted(saved)}"
    like = {"step": saved["step"], "exp_avg": parameter, "exp_avg_sq": parameter}
    moments = {}
    for key in MOMENTS:
        device = parameter.device
        moments[key] = torch.empty_like(like[key], device=device, requires_grad=False).copy_(saved[key])
    return moments
