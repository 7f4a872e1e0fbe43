"""Out of memory: smaller micro-batches, then smaller tiles, the same gradient; and a clear end."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opd.errors import ModelError
from opd.learner import learner as room
from opd.models.causal import CausalLM
from opd.objectives.kernels.choice import TILED
from tests import rooms


def scarce(monkeypatch, *, tokens: int = 10**9, chunk: int = 10**9) -> list[int]:
    """A device on which a forward pass of more than `tokens` padded tokens, or a larger tile, does not fit."""
    hidden = CausalLM.hidden
    tried: list[int] = []

    def small(self, ids_NS, attention_NS, positions_NS, cache=None):
        if torch.is_grad_enabled():
            tried.append(ids_NS.numel())
            if ids_NS.numel() > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return hidden(self, ids_NS, attention_NS, positions_NS, cache)

    def short(*args, chunk_tokens, **kwargs):
        if chunk_tokens > chunk:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes"
            )
        return TILED.loss(*args, chunk_tokens=chunk_tokens, **kwargs)

    monkeypatch.setattr(CausalLM, "hidden", small)
    monkeypatch.setattr(room, "choose_kernel", lambda *_: dataclasses.replace(TILED, loss=short))
    return tried


def gradient(learner, rollouts, teacher) -> torch.Tensor:
    learner.gradients(rollouts, teacher.evidence(rollouts))
    return rooms.gradient(learner.model)


@pytest.mark.parametrize("share", [False, True])
def test_the_gradient_is_the_same_and_the_limit_stays_low(share: bool, monkeypatch) -> None:
    fmt, said = rooms.prompt_format(), []
    student, teacher = rooms.causal(), rooms.teacher(rooms.causal("llama", seed=1), fmt)
    rollouts = rooms.rollouts(student, fmt, samples=4)
    reference = gradient(rooms.learner(student, learner={"share_prompts": False}), rollouts, teacher)
    whole = scarce(monkeypatch)
    gradient(rooms.learner(student, learner={"share_prompts": share}), rollouts, teacher)
    assert share == (len(whole) > 1), "prompts and answers are passes of their own"
    most = max(whole) // 3
    tried = scarce(monkeypatch, tokens=most, chunk=40)
    learner = rooms.learner(student, learner={"chunk_tokens": 512, "share_prompts": share})
    learner._on_less = said.append
    assert rooms.distance(gradient(learner, rollouts, teacher), reference) < 1e-5
    assert max(tried) > most >= tried[-1], "a pass was tried that did not fit"
    assert learner.lowered() == {"tokens_per_micro_batch": learner.tokens_per_micro_batch, "chunk_tokens": 32}
    assert said and all("the gradient stays the same" in text for text in said)
    tries = len(said)
    gradient(learner, rollouts, teacher)
    assert len(said) == tries, "the second step begins with what fitted"


def test_where_nothing_fits_the_error_says_what_to_change(monkeypatch) -> None:
    fmt = rooms.prompt_format()
    student, teacher = rooms.causal(), rooms.teacher(rooms.causal("llama", seed=1), fmt)
    rollouts = rooms.rollouts(student, fmt)
    scarce(monkeypatch, tokens=3)
    with pytest.raises(ModelError, match=r"out of memory with one answer.*sampling\.max_tokens"):
        gradient(rooms.learner(student), rollouts, teacher)


def test_other_errors_are_not_taken_for_memory(monkeypatch) -> None:
    fmt = rooms.prompt_format()
    student = rooms.causal()
    rollouts = rooms.rollouts(student, fmt)
    monkeypatch.setattr(CausalLM, "hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        gradient(rooms.learner(student), rollouts, rooms.teacher(rooms.causal(seed=1), fmt))
