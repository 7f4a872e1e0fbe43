"""What the student writes in: another type than it computes in, and what is refused."""

import numpy as np
import pytest
import torch

from opd.config.checks import check
from opd.config.schema import Config
from opd.errors import ConfigError, ModelError
from opd.models.causal import CausalLM
from opd.rollouts import decoding, lean_weights
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.lean import LeanDecoder
from opd.types import SamplingParams
from opd.wiring.writing import student_engine
from tests import tiny
from tests.rollouts.reference import VOCAB, assert_chi_square, causal, distribution, logits, prompts, recomputed

CONFIG = {
    "student": {"model": "s"},
    "teacher": {"model": "t"},
    "prompts": {"sources": [{"kind": "jsonl", "path": "p.jsonl"}]},
}


def _engine(model: CausalLM, dtype: torch.dtype, path: str = "auto") -> EmbeddedEngine:
    return EmbeddedEngine(model, seed=1, slots=7, path=path, compute_dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "gemma3"])
def test_bfloat16_answers_carry_the_log_probabilities_of_a_bfloat16_forward_pass(kind):
    model, params = causal(kind), SamplingParams(max_tokens=20, samples_per_prompt=2)
    engine = _engine(model, torch.bfloat16)
    assert engine.path == "lean"
    to_exact = []
    for rollout in engine.generate(prompts(5, 14, 3), params, tag="t"):
        with torch.autocast("cpu", torch.bfloat16):
            same_T = recomputed(model, rollout, params)
        exact_T = recomputed(model, rollout, params)
        largest = np.abs(logits(model, rollout.prompt.ids)).max()
        np.testing.assert_allclose(rollout.behaviour_logprobs, same_T, atol=5e-2 * largest)
        to_exact.append(np.abs(rollout.behaviour_logprobs - exact_T).max())
    assert max(to_exact) > 1e-3  # it did write in bfloat16


def test_a_student_that_computes_in_bfloat16_may_write_in_float32():
    model = CausalLM(tiny.model(), vocab_size=VOCAB, compute_dtype=torch.bfloat16, name="student")
    params = SamplingParams(max_tokens=12)
    for rollout in _engine(model, torch.float32).generate(prompts(5, 9), params, tag="t"):
        np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(model, rollout, params), atol=1e-4)


def test_first_tokens_in_bfloat16_follow_the_law_they_record():
    model, draws = causal(), 6000
    params = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.95, samples_per_prompt=draws)
    asked = prompts(6)
    rollouts = _engine(model, torch.bfloat16).generate(asked, params, tag="t")
    _, logits_1V = LeanDecoder(model, slots=1, capacity=8, dtype=torch.bfloat16).prefill([asked[0].ids])
    law_V = distribution(logits_1V[0].numpy(), params)
    token_N = np.array([r.response_ids[0] for r in rollouts])
    assert_chi_square(np.bincount(token_N, minlength=VOCAB), law_V * draws)
    recorded_N = np.array([r.behaviour_logprobs[0] for r in rollouts])
    np.testing.assert_allclose(recorded_N, np.log(law_V[token_N]), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_used_too_little_to_be_packed_give_the_same(dtype):
    model, (prompt,) = causal(), prompts(9)
    made = []
    for steps in (1, None):
        decoder = LeanDecoder(model, slots=2, capacity=12, dtype=dtype, steps=steps)
        prefilled, first_PV = decoder.prefill([prompt.ids])
        decoder.join(prefilled, [0, 0])
        made.append((first_PV, decoder.step(torch.tensor([3, 4]))))
    for few, many in zip(*made, strict=True):
        assert (few - many).abs().max() < (1e-5 if dtype == torch.float32 else 3e-2) * many.abs().max()


@pytest.mark.parametrize(("kind", "path"), [("qwen3", "generic"), ("gpt2", "auto")])
def test_a_model_that_writes_with_its_own_forward_has_no_other_dtype(kind, path):
    with pytest.raises(
        ModelError, match=r"engine\.dtype is bfloat16, but .* computes in float32: .* Set engine\.dtype to"
    ):
        _engine(causal(kind), torch.bfloat16, path)
    assert _engine(causal(kind), torch.float32, path).path == "generic"


def test_a_decoder_that_disagrees_is_refused_where_its_dtype_was_asked_for(monkeypatch):
    right = lean_weights._norm
    monkeypatch.setattr(lean_weights, "_norm", lambda norm: lean_weights.Norm(right(norm).weight * 3, 1e-6))
    with pytest.raises(ModelError, match=r"engine\.dtype is bfloat16.*its logits differ"):
        _engine(causal(), torch.bfloat16)


def test_a_processor_without_bfloat16_products_is_told(monkeypatch):
    monkeypatch.setattr(decoding, "native_bfloat16", lambda device: False)
    with pytest.warns(RuntimeWarning, match="no bfloat16 products"):
        _engine(causal(), torch.bfloat16)


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_config_says_what_the_student_writes_in(asked, dtype):
    config = Config.model_validate({**CONFIG, "engine": {"dtype": asked, "slots": 3}})
    engine = student_engine(config, causal(), seed=5)
    assert (engine.decoding.dtype, engine.slots, engine.seed) == (dtype, 3, 5)


def test_a_dtype_for_the_models_own_forward_is_refused_when_the_config_is_read():
    with pytest.raises(ConfigError, match=r"engine\.dtype: engine\.path is generic"):
        check(Config.model_validate({**CONFIG, "engine": {"dtype": "bfloat16", "path": "generic"}}))
