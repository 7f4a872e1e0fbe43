"""The local teacher where tests of the learner do not look: on and off its device, its ends, its fingerprint."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opd.errors import ModelError
from opd.models.packing import pack
from opd.objectives.head import head_logits
from opd.teachers.residence import InHostMemory
from opd.types import Want
from tests import rooms


@pytest.fixture
def parts():
    fmt = rooms.prompt_format()
    student = rooms.causal(seed=0)
    return student, rooms.teacher(rooms.causal(seed=1), fmt), rooms.rollouts(student, fmt), fmt


def test_an_offloaded_teacher_is_on_its_device_only_while_it_is_asked(parts) -> None:
    """A machine with one device has no other to go to, so the moves are written down instead of made."""
    student, _, made, fmt = parts
    teacher, moves = offloaded(rooms.causal(seed=1), fmt)
    learner = rooms.learner(student)
    learner.update(made, teacher.evidence(made))
    assert moves == ["meta", "cpu"]
    broken = [dataclasses.replace(r, mask=np.zeros_like(r.mask)) for r in made]
    assert not learner.update(broken, teacher.evidence(broken)).applied
    assert moves == ["meta", "cpu"], "who is not asked stays where it is"
    teacher.model.hidden = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learner.update(made, teacher.evidence(made))
    assert moves == ["meta", "cpu"] * 2, "a step that fails lets the teacher go as well"


def offloaded(model, fmt):
    """A teacher in host memory, and the list of its moves."""
    teacher, moves = rooms.teacher(model, fmt), []
    home = InHostMemory(model)
    home.device, home._away = torch.device("meta"), True
    model.module.to = lambda device: moves.append(str(device))
    teacher._residence = home
    return teacher, moves


@pytest.mark.parametrize("resolution", ["sampled", "full"])
def test_A_16_a_teacher_reads_the_students_ends_as_its_own_wherever_they_stand(resolution: str) -> None:
    """The student ends in 0, the teacher in 2; the student may write a 2 in the middle, which ends nothing for it."""
    ours, theirs = rooms.prompt_format(), rooms.prompt_format(chat=True)
    other = rooms.causal(seed=1)
    teacher = rooms.teacher(other, theirs, ours, temperature=0.7)
    prompt = rooms.prompts(ours)[0]
    made = rooms.answer(prompt, [5, 2, 7, 0], [-1.0] * 4)
    batch = pack([made], device=other.device)
    (rows,) = teacher.evidence([made]).pull(batch, {"teacher": Want(resolution, frozenset({made.id}))})
    read = [*theirs.prompt_ids(prompt.row), 5, 0, 7, 2]
    with torch.no_grad():
        logits = other.module(torch.tensor([read])).logits[0, -5:-1, : other.vocab_size].double() / 0.7
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor([[5], [0], [7], [2]]))[:, 0]
        if resolution == "full":
            logq = torch.log_softmax(head_logits(rows.hidden_TD, rows.head) / rows.temperature, -1)
            found = logq.gather(1, torch.tensor([[5], [2], [7], [0]]))[:, 0]
        else:
            found = rows.logprobs_T
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_head_moves_to_another_device_whole_and_once() -> None:
    teacher = rooms.teacher(rooms.causal(seed=1), rooms.prompt_format(chat=True), rooms.prompt_format())
    there = teacher.head_on(torch.device("meta"))
    assert there.weight_VD.is_meta and there.order_V is not None and there.order_V.is_meta
    assert teacher.head_on(torch.device("meta")) is there
    assert teacher.head_on(torch.device("cpu")).weight_VD.data_ptr() == teacher.model.head.weight_VD.data_ptr()


def test_a_teacher_made_uniform_by_its_temperature_is_refused(parts) -> None:
    student, _, _, fmt = parts
    rooms.teacher(student, fmt).check(rooms.prompts(fmt))
    with pytest.raises(ModelError, match="uniform"):
        rooms.teacher(student, fmt, temperature=1e6).check(rooms.prompts(fmt))


def test_the_fingerprint_names_weights_format_and_temperature() -> None:
    plain, chat = rooms.prompt_format(), rooms.prompt_format(chat=True)
    marks = {
        rooms.teacher(rooms.causal(seed=seed), fmt, temperature=temperature).fingerprint
        for seed, fmt, temperature in ((0, plain, 1.0), (1, plain, 1.0), (0, chat, 1.0), (0, plain, 0.7))
    }
    assert len(marks) == 4
    assert rooms.teacher(rooms.causal(seed=0), plain).fingerprint in marks


@pytest.mark.parametrize("support", ["full", "sampled"])
def test_T_01_student_equals_teacher_is_zero_at_a_shared_temperature_on_the_real_path(parts, support: str) -> None:
    student, teacher, made, fmt = parts
    objective = {"behaviour": "student", "terms": [{"name": "a", "support": support}]}
    objective |= {"student_temperature": 0.7, "teacher_temperature": 0.7}
    norms = []
    for scorer in (rooms.teacher(student, fmt, temperature=0.7), teacher):
        learner = rooms.learner(student, objective, sampling={"temperature": 0.7})
        learner.gradients(made, scorer.evidence(made))
        norms.append(rooms.gradient(student).norm().item())
    assert norms[0] < 1e-5 * norms[1]


def test_X_01_scores_that_fail_at_other_places_in_every_pass_are_all_left_out(parts) -> None:
    student, teacher, made, _ = parts
    made = [r for r in made if len(r.response_ids) > 2]

    class Flaky:
        def __init__(self) -> None:
            self.passes = 0

        def spans(self):
            return {}

        def prepare(self, wants):
            return 0

        def pull(self, batch, wants):
            (rows,) = teacher.evidence(made).pull(batch, wants)
            place_T = torch.tensor(np.concatenate([np.arange(len(r.response_ids)) for r in batch.rollouts]))
            rows.valid_T[place_T == self.passes] = False  # the first token in the first pass, the second in the second
            self.passes += self.passes < 2
            return [rows]

        def release(self) -> None: ...

    learner = rooms.learner(student, learner={"share_prompts": False})  # one micro-batch, so that a pull is a pass
    flaky = Flaky()
    metrics = learner.gradients(made, flaky)
    assert metrics["invalid_scores"] == 3 * len(made), "two passes and the one that found the third place"
    ours = rooms.gradient(student)
    for rollout in made:
        rollout.mask[:3] = False
    learner.gradients(made, teacher.evidence(made))
    assert rooms.distance(ours, rooms.gradient(student)) < 1e-5
