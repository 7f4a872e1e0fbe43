"""One temperature where answers are drawn, where the student is compared and where the scorer is read; and no drift."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opd.config.schema import Config
from opd.learner.optim import make_optimizer
from opd.models.packing import pack
from opd.rollouts.engine import EmbeddedEngine
from opd.types import SamplingParams, Want
from tests import rooms
from tests.loop.faulty import ready

TERM = {"name": "t", "support": "sampled", "importance": "ratio"}


def written(student, fmt, path: str, temperature: float):
    stops = tuple(range(0, student.vocab_size, 8))
    params = SamplingParams(max_tokens=12, samples_per_prompt=2, temperature=temperature, stop_ids=stops)
    return EmbeddedEngine(student, seed=0, slots=8, path=path).generate(rooms.prompts(fmt), params, tag="t")


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
@pytest.mark.parametrize(("kind", "path"), [("qwen3", "lean"), ("qwen3", "generic"), ("gpt2", "generic")])
def test_T_5_T_9_the_ratio_is_one_on_fresh_answers_at_any_temperature(kind: str, path: str, temperature: float) -> None:
    """What the sampler recorded is what the learner recomputes; a record without the temperature would be seen."""
    fmt = rooms.prompt_format()
    student, teacher = rooms.causal(kind, seed=0), rooms.teacher(rooms.causal(kind, seed=1), fmt)
    made = written(student, fmt, path, temperature)
    seen = {}
    for compared in {temperature, 1.0}:
        learner = rooms.learner(student, rooms.objective(TERM, student_temperature=compared))
        seen[compared] = learner.gradients(made, teacher.evidence(made))
    assert seen[temperature]["policy_gap_max"] < 1e-4
    assert seen[temperature]["term/t/ess"] == pytest.approx(1.0, abs=1e-6)
    if temperature != 1.0:
        assert seen[1.0]["policy_gap"] > 0.05 and seen[1.0]["policy_gap_max"] > 0.1


@pytest.mark.parametrize("resolution", ["sampled", "full"])
def test_T_2_T_3_what_a_scorer_says_does_not_depend_on_the_samplers_temperature(resolution: str) -> None:
    """The same tokens, said to be drawn at 0, at 0.3 and at 1: one score, that of the scorer's own temperature."""
    fmt = rooms.prompt_format()
    model = rooms.causal(seed=1)
    made = written(rooms.causal(seed=0), fmt, "generic", 1.0)
    found = []
    for drawn_at, own in ((1.0, 1.0), (0.3, 1.0), (0.0, 1.0), (0.3, 0.5)):
        told = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=drawn_at)) for r in made]
        teacher = rooms.teacher(model, fmt, temperature=own)
        want = {"teacher": Want(resolution, frozenset(r.id for r in told))}
        (rows,) = teacher.evidence(told).pull(pack(told, device=model.device), want)
        found.append((rows.logprobs_T if rows.hidden_TD is None else rows.hidden_TD, rows.temperature))
    (first, *_, (sharper, _)), read_at = found, [temperature for _, temperature in found]
    assert all(torch.equal(first[0], scores) for scores, _ in found[:3]) and read_at == [1.0, 1.0, 1.0, 0.5]
    assert (resolution == "full") == torch.equal(first[0], sharper), "hidden states are divided in the pass"


def test_T_2_T_3_the_scorers_temperature_is_a_field_of_its_own_and_not_nought() -> None:
    config = rooms.config({"preset": "reverse_kl"}, sampling={"temperature": 0.5})
    assert config.objective.teacher_temperature == config.objective.student_temperature == 1.0
    assert config.teacher is not None and config.teacher.temperature is None
    for section in ({"teacher": {"model": "t", "temperature": 0}}, {"objective": {"teacher_temperature": 0}}):
        with pytest.raises(ValueError, match="greater than 0"):
            Config.model_validate({"student": {"model": "s"}, "prompts": {"sources": []}, **section})


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_T_8_the_models_own_sampling_defaults_are_not_taken(path: str) -> None:
    """A model may bring top_k, top_p, a temperature and a length; ours are all said, and what was said is kept."""
    fmt = rooms.prompt_format()
    plain = written(rooms.causal(seed=0), fmt, path, 1.0)
    student = rooms.causal(seed=0)
    student.module.generation_config.update(
        do_sample=False, top_k=1, top_p=0.1, temperature=0.2, max_new_tokens=2, repetition_penalty=5.0
    )
    made = written(student, fmt, path, 1.0)
    for one, other in zip(plain, made, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_array_equal(one.behaviour_logprobs, other.behaviour_logprobs)
        said = other.sampling
        assert said is not None and (said.temperature, said.top_p, said.top_k, said.max_tokens) == (1.0, 1.0, 0, 12)
    assert max(len(r.response_ids) for r in made) > 2


@pytest.mark.parametrize("preset", ["reverse_kl", "tml"])
def test_T_10_without_a_learning_rate_nothing_moves_and_the_gap_stays_at_rounding(preset: str) -> None:
    """A learning rate of 0 is refused in a config; here it shows that sampler and learner do not drift apart."""
    run = ready(own_writer=True, objective={"preset": preset})
    run.learner._optim = run.learner._optim.model_copy(update={"lr": 0.0})
    run.learner.optimizer = make_optimizer(run.student, run.learner._optim)
    before = {name: p.detach().clone() for name, p in run.student.module.named_parameters()}
    run.go(8)
    assert run.fired == {}
    for name, p in run.student.module.named_parameters():
        assert torch.equal(p, before[name]), name
    assert max(line["policy_gap_max"] for line in run.history) < 1e-3
    kl = [line["reverse_kl"] for line in run.history]
    assert max(kl) - min(kl) < 0.5 * np.mean(kl), "other answers to the same questions, no trend"
