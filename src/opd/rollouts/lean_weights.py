"""What the lean decoder knows about architectures, and the weights as it wants them.

All of them are one block with options: a norm before or after each half, norms on queries and keys, a window, a rope
per layer type, biases. Everything is read off the transformers module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.models.adapters import LowRank
from opd.models.causal import CausalLM
from opd.objectives.head import head_logits
from opd.types import Head

_USUAL_ROWS = 64  # only a hint for the packed layout; any number of rows may be multiplied
STATIC_ROPES = {"default", "linear", "llama3", "yarn"}  # frequencies that do not depend on the sequence


@dataclass(frozen=True)
class Norm:
    """RMS norm; `shape` is what the mean of squares runs over."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
        return wide.to(x.dtype)


# A private operator of torch: where a version lacks it, the ordinary product does the same work.
_PACKS = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear:
    """x @ weight.T + bias in the dtype of the weight; and + x @ A.T @ B.T, where `low_rank` = A [R, in], B [out, R].

    In float32 the product B A is added to the weight, once. In 16 bits it is not: the sum would be rounded to the
    weight's own steps, in which the first updates of an adapter vanish, and the sampler would not be the student that
    is trained.

    On a CPU in float32 the weight is packed for oneDNN, torch's other matrix library: the same product, at about twice
    the speed of the default one on AMD processors and no slower elsewhere. Packing is worth it because a weight is used
    for many tokens before it changes; it is a copy.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None) -> None:
        if low_rank is not None and weight.dtype == torch.float32:
            weight, low_rank = weight + low_rank[1] @ low_rank[0], None
        self._weight, self._bias = weight, bias
        self._low_rank = None if low_rank is None else tuple(matrix.to(weight.dtype) for matrix in low_rank)
        self._packed: Tensor | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and _PACKS:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        x = x.to(self._weight.dtype)
        product = F.linear(x, self._weight, self._bias)
        if self._low_rank is not None:
            a_RI, b_OR = self._low_rank
            product = product + F.linear(F.linear(x, a_RI), b_OR)
        return product


@dataclass(frozen=True)
class Layer:
    """One block. Norms that an architecture does not have are None."""

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]
    scale: float
    window: int | None
    rope: str | None


@dataclass(frozen=True)
class LeanWeights:
    """`embed` and `rotary` are the module's own; projections are in the compute dtype, norms in float32.

    `logits` takes hidden states [N, D] to float32 [N, V] over real tokens.
    """

    embed: Callable[[Tensor], Tensor]
    rotary: Callable[..., tuple[Tensor, Tensor]]
    layers: tuple[Layer, ...]
    final_norm: Norm
    logits: Callable[[Tensor], Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


_SANDWICH = {
    "before_attention": "input_layernorm",
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_BEFORE = {"before_attention": "input_layernorm", "before_mlp": "post_attention_layernorm"}
_AFTER = {"after_attention": "post_attention_layernorm", "after_mlp": "post_feedforward_layernorm"}
_NORMS = {
    "LlamaForCausalLM": _BEFORE,
    "MistralForCausalLM": _BEFORE,
    "Qwen2ForCausalLM": _BEFORE,
    "Qwen3ForCausalLM": _BEFORE,
    "Olmo2ForCausalLM": _AFTER,
    "Gemma3ForCausalLM": _SANDWICH,
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def unsupported(model: CausalLM) -> str | None:
    """Why the lean decoder cannot run this model; None when it can."""
    module, config = model.module, model.config
    name = model.architecture.__name__
    if name not in _NORMS or not model.architecture.__module__.startswith("transformers.models."):
        return f"the architecture {name} is not one of {', '.join(sorted(_NORMS))}"
    ropes = config.rope_parameters
    ropes = [ropes] if "rope_type" in ropes else [rope for rope in ropes.values() if rope is not None]
    for rope in ropes:
        if rope["rope_type"] not in STATIC_ROPES:
            return f"rope type {rope['rope_type']} is not one of {', '.join(sorted(STATIC_ROPES))}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps attention scores (attn_logit_softcapping)"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    for index, layer in enumerate(module.model.layers):
        for part, names in zip((layer.self_attn, layer.mlp), _PROJECTIONS, strict=True):
            for projection in names:
                linear, _ = model.linear_parts(getattr(part, projection))
                if type(linear) is not nn.Linear:
                    kind = f"{type(linear).__module__}.{type(linear).__name__}"
                    return f"{projection} of layer {index} is a {kind} (quantised, or of a kind unknown here)"
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        return f"its weights are on several devices or offloaded: {', '.join(sorted(map(str, devices)))}"
    return None


def gather(model: CausalLM) -> LeanWeights:
    """The module's current weights, its adapter included. Query, key and value are fused, and gate and up; the rest
    is referenced where it is in the compute dtype already."""
    body, config, dtype = model.module.model, model.config, model.compute_dtype
    attention = body.layers[0].self_attn
    norms = _NORMS[model.architecture.__name__]
    layers = []
    for layer in body.layers:
        attn, mlp = layer.self_attn, layer.mlp
        kind = getattr(attn, "layer_type", None)
        layers.append(
            Layer(
                **{name: _norm(getattr(layer, norms[name])) if name in norms else None for name in _SANDWICH},
                query_norm=_norm(attn.q_norm) if hasattr(attn, "q_norm") else None,
                key_norm=_norm(attn.k_norm) if hasattr(attn, "k_norm") else None,
                qkv=_fused(model, attn.q_proj, attn.k_proj, attn.v_proj),
                out=_fused(model, attn.o_proj),
                gate_up=_fused(model, mlp.gate_proj, mlp.up_proj),
                down=_fused(model, mlp.down_proj),
                activation=mlp.act_fn,
                scale=attn.scaling,
                window=_window(attn, config),
                rope=kind if "rope_type" not in config.rope_parameters else None,
            )
        )
    return LeanWeights(
        embed=body.embed_tokens,
        rotary=body.rotary_emb,
        layers=tuple(layers),
        final_norm=_norm(body.norm),
        logits=_logits(model.head, dtype),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        dtype=dtype,
    )


def _logits(head: Head, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight_VD = head.weight_VD[: head.vocab_size].detach().to(dtype)
    if dtype == torch.float32 and head.scale == 1.0 and head.softcap is None and head.order_V is None:
        return Linear(weight_VD, None if head.bias_V is None else head.bias_V[: head.vocab_size].detach())
    cast = replace(head, weight_VD=weight_VD)
    return lambda hidden_ND: head_logits(hidden_ND.to(dtype), cast)


def _window(attention: Any, config: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if type(attention).__name__ == "MistralAttention" else None


def _norm(norm: Any) -> Norm:
    weight = norm.weight.detach().float()
    if type(norm).__name__ == "Gemma3RMSNorm":  # stored as the distance from one
        return Norm(1.0 + weight, norm.eps)
    return Norm(weight, norm.variance_epsilon)


def _fused(model: CausalLM, *layers: Any) -> Linear:
    """One projection that gives the outputs of several, side by side."""
    parts = [model.linear_parts(layer) for layer in layers]
    weights = [linear.weight.detach().to(model.compute_dtype) for linear, _ in parts]
    biases = [linear.bias.detach().to(model.compute_dtype) for linear, _ in parts if linear.bias is not None]
    low_rank = _side_by_side([(low, len(weight)) for (_, low), weight in zip(parts, weights, strict=True)])
    if len(layers) == 1:
        return Linear(weights[0], biases[0] if biases else None, low_rank)
    return Linear(torch.cat(weights), torch.cat(biases) if biases else None, low_rank)


def _side_by_side(parts: list[tuple[LowRank | None, int]]) -> LowRank | None:
    """Adapters of layers with the same input, as one: A stacked, B a block per layer, with zeros between.

    Each part comes with the width of its layer's output.
    """
    present = [(low, width) for low, width in parts if low is not None]
    if not present:
        return None
    like = present[0][0][1]
    blocks = [like.new_zeros(width, 0) if low is None else low[1] for low, width in parts]
    return torch.cat([low[0] for low, _ in present]), torch.block_diag(*blocks)
