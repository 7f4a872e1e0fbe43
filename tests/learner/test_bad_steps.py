"""Steps that go wrong: skipped, counted, told, and stopped after a stated number; and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from opd.config.schema import Optim
from opd.errors import DataError, TrainingDiverged
from opd.learner.optim import learning_rate, make_optimizer
from tests import rooms


def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0)
    return student, rooms.teacher(rooms.causal(seed=1), fmt), rooms.rollouts(student, fmt)


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_and_is_told() -> None:
    student, teacher, made = parts()
    learner = rooms.learner(student)
    told = []
    learner._on_bad_step = lambda step, facts: told.append((step, facts))
    before = parameters(student)
    norm = next(p for n, p in student.module.named_parameters() if n.endswith("norm.weight"))
    hook = norm.register_hook(lambda g: g * float("nan"))
    report = learner.update(made, teacher.evidence(made))
    assert not report.applied and math.isnan(report.metrics["grad_norm"])
    assert torch.equal(before, parameters(student)) and learner.weights().version == 0
    assert told[0][0] == 1 and told[0][1]["rollouts"] == [r.id for r in made]
    hook.remove()
    report = learner.update(made, teacher.evidence(made))
    assert report.applied and report.metrics["bad_steps"] == 1
    assert learner.weights().version == 1 and not torch.equal(before, parameters(student))


def test_too_many_bad_steps_in_a_row_stop_the_run() -> None:
    student, teacher, made = parts()
    learner = rooms.learner(student, learner={"max_bad_steps": 3})
    weight = student.module.get_output_embeddings().weight
    hook = weight.register_hook(lambda g: g * float("inf"))
    for _ in range(2):
        assert not learner.update(made, teacher.evidence(made)).applied
    hook.remove()
    assert learner.update(made, teacher.evidence(made)).applied  # a good step starts the count again
    weight.register_hook(lambda g: g * float("inf"))
    for _ in range(2):
        learner.update(made, teacher.evidence(made))
    with pytest.raises(TrainingDiverged, match="max_bad_steps = 3"):
        learner.update(made, teacher.evidence(made))


def test_O_20_a_step_without_a_single_token_to_train_is_an_error() -> None:
    student, teacher, made = parts()
    for rollout in made:
        rollout.mask[:] = False
    with pytest.raises(DataError, match="no token to train"):
        rooms.learner(student).update(made, teacher.evidence(made))


def test_O_20_later_such_a_step_is_skipped_told_and_counted() -> None:
    student, teacher, made = parts()
    learner = rooms.learner(student, learner={"max_bad_steps": 2})
    told = []
    learner._on_bad_step = lambda step, facts: told.append((step, facts))
    assert learner.update(made, teacher.evidence(made)).applied
    before = parameters(student)
    empty = [dataclasses.replace(r, mask=np.zeros_like(r.mask)) for r in made]
    report = learner.update(empty, teacher.evidence(empty))
    assert not report.applied and report.metrics["trained_tokens"] == 0 and learner.step == 2
    assert torch.equal(before, parameters(student)) and learner.updates == 1
    assert told[0][0] == 2 and "masked by environment" in told[0][1]["why"]
    assert learner.update(made, teacher.evidence(made)).applied and learner.bad_in_a_row == 0
    learner.update(empty, teacher.evidence(empty))
    with pytest.raises(TrainingDiverged, match="nothing to train"):
        learner.update(empty, teacher.evidence(empty))


def test_several_updates_on_one_batch_move_further_and_measure_the_gap() -> None:
    student, teacher, made = parts()
    learner = rooms.learner(student, {"preset": "tml"}, learner={"updates_per_batch": 3}, optim={"lr": 1e-3})
    report = learner.update(made, teacher.evidence(made))
    assert learner.weights().version == 3 and learner.step == 1
    assert report.metrics["policy_gap_max"] > 1e-3  # the last of the three was not on-policy any more


def test_the_gradient_is_clipped_to_its_norm() -> None:
    """With plain AdamW the size of a clipped gradient cannot be seen in the step, so the gradient itself is read."""
    student, teacher, made = parts()
    learner = rooms.learner(student, optim={"clip_norm": 1e-3})
    learner.gradients(made, teacher.evidence(made))
    seen = []
    learner.optimizer.step = lambda: seen.append(rooms.gradient(student).norm().item())
    learner._apply(made, {"loss": 0.0})
    assert seen[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "step", "rate"),
    [
        ({"schedule": "constant"}, 99, 1.0),
        ({"schedule": "constant", "warmup_steps": 4}, 0, 0.25),
        ({"schedule": "constant", "warmup_steps": 4}, 3, 1.0),
        ({"schedule": "linear"}, 50, 0.5),
        ({"schedule": "linear", "final_lr_fraction": 0.2}, 50, 0.6),
        ({"schedule": "cosine"}, 0, 1.0),
        ({"schedule": "cosine"}, 50, 0.5),
        ({"schedule": "cosine", "warmup_steps": 50}, 75, 0.5),
    ],
    ids=str,
)
def test_learning_rate(spec: dict, step: int, rate: float) -> None:
    assert learning_rate(Optim(lr=2.0, **spec), step, 100) == pytest.approx(2.0 * rate)


def test_weight_decay_spares_vectors() -> None:
    groups = make_optimizer(rooms.causal(), Optim(weight_decay=0.1)).param_groups
    for group in groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0)
    assert {p.ndim > 1 for g in groups for p in g["params"]} == {True, False}


def test_the_schedule_runs_over_updates_not_over_steps() -> None:
    """Two steps of two updates, linear to zero: the rates are those of updates 1 and 3 out of 4."""
    student, teacher, made = parts()
    changes = {"optim": {"lr": 1e-4, "schedule": "linear"}, "run": {"steps": 2}}
    learner = rooms.learner(student, {"preset": "tml"}, learner={"updates_per_batch": 2}, **changes)
    rates = [learner.update(made, teacher.evidence(made)).metrics["lr"] for _ in range(2)]
    assert rates == pytest.approx([0.75e-4, 0.25e-4])
