"""Answers written by hand, for tests of the objective that need no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opd.models.packing import pack
from opd.types import Batch, Prompt, Rollout, Row, SamplingParams


def answer(
    key: str = "a", length: int = 4, *, domain: str = "d", columns: dict | None = None, **changes: Any
) -> Rollout:
    """Its prompt is what stands before the first slash of `key`."""
    prompt_id = key.split("/")[0]
    row = Row(id=prompt_id, domain=domain, prompt="?", columns=columns or {})
    fields: dict[str, Any] = {
        "id": key,
        "prompt": Prompt(row=row, ids=np.array([1, 2], dtype=np.int64)),
        "response_ids": np.arange(3, 3 + length, dtype=np.int64),
        "behaviour_logprobs": np.linspace(-1.0, -2.0, length, dtype=np.float32),
        "mask": np.ones(length, dtype=np.bool_),
        "policy_version": 0,
        "behaviour": "student",
        "finish_reason": "stop",
        "sampling": SamplingParams(max_tokens=10, stop_ids=(0,)),
    }
    return Rollout(**{**fields, **changes})


def batch(answers: Sequence[Rollout]) -> Batch:
    return pack(answers, device=torch.device("cpu"))
