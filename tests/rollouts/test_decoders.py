"""Which decoder runs which model, and what happens to models that neither knows."""

import numpy as np
import pytest
import torch
from torch import nn

from opd.errors import ModelError
from opd.models.causal import CausalLM
from opd.rollouts import generic, lean_weights
from opd.rollouts.decoding import disagreement
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.generic import GenericDecoder
from opd.rollouts.lean import LeanDecoder
from opd.types import SamplingParams
from tests import tiny
from tests.rollouts.reference import causal, prompts, recomputed

ROPE = {"rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, **ROPE,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, **ROPE}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("gemma3", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 20}),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_lean_decoder_follows_the_options_of_an_architecture(kind, settings):
    model = causal(kind, **settings)
    with torch.no_grad():  # new biases and norms are constants; make them matter
        for name, parameter in model.module.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    assert lean_weights.unsupported(model) is None
    assert disagreement(LeanDecoder(model, slots=3, capacity=40), model) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_lean_decoder_computes_in_bfloat16_like_autocast(kind):
    model = CausalLM(tiny.model(kind, scale=1.0), vocab_size=300, compute_dtype=torch.bfloat16, name=kind)
    assert disagreement(LeanDecoder(model, slots=3, capacity=40), model) < 3e-2
    assert disagreement(GenericDecoder(model), model) < 3e-2


def test_qwen2_and_its_biases_run_lean():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1, pad_token_id=0,
    )  # fmt: skip
    module = Qwen2ForCausalLM(config).eval()
    for layer in module.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias)
    model = CausalLM(module, vocab_size=300, compute_dtype=torch.float32, name="qwen2")
    assert EmbeddedEngine(model, seed=0, slots=2, path="lean").path == "lean"


class _Wrapped(nn.Linear):
    """Stands for any layer that is not a plain projection: quantised, or with an adapter on it."""


def _wrapped() -> CausalLM:
    model = causal()
    model.module.model.layers[1].mlp.up_proj.__class__ = _Wrapped
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: causal("gpt2"), "GPT2LMHeadModel is not one of"),
        (lambda: causal("qwen3_moe"), "Qwen3MoeForCausalLM is not one of"),
        (lambda: causal("llama", rope_parameters=DYNAMIC), "rope type dynamic is not one of"),
        (lambda: causal("gemma3", attn_logit_softcapping=50.0), "caps attention scores"),
        (lambda: causal("gemma3", use_bidirectional_attention=True), "bidirectional"),
        (_wrapped, r"up_proj of layer 1 is a .*_Wrapped"),
    ],
)
def test_models_that_lean_cannot_run_say_why(make, reason):
    model = make()
    with pytest.raises(ModelError, match=reason):
        EmbeddedEngine(model, seed=0, slots=2, path="lean")


def test_models_that_lean_cannot_run_are_written_by_their_own_forward():
    assert EmbeddedEngine(causal("llama", rope_parameters=DYNAMIC), seed=0, slots=2, path="auto").path == "generic"


def test_a_lean_decoder_that_disagrees_with_the_model_is_not_used(monkeypatch):
    right = lean_weights._norm
    monkeypatch.setattr(lean_weights, "_norm", lambda norm: lean_weights.Norm(right(norm).weight * 1.05, 1e-6))
    with pytest.warns(RuntimeWarning, match="slower generic path: its logits differ"):
        assert EmbeddedEngine(causal(), seed=0, slots=2, path="auto").path == "generic"
    with pytest.raises(ModelError, match="its logits differ"):
        EmbeddedEngine(causal(), seed=0, slots=2, path="lean")


def test_a_cache_of_unknown_kind_gets_one_prompt_length_at_a_time(monkeypatch):
    monkeypatch.setattr(generic, "_JOINABLE", set())
    model, params = causal("mistral"), SamplingParams(max_tokens=12, stop_ids=(2, 7, 11), samples_per_prompt=3)
    engine = EmbeddedEngine(model, seed=1, slots=4, path="generic")
    apart = engine.generate(prompts(5, 9, 5), params, tag="t")
    for rollout in apart:
        np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(model, rollout, params), atol=1e-4)


def test_a_model_that_ignores_its_mask_gets_one_prompt_length_at_a_time(monkeypatch):
    model, params = causal("gpt2"), SamplingParams(max_tokens=6, samples_per_prompt=2)
    forward = GenericDecoder._forward
    monkeypatch.setattr(
        GenericDecoder,
        "_forward",
        lambda self, ids, cache, position, mask: forward(self, ids, cache, position, torch.ones_like(mask)),
    )
    with pytest.warns(RuntimeWarning, match="prompts of one length at a time"):
        engine = EmbeddedEngine(model, seed=0, slots=4, path="auto")
    for rollout in engine.generate(prompts(5, 9, 5), params, tag="t"):
        np.testing.assert_allclose(rollout.behaviour_logprobs, recomputed(model, rollout, params), atol=1e-4)
