"""Training an adapter on the real path: sampler, teacher, learner."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.learner.state import load_state, save_state
from opd.models.adapters import adapter_off_view, untrained_targets
from tests import rooms, tiny
from tests.models.adapted import adapted, batch


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_one_step_reaches_every_target_and_changes_the_adapter_alone(kind: str) -> None:
    """Bit for bit: what is not in the adapter is what it was, and has no gradient and no optimiser state."""
    fmt = rooms.prompt_format()
    student = adapted(kind, moved=False)
    teacher = rooms.teacher(rooms.causal(kind, seed=1), fmt)
    made = rooms.rollouts(student, fmt)
    learner = rooms.learner(student, optim={"lr": 1e-2})
    trained = {n for n, p in student.module.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in learner.optimizer.param_groups) == len(trained)
    learner.gradients(made, teacher.evidence(made))
    assert untrained_targets(student) == []
    assert {n for n, p in student.module.named_parameters() if p.grad is not None} == trained
    before = {n: t.clone() for n, t in student.module.state_dict().items()}
    for _ in range(2):  # B moves in the first step, A from the second on
        assert learner.update(made, teacher.evidence(made)).applied
    after = student.module.state_dict()
    assert {n for n, t in after.items() if not torch.equal(t, before[n])} == trained


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "tml"])
def test_a_student_that_begins_as_its_adapter_off_teacher_has_nothing_to_learn(name: str) -> None:
    fmt, student = rooms.prompt_format(), adapted(moved=False)
    made = rooms.rollouts(student, fmt)
    view = rooms.teacher(adapter_off_view(student), fmt)
    other = rooms.teacher(rooms.causal(seed=1), fmt)
    norms = []
    for teacher in (view, other):
        learner = rooms.learner(student, {"preset": name})
        metrics = learner.gradients(made, teacher.evidence(made))
        norms.append(rooms.gradient(student).norm())
    assert norms[0] < 1e-5 * norms[1] and metrics["reverse_kl"] > 0.1


def test_a_teacher_that_is_the_students_base_pulls_it_back() -> None:
    """The teacher stays what it was while the weights beside it move."""
    fmt, student = rooms.prompt_format(), adapted()
    view = rooms.teacher(adapter_off_view(student), fmt)
    mark, kls = view.model.fingerprint(), []
    learner = rooms.learner(student, optim={"lr": 1e-2})
    for _ in range(8):
        made = rooms.rollouts(student, fmt)
        kls.append(learner.update(made, view.evidence(made)).metrics["reverse_kl"])
    assert kls[-1] < 0.8 * kls[0]
    assert view.model.fingerprint() == mark == rooms.causal().fingerprint()


@pytest.mark.parametrize("at", [3, 17])  # of 28 switches: while the adapter goes off, and while it comes back
def test_R_6_a_stop_while_the_adapter_is_switched_leaves_a_state_that_can_be_gone_on_from(
    tmp_path: Path, monkeypatch, at: int
) -> None:
    from peft.tuners.lora import LoraLayer

    student = adapted()
    learner, view = rooms.learner(student), adapter_off_view(student)
    trained = {name for name, p in student.module.named_parameters() if p.requires_grad}
    whole, switched = LoraLayer.enable_adapters, []

    def stopped(self, enabled: bool) -> None:
        switched.append(enabled)
        if len(switched) == at:
            raise KeyboardInterrupt
        whole(self, enabled)

    monkeypatch.setattr(LoraLayer, "enable_adapters", stopped)
    with pytest.raises(KeyboardInterrupt):
        view.hidden(*batch())
    monkeypatch.undo()
    save_state(learner, tmp_path)
    assert load_file(tmp_path / "student.safetensors").keys() == trained
    load_state(rooms.learner(adapted(moved=False)), tmp_path)
