"""Two models that write together: against full forward passes of both, and against all answers enumerated."""

import itertools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from opd.config.behaviours import Speculative, TeacherMixed
from opd.errors import BadInput, ModelError
from opd.protocols import Sampler
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.mixed import MixedAnswers
from opd.types import SamplingParams
from tests.rollouts.reference import VOCAB, assert_binomial, causal, distribution, logits, prompts
from tests.rollouts.scorers import Scorer, scorer_for

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

STOPS = (2, 7, 11, 13, 17, 19, 23)
SPECS = [TeacherMixed(alpha=0.3), Speculative(top_k=5)]
ids = [spec.kind for spec in SPECS]


def _sampler(spec, student, scorer: Scorer, *, slots: int = 7, path="auto", progress=None) -> MixedAnswers:
    engine = EmbeddedEngine(student, seed=1, slots=slots, path="auto")
    return MixedAnswers(spec, engine, scorer, path=path, progress=progress)


def _law(spec, student_V: np.ndarray, teacher_V: np.ndarray, params: SamplingParams, temperature: float) -> np.ndarray:
    """float64 [V] by the definition; logits in the student's ids."""
    p_V = distribution(student_V, params)
    if isinstance(spec, TeacherMixed):
        return spec.alpha * distribution(teacher_V, params) + (1 - spec.alpha) * p_V
    kept = np.argsort(-teacher_V, kind="stable")[: spec.top_k]
    refused = sum(p_V[v] for v in range(len(p_V)) if v not in kept)
    law_V = refused * distribution(teacher_V, replace(params, temperature=temperature))
    law_V[kept] += p_V[kept]
    return law_V


def _next(spec, student, scorer: Scorer, prompt, answer, params: SamplingParams) -> np.ndarray:
    """float64 [V]: the law of the token behind an answer so far, by two forward passes over everything."""
    order = scorer.agreement.teacher_ids(np.arange(student.vocab_size))
    answer = np.array(answer, dtype=np.int64)
    student_V = logits(student, np.concatenate([prompt.ids, answer]))
    teacher_V = logits(scorer.net, np.concatenate([scorer.prompt_ids(prompt.row), order[answer]]))[order]
    return _law(spec, student_V, teacher_V, params, scorer.temperature)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize(("student", "teacher"), [("qwen3", "llama"), ("gpt2", "qwen3"), ("qwen3", "qwen3_next")])
def test_T_07_recorded_log_probabilities_are_those_of_both_models_by_full_forward_passes(spec, student, teacher):
    """Prompts differ in tokens and length, ends are exchanged, temperatures and cuts apply, slots are refilled."""
    ours, theirs, asked = causal(student, scale=12.0), causal(teacher, seed=5, scale=12.0), prompts(5, 9, 3, 5)
    scorer = scorer_for(theirs, asked, end_map=((2, 5),), temperature=1.3)
    for params in (
        SamplingParams(max_tokens=8, stop_ids=STOPS, samples_per_prompt=2),
        SamplingParams(max_tokens=3, temperature=0.7, top_p=0.9),
    ):
        made = _sampler(spec, ours, scorer, slots=3).generate(asked, params, tag="t")
        assert [r.id for r in made] == [f"t/{p.id}/{s}" for p in asked for s in range(params.samples_per_prompt)]
        for rollout in made:
            exact_T = [
                np.log(_next(spec, ours, scorer, rollout.prompt, rollout.response_ids[:t], params)[token])
                for t, token in enumerate(rollout.response_ids)
            ]
            np.testing.assert_allclose(rollout.behaviour_logprobs, exact_T, atol=2e-4)
            ended = [token in params.stop_ids for token in rollout.response_ids]
            assert not any(ended[:-1]) and rollout.finish_reason == ("stop" if ended[-1] else "length")
            assert ended[-1] or len(ended) == params.max_tokens
            assert rollout.behaviour == spec.kind and rollout.sampling == params and rollout.mask.all()
            assert rollout.turns == ((0, len(ended)),)
    assert len({r.response_ids.tobytes() for r in made}) > 1
    assert scorer.log == ["fetch", "release"] * 2


@pytest.mark.parametrize("spec", [TeacherMixed(alpha=0.3), Speculative(top_k=2)], ids=ids)
def test_all_answers_come_as_often_as_they_are_likely(spec):
    """5 tokens, the third ends an answer, at most 3 of them: every answer is enumerated, its frequency lies within
    exact binomial bounds, and the probabilities of all answers add up to 1."""
    ours, theirs, asked = causal(vocab_size=5, scale=20.0), causal(vocab_size=5, scale=20.0, seed=4), prompts(4)
    asked = [replace(asked[0], ids=asked[0].ids % 5)]
    scorer = scorer_for(theirs, asked, end_map=((2, 4),), prefix=(1, 3), temperature=0.8)
    draws = 4000
    params = SamplingParams(max_tokens=3, stop_ids=(2,), samples_per_prompt=draws)
    made = _sampler(spec, ours, scorer, slots=1000).generate(asked, params, tag="t")
    seen: dict[tuple[int, ...], int] = {}
    for rollout in made:
        answer = tuple(rollout.response_ids.tolist())
        seen[answer] = seen.get(answer, 0) + 1
    laws = {
        prefix: _next(spec, ours, scorer, asked[0], prefix, params)
        for length in range(3)
        for prefix in itertools.product((0, 1, 3, 4), repeat=length)
    }
    total = 0.0
    for length in (1, 2, 3):
        for answer in itertools.product(range(5), repeat=length):
            if 2 in answer[:-1] or (length < 3 and answer[-1] != 2):
                continue
            likely = float(np.prod([laws[answer[:t]][token] for t, token in enumerate(answer)]))
            total += likely
            assert_binomial(seen.pop(answer, 0), draws, likely)
    assert total == pytest.approx(1, abs=1e-6) and not seen


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_next"])
def test_slots_padding_and_the_order_of_prompts_change_nothing(spec, kind):
    ours, theirs, asked = causal(kind, scale=12.0), causal(kind, seed=3, scale=12.0), prompts(5, 2, 5, 14)
    params = SamplingParams(max_tokens=10, stop_ids=tuple(range(2, VOCAB, 6)), samples_per_prompt=3)
    scorer = scorer_for(theirs, asked)
    wide = _sampler(spec, ours, scorer, slots=64).generate(asked, params, tag="t")
    assert len({len(r.response_ids) for r in wide}) >= 3
    for slots in (1, 4) if kind == "qwen3" else (4,):
        _assert_same(_sampler(spec, ours, scorer, slots=slots).generate(asked, params, tag="t"), wide)
    turned = _sampler(spec, ours, scorer).generate(asked[::-1], params, tag="t")
    _assert_same([turned[(3 - p) * 3 + s] for p in range(4) for s in range(3)], wide)
    generic = _sampler(spec, ours, scorer, path="generic").generate(asked, params, tag="t")
    _assert_same(generic, wide)
    again, other = (_sampler(spec, ours, scorer).generate(asked, params, tag=tag) for tag in ("t", "u"))
    _assert_same(again, wide)
    assert any(a.response_ids.tolist() != b.response_ids.tolist() for a, b in zip(other, wide, strict=True))


def _assert_same(ours, theirs) -> None:
    assert [r.id for r in ours] == [r.id for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        np.testing.assert_allclose(one.behaviour_logprobs, other.behaviour_logprobs, rtol=1e-5, atol=2e-5)


def test_W_01_both_models_write_with_the_weights_they_have_now():
    ours, theirs, asked = causal(), causal(seed=3), prompts(5, 7)
    params, spec = SamplingParams(max_tokens=6), SPECS[0]
    scorer, seen = scorer_for(theirs, asked), []
    sampler = _sampler(spec, ours, scorer, progress=seen.append)
    assert isinstance(sampler, Sampler)
    sampler.generate(asked, params, tag="t")
    assert seen[-1] == 2
    with torch.no_grad():
        for model, factor in ((ours, 1.2), (theirs, 0.8)):
            for parameter in model.module.parameters():
                parameter.mul_(factor)

    class Now:
        version = 4

        def tensors(self):
            return ours.module.state_dict()

    sampler.load(Now())
    for rollout in sampler.generate(asked, params, tag="t"):
        assert rollout.policy_version == 4
        for t, token in enumerate(rollout.response_ids):
            law_V = _next(spec, ours, scorer, rollout.prompt, rollout.response_ids[:t], params)
            assert rollout.behaviour_logprobs[t] == pytest.approx(np.log(law_V[token]), abs=2e-4)
    assert sampler.generate([], params, tag="t") == []


def test_a_prompt_that_is_too_long_for_the_scorer_alone_is_named():
    asked = prompts(230)
    scorer = scorer_for(causal("gpt2", seed=3), asked, prefix=tuple(range(9)))
    with pytest.raises(BadInput, match=r"rows/0 has 239 tokens.*20.*259.*scorer teacher's context is 256"):
        _sampler(SPECS[0], causal(), scorer).generate(asked, SamplingParams(max_tokens=20), tag="t")
    assert scorer.log == ["fetch", "release"]


@pytest.mark.parametrize(("broken", "said"), [(0, "the student's logits"), (1, "scorer teacher")])
def test_logits_that_are_not_finite_name_the_model(broken, said):
    models, asked = [causal(), causal(seed=3)], prompts(5)
    sampler = _sampler(SPECS[1], models[0], scorer_for(models[1], asked), path="generic")
    with torch.no_grad():
        models[broken].module.get_output_embeddings().weight[VOCAB - 1] = float("nan")
    with pytest.warns(RuntimeWarning) if broken else nullcontext(), pytest.raises(ModelError, match=said):
        sampler.generate(asked, SamplingParams(max_tokens=2), tag="t")
