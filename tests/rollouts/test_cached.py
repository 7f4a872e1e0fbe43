"""Answers of an earlier run come back token by token, and another run's are refused before anything starts."""

import json
from dataclasses import replace

import numpy as np
import pytest

from opd.errors import DataError
from opd.journal.folder import RunFolder
from opd.journal.reader import read_rollouts
from opd.journal.records import rollout_row
from opd.protocols import Sampler
from opd.rollouts.cached import CachedAnswers
from opd.types import Prompt, Rollout, Row, SamplingParams

V = 50


def _show(ids) -> str:
    return " ".join(f"w{n}" for n in ids)


def _prompt(i: int, shift: int = 0) -> Prompt:
    return Prompt(row=Row(id=f"q/{i}", domain="q", prompt="x"), ids=np.array([i, 7 + shift]))


def _batch(step: int) -> list[Prompt]:
    return [_prompt((2 * step + i) % 5) for i in range(2)]


def _rollout(step: int, prompt: Prompt, s: int) -> Rollout:
    rng = np.random.default_rng([step, s, len(prompt.id), int(prompt.ids[0])])
    T = 3 + s
    logprobs = rng.normal(-2, 1, T).astype(np.float32)
    logprobs[0] = np.nan if s else logprobs[0]
    return Rollout(
        id=f"train/{step}/{prompt.id}/{s}",
        prompt=prompt,
        response_ids=rng.integers(0, V, T),
        behaviour_logprobs=logprobs,
        mask=np.array([True] * (T - 1) + [False]),
        policy_version=step,
        behaviour="student",
        finish_reason="stop",
        turns=((0, 2), (2, T)),
        reward=0.5,
    )


def _record(folder, *, steps: int = 3, samples: int = 2, fingerprint: str | None = "abc") -> list[Rollout]:
    made = []
    with RunFolder.create(folder, existing="refuse", config={}, config_hash="x") as run:
        if fingerprint is not None:
            run.log_event(0, "start", "the run begins", data=fingerprint)
        for step in range(steps):
            rollouts = [_rollout(step, prompt, s) for prompt in _batch(step) for s in range(samples)]
            run.write_rollouts(step + 1, rollouts, _show)
            made += rollouts
    return made


def _check(folder, **changes) -> None:
    settings = {"steps": 3, "samples": 2, "fingerprint": "abc", "show": _show, "batch": _batch, **changes}
    CachedAnswers(folder, vocab_size=V).check(settings.pop("batch"), **settings)


def test_what_was_recorded_comes_back(tmp_path):
    made = _record(tmp_path / "run")
    _check(tmp_path / "run")
    sampler = CachedAnswers(tmp_path / "run", vocab_size=V)
    assert isinstance(sampler, Sampler)
    params = SamplingParams(max_tokens=9, samples_per_prompt=2)
    for step in (2, 0):  # a resumed run begins anywhere
        there = [r for r in made if r.id.startswith(f"train/{step}/")]
        for given, old in zip(sampler.generate(_batch(step), params, tag=f"train/{step}"), there, strict=True):
            assert given.id == old.id and given.behaviour == "cached" and given.reward is None
            assert given.policy_version == step and given.finish_reason == "stop" and given.turns == old.turns
            for name in ("response_ids", "behaviour_logprobs", "mask"):
                one, other = getattr(given, name), getattr(old, name)
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype
    turned = sampler.generate(_batch(1)[::-1], params, tag="train/1")
    assert [r.prompt.id for r in turned] == [p.id for p in _batch(1)[::-1] for _ in range(2)]


def test_fewer_samples_are_the_first_and_longer_answers_are_cut(tmp_path):
    made = _record(tmp_path / "run")
    params = SamplingParams(max_tokens=3, samples_per_prompt=1)
    sampler = CachedAnswers(tmp_path / "run", vocab_size=V)
    given = sampler.generate(_batch(0), params, tag="train/0")
    assert [r.id for r in given] == [f"train/0/{p.id}/0" for p in _batch(0)]
    assert {r.finish_reason for r in given} == {"stop"}
    (short,) = sampler.generate(_batch(0)[:1], SamplingParams(max_tokens=2), tag="train/0")
    assert short.response_ids.tolist() == made[0].response_ids[:2].tolist() and short.finish_reason == "length"
    assert len(short.mask) == len(short.behaviour_logprobs) == 2 and short.turns == ((0, 2),)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 5}, ["3 steps", "step 4", "run.steps = 5"]),
        ({"fingerprint": "abx"}, ["abc", "abx", "prompts"]),
        ({"samples": 3}, ["2 answers to prompt q/0", "samples_per_prompt is 3"]),
        ({"show": lambda ids: "x" + _show(ids)}, ["another tokenizer", "train/0/q/0/0"]),
        ({"batch": lambda step: [_prompt(i, shift=step) for i in range(2)]}, ["q/0", "0 answers"]),
        ({"batch": lambda step: [_prompt(i, shift=1) for i in range(2)]}, ["train/0/q/0/0", "another prompt"]),
    ],
)
def test_another_run_is_refused_before_it_starts(tmp_path, changes, said):
    _record(tmp_path / "run")
    with pytest.raises(DataError) as raised:
        _check(tmp_path / "run", **changes)
    assert all(word in str(raised.value) for word in [*said, str(tmp_path)]), raised.value


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        _check(tmp_path / "none")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="no run folder"):
        _check(tmp_path / "other")


def test_tokens_that_the_student_does_not_have_are_refused(tmp_path):
    made = _record(tmp_path / "run")
    largest = max(int(r.response_ids.max()) for r in made if r.id.startswith("train/0/"))
    sampler = CachedAnswers(tmp_path / "run", vocab_size=largest)
    with pytest.raises(DataError, match=f"token {largest}"):
        sampler.generate(_batch(0), SamplingParams(max_tokens=9, samples_per_prompt=2), tag="train/0")


def test_a_reward_stands_in_the_record_where_there_is_one(tmp_path):
    _record(tmp_path / "run", steps=1)
    assert {line["reward"] for line in read_rollouts(tmp_path / "run", 1)} == {0.5}
    row = rollout_row(replace(_rollout(0, _prompt(0), 0), reward=None), "", "")
    assert "reward" not in row and json.dumps(row)
