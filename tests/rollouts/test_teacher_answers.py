"""SeqKD: a scorer writes in its own ids behind its own prompts; the student's ids and prompts stand in the rollouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opd.errors import ModelError
from opd.protocols import Sampler
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.scorer import as_read
from opd.rollouts.teacher_answers import TeacherAnswers
from opd.types import SamplingParams
from tests import crossing, rooms
from tests.rollouts.reference import causal, distribution, logits, prompts
from tests.rollouts.scorers import Scorer, scorer_for


def _sampler(scorer: Scorer, **settings) -> TeacherAnswers:
    return TeacherAnswers(scorer, **{"seed": 1, "slots": 5, "path": "auto", **settings})


class _Weights:
    version = 7

    def tensors(self):
        return {}


def test_T_07_tokens_come_from_the_scorer_and_their_log_probabilities_are_its_own():
    """The student's end 2 is the scorer's 5, and the other way round; 11 ends the scorer's answers alone."""
    asked = prompts(5, 9, 3)
    scorer = scorer_for(causal("llama", seed=5), asked, end_map=((2, 5),), end_ids=(5, 11))
    with torch.no_grad():  # both ends come often
        scorer.net.module.get_output_embeddings().weight[[5, 11]] *= 8
    params, seen = SamplingParams(max_tokens=12, temperature=0.8, stop_ids=(2,), samples_per_prompt=8), []
    sampler = _sampler(scorer, progress=seen.append)
    assert isinstance(sampler, Sampler)
    sampler.load(_Weights())
    made = sampler.generate(asked, params, tag="t")
    assert [r.id for r in made] == [f"t/{p.id}/{s}" for p in asked for s in range(8)]
    lasts = set()
    for rollout in made:
        assert rollout.prompt is next(p for p in asked if p.id == rollout.prompt.id)
        theirs_T = np.array([{2: 5, 5: 2}.get(token, token) for token in rollout.response_ids.tolist()])
        for t, token in enumerate(theirs_T):
            behind = np.concatenate([scorer.prompt_ids(rollout.prompt.row), theirs_T[:t]])
            exact_V = distribution(logits(scorer.net, behind), params)
            assert rollout.behaviour_logprobs[t] == pytest.approx(np.log(exact_V[token]), abs=1e-4)
        ended = [token in (2, 11) for token in rollout.response_ids]
        assert not any(ended[:-1]) and rollout.finish_reason == ("stop" if ended[-1] else "length")
        assert (rollout.behaviour, rollout.policy_version, rollout.sampling) == ("teacher", 7, params)
        lasts.add(int(rollout.response_ids[-1]))
    assert {2, 11} <= lasts and len(lasts) > 2
    assert seen[-1] == 24 and scorer.log == ["fetch", "release"]


def test_the_same_tag_writes_the_same_and_batches_change_nothing():
    asked = prompts(5, 9, 3)
    scorer = scorer_for(causal(seed=5), asked)
    params = SamplingParams(max_tokens=6, samples_per_prompt=2)
    whole = [r.response_ids.tolist() for r in _sampler(scorer).generate(asked, params, tag="t")]
    apart = [r.response_ids.tolist() for p in asked for r in _sampler(scorer, slots=1).generate([p], params, tag="t")]
    assert whole == apart
    assert whole != [r.response_ids.tolist() for r in _sampler(scorer).generate(asked, params, tag="u")]


def test_a_broken_scorer_is_named_and_leaves_the_device():
    asked = prompts(5)
    scorer = scorer_for(causal(seed=5), asked, name="big")
    sampler = _sampler(scorer, path="generic")
    with torch.no_grad():
        scorer.net.module.get_output_embeddings().weight[5] = float("nan")
    with pytest.warns(RuntimeWarning), pytest.raises(ModelError, match="the scorer big's logits are not finite"):
        sampler.generate(asked, SamplingParams(max_tokens=2), tag="t")
    assert scorer.log == ["fetch", "release"]


@pytest.mark.parametrize("family", ["unigram", "byte_bpe_digits"])
def test_A_13_what_a_scorer_with_other_tokens_wrote_is_the_same_text_in_the_students(family):
    """Ends become the student's, lengths are counted in its tokens, and nobody sampled them."""
    student, theirs = crossing.fmt("byte_bpe"), crossing.fmt(family)
    scorer = rooms.teacher(crossing.model(theirs, seed=3), theirs, student)
    end = theirs.end_ids[0]
    with torch.no_grad():
        scorer.model.module.get_output_embeddings().weight[end] *= 3
    asked = rooms.prompts(student)
    params = SamplingParams(max_tokens=14, samples_per_prompt=6, stop_ids=student.end_ids)
    sampler = _sampler(scorer)
    sampler.load(_Weights())
    made = sampler.generate(asked, params, tag="t")
    raw = _raw(scorer, asked, params)
    assert {r.finish_reason for r in made} == {"stop", "length"} and len(made) == len(raw)
    seen = set()
    for rollout, wrote in zip(made, raw, strict=True):
        T, whole = len(rollout.response_ids), student.tokenizer.decode(rollout.response_ids)
        assert rollout.id == wrote.id and rollout.prompt is next(p for p in asked if p.id == rollout.prompt.id)
        assert np.isnan(rollout.behaviour_logprobs).all() and rollout.behaviour_logprobs.shape == (T,)
        assert rollout.mask.all() and rollout.mask.shape == (T,) and rollout.turns == ((0, T),) and T <= 14
        assert (rollout.behaviour, rollout.policy_version, rollout.sampling) == ("teacher", 7, params)
        ended = rollout.finish_reason == "stop"
        assert ended == bool(T and rollout.response_ids[-1] == student.end_ids[0])
        seen.add((ended, wrote.finish_reason))
        text = theirs.tokenizer.decode(wrote.response_ids)
        if ended and "\ufffd" not in text:
            assert whole.strip() == text.strip()
    assert (True, "stop") in seen and (False, "length") in seen and (True, "length") not in seen


def _raw(scorer, asked, params):
    """The same answers as the scorer itself drew them."""
    engine = EmbeddedEngine(scorer.model, seed=1, slots=5, path="auto")
    return engine.generate(as_read(asked, scorer), replace(params, stop_ids=scorer.format.end_ids), tag="t")
