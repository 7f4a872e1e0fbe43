"""Scorers that follow the student, against a loop by hand; and those that never move."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opd.config.schema import Lora
from opd.errors import ModelError
from opd.models.adapters import adapter_off_view, add_adapter
from opd.models.copies import copied_tensors, trained_tensors
from opd.teachers.moving import Moving
from tests import rooms

KINDS = ("whole", "adapter")


def student_of(kind: str):
    student = rooms.causal(seed=0)
    if kind == "adapter":
        student.module.requires_grad_(False)
        torch.manual_seed(0)
        add_adapter(student, Lora(rank=2), base="b")
    return student


def shaken(student, seed: int) -> None:
    """As an update would: other weights, in place."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in student.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))


def values(moving: Moving, student) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in copied_tensors(moving.model, trained_tensors(student)).items()}


def states(model) -> torch.Tensor:
    ids = torch.arange(6)[None]
    with torch.no_grad():
        return model.hidden(ids, torch.ones_like(ids), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_an_average_is_that_of_a_loop_by_hand(kind: str) -> None:
    student = student_of(kind)
    moving = Moving("m", student, kind="ema", rate=0.3)
    by_hand = {k: v.double() for k, v in trained_tensors(student).items()}
    for step in range(1, 5):
        shaken(student, step)
        applied = step != 3
        moving.after_update(step, applied=applied)
        if applied:
            by_hand = {k: v + 0.3 * (trained_tensors(student)[k].double() - v) for k, v in by_hand.items()}
    for name, value in values(moving, student).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), by_hand[name], atol=1e-7, rtol=1e-5)
    live = trained_tensors(student)
    assert any((by_hand[k] - live[k].double()).abs().max() > 1e-3 for k in live)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_reads_with_its_own_weights_and_leaves_the_student_alone(kind: str) -> None:
    """A step is taken between a forward of the student and its backward as well."""
    student = student_of(kind)
    moving = Moving("m", student, kind="past", every=2)
    before = states(student)
    assert torch.equal(states(moving.model), before)
    shaken(student, 1)
    now = states(student)
    assert torch.equal(states(moving.model), before) and not torch.equal(now, before)
    moving.after_update(1)
    assert torch.equal(states(moving.model), before)
    moving.after_update(2)
    assert torch.equal(states(moving.model), now) and torch.equal(states(student), now)
    shaken(student, 2)

    def gradient(between) -> torch.Tensor:
        ids = torch.arange(6)[None]
        hidden = student.hidden(ids, torch.ones_like(ids), ids)
        between()
        student.module.zero_grad()
        hidden.square().sum().backward()
        return rooms.gradient(student)

    assert torch.equal(gradient(lambda: states(moving.model)), gradient(lambda: None))
    assert moving.model.trainable_count == 0


def test_a_student_before_training_stays_under_an_adapter() -> None:
    student = student_of("adapter")
    initial, before = adapter_off_view(student), states(student)
    assert torch.equal(states(initial), before), "B is zero: an adapter begins as nothing"
    shaken(student, 1)
    assert torch.equal(states(initial), before) and not torch.equal(states(student), before)


@pytest.mark.parametrize("kind", KINDS)
def test_R_2_a_moving_scorer_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    student = student_of(kind)
    moving = Moving("m", student, kind="ema", rate=0.1)
    for step in (1, 2):
        shaken(student, step)
        moving.after_update(step)
    moving.save(tmp_path)
    kept = values(moving, student)
    again = Moving("m", student, kind="ema", rate=0.1)
    assert any(not torch.equal(kept[k], v) for k, v in values(again, student).items())
    again.load(tmp_path)
    assert all(torch.equal(kept[k], v) for k, v in values(again, student).items())
    with pytest.raises(ModelError, match="holds no weights of the scorer 'other'"):
        Moving("other", student, kind="ema").load(tmp_path)
    with pytest.raises(ModelError, match="another student"):
        Moving("m", rooms.causal("llama", seed=0), kind="ema").load(tmp_path)
