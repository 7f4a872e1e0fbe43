"""Recorded log-probabilities in float64: see `tables.py`."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opd.learner import learner
from opd.models.packing import pack


@pytest.fixture
def exact_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches keep the records' own precision."""

    def exact(rollouts, **options):
        recorded_T = np.concatenate([r.behaviour_logprobs for r in rollouts])
        return dataclasses.replace(pack(rollouts, **options), behaviour_T=torch.from_numpy(recorded_T))

    monkeypatch.setattr(learner, "pack", exact)
