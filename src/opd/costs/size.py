"""How big a model is, in the counts that FLOPs and memory follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.errors import ModelError


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Counts of one causal language model.

    parameters         all stored weights; a tied head counts once.
    active_parameters  weights that one token is multiplied with: the head, but neither a table that is only looked up
                       nor experts that the token is not routed to.
    layers             blocks; `attention_layers` of them keep keys and values.
    hidden             width of the residual stream.
    vocab              rows of the head.
    attention_width    heads x head size: the width of queries and of the attention's output.
    kv_width           2 x key-value heads x head size: numbers cached for a token in one attention layer.
    mlp_width          inner width of the MLP; of all experts of a token together.
    tables             weights that are not a layer's: embeddings, learned positions, an untied head.
    """

    parameters: int
    active_parameters: int
    layers: int = 0
    attention_layers: int = 0
    hidden: int = 0
    vocab: int = 0
    attention_width: int = 0
    kv_width: int = 0
    mlp_width: int = 0
    tables: int = 0


def model_size(config: Mapping[str, Any], parameters: int | None = None) -> ModelSize:
    """Reads the counts off a transformers config as a dict (`config.to_dict()` or a model's `config.json`).

    With `parameters`, the exact number of stored weights, every count is exact for the common architectures. Without,
    it is added up from the shapes of a Llama-like block, or GPT-2's where the config is GPT-2's: within a few percent
    for dense models and mixtures of experts, not to be trusted for recurrent layers.
    Raises ModelError when the config names no hidden width, layers, heads or vocabulary; `ModelSize(parameters=n,
    active_parameters=n)` is then the best there is: attention, caches and activations count as nothing.
    """
    config = {**config, **(config.get("text_config") or {})}
    hidden = _count(config, "hidden_size", "n_embd", "d_model")
    layers = _count(config, "num_hidden_layers", "n_layer", "num_layers")
    heads = _count(config, "num_attention_heads", "n_head", "num_heads")
    vocab = _count(config, "vocab_size")
    head_size = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    kinds = config.get("layer_types")
    attention_layers = sum("attention" in k and "linear" not in k for k in kinds) if kinds else layers
    gpt2 = "n_embd" in config
    tied = config.get("tie_word_embeddings", True)
    positions = config.get("n_positions", 0) * hidden if gpt2 else 0
    tables = (1 if tied else 2) * vocab * hidden + positions

    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    inner = max(inner) if isinstance(inner, (list, tuple)) else inner  # some models widen layer by layer
    matrices = 2 if gpt2 else 3  # up and down; and a gate
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
    chosen = config.get("num_experts_per_tok") or 0
    expert_width = config.get("moe_intermediate_size") or inner
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * expert_width
    dense_layers = _dense_layers(config, layers) if experts else layers
    idle = (layers - dense_layers) * max(experts - chosen, 0) * matrices * hidden * expert_width

    attention_width, kv_width = heads * head_size, 2 * kv_heads * head_size
    stored = parameters
    if stored is None:
        block = hidden * (2 * attention_width + kv_width) + 2 * hidden
        dense = matrices * hidden * inner
        sparse = matrices * hidden * (experts * expert_width + shared) + experts * hidden
        stored = tables + layers * block
        stored += dense_layers * dense + (layers - dense_layers) * sparse
    return ModelSize(
        parameters=stored,
        active_parameters=stored - positions - (0 if tied else vocab * hidden) - idle,
        layers=layers,
        attention_layers=attention_layers,
        hidden=hidden,
        vocab=vocab,
        attention_width=attention_width,
        kv_width=kv_width,
        mlp_width=chosen * expert_width + shared if experts else inner,
        tables=tables,
    )


def _count(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return config[name]
    raise ModelError(f"the model's config.json has none of {', '.join(names)}, so its size cannot be read off it")


def _dense_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers of a mixture of experts that have an ordinary MLP."""
    step = config.get("decoder_sparse_step") or 1
    listed = set(config.get("mlp_only_layers") or ())
    first = config.get("first_k_dense_replace") or 0
    return sum(i in listed or i < first or (i + 1) % step != 0 for i in range(layers))
