from __future__ import annotations

import pytest

from opd.costs.size import model_size
from opd.errors import ModelError
from tests import tiny

QWEN3_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN3_30B_A3B = {
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def test_published_sizes_from_the_config_alone():
    dense = model_size(QWEN3_8B)
    assert dense.parameters == pytest.approx(8.19e9, rel=2e-3)
    assert dense.active_parameters == dense.parameters - 151936 * 4096, (
        "an untied embedding is looked up, not multiplied"
    )
    sparse = model_size(QWEN3_30B_A3B)
    assert sparse.parameters == pytest.approx(30.5e9, rel=2e-3)
    assert sparse.active_parameters == pytest.approx(3.3e9 - 151936 * 2048, rel=0.02)
    assert sparse.mlp_width == 8 * 768


@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "qwen3_next"])
def test_count_from_shapes_is_near_the_real_one(kind):
    model = tiny.model(kind)
    stored = sum(p.numel() for p in model.parameters())
    assert model_size(model.config.to_dict()).parameters == pytest.approx(stored, rel=0.03)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_active_parameters_are_the_weights_a_token_meets(kind):
    model = tiny.model(kind)
    stored = sum(p.numel() for p in model.parameters())
    looked_up = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    idle = sum(
        p.numel() * (model.config.num_experts - model.config.num_experts_per_tok) // model.config.num_experts
        for name, p in model.named_parameters()
        if ".experts." in name
    )
    positions = model.transformer.wpe.weight.numel() if kind == "gpt2" else 0
    size = model_size(model.config.to_dict(), stored)
    assert size.active_parameters == stored - looked_up - idle - positions


def test_hybrid_caches_only_its_attention_layers_and_shapes_are_read():
    size = model_size(tiny.model("qwen3_next").config.to_dict(), 1)
    assert (size.layers, size.attention_layers) == (4, 1)
    size = model_size(QWEN3_8B)
    assert (size.hidden, size.vocab, size.attention_width, size.kv_width) == (4096, 151936, 4096, 2048)


def test_text_part_of_a_model_with_other_inputs():
    assert model_size({"vision_config": {}, "text_config": QWEN3_8B}) == model_size(QWEN3_8B)


def test_config_that_names_no_shapes():
    with pytest.raises(ModelError, match="hidden_size, n_embd, d_model"):
        model_size({"vocab_size": 5})
