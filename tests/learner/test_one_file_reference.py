"""The library's learner against `examples/opd_in_one_file.py`, which shares no line with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests import rooms

PATH = Path(__file__).parents[2] / "examples" / "opd_in_one_file.py"
OBJECTIVES = {
    "reverse_kl": {"preset": "reverse_kl"},
    "forward_kl": {"preset": "forward_kl"},
    "jsd": {"preset": "jsd", "parameters": {"beta": 0.3}},
    "tml": {"preset": "tml"},
}


def one_file():
    spec = importlib.util.spec_from_file_location("opd_in_one_file", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "olmo2"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_one_file_reference_gives_the_same_loss_and_gradient(name: str, kind: str) -> None:
    """Ragged answers in padded micro-batches here; every sequence alone, full logits and autograd there."""
    fmt = rooms.prompt_format()
    student, other = (rooms.causal(kind, seed=seed, dtype=torch.float64) for seed in (0, 1))
    made = rooms.rollouts(rooms.causal(kind, seed=0), fmt)
    learner = rooms.learner(student, OBJECTIVES[name], tokens_per_micro_batch=64)
    metrics = learner.gradients(made, rooms.teacher(other, fmt).evidence(made))
    ours = rooms.gradient(student)

    student.module.zero_grad()
    sequences = [(r.prompt.ids.tolist(), r.response_ids.tolist(), r.behaviour_logprobs.tolist()) for r in made]
    loss = one_file().loss_on(student.module, other.module, sequences, name, 0.3)
    loss.backward()
    assert rooms.distance(ours, rooms.gradient(student)) < 2e-7  # weights and log mu travel as float32
    if name == "tml":  # the library's sampled form reports the advantage's mean with the ratio, as the reference does
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    else:
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
