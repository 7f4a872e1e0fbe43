"""What the lean decoder knows about architectures, and the weights as it wants them.

All of them are one block with options: a norm before or after each half, norms on queries and keys, a window, a rope
per layer type, biases. Everything is read off the transformers module itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opd.models.adapters import LowRank
from opd.models.causal import CausalLM
from opd.objectives.head import head_logits
from opd.types import Head

_USUAL_ROWS = 64  # only a hint for the packed layout; any number of rows may be multiplied
_PAYS_FROM = 16  # products with a few rows that packing a weight takes as long as it saves in
STATIC_ROPES = {"default", "linear", "llama3", "yarn"}  # frequencies that do not depend on the sequence


class Norm:
    """RMS norm over the last dimension, computed in float32; what it gives is as wide as what it gets."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        width = weight.shape[-1]
        self.weight, self.eps = weight, eps
        self._fused = weight.device.type != "cpu"
        self._gain = weight * width**0.5
        self._least = torch.tensor((width * eps) ** 0.5)

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused:
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)
        wide = x.float()
        return wide.div(self._length(wide)).mul_(self._gain).to(x.dtype)

    def in_place(self, x: Tensor) -> None:
        """As `__call__`, into float32 x itself; the weight may have a row for each row of x."""
        if self._fused:
            torch.mul(F.rms_norm(x, x.shape[-1:], None, self.eps), self.weight, out=x)
        else:
            x.div_(self._length(x)).mul_(self._gain)

    def _length(self, x: Tensor) -> Tensor:
        """Root of the sum of squares and of width x eps. Half as many operations as F.rms_norm is on a CPU."""
        return torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._least)


@dataclass(frozen=True)
class HeadNorms:
    """The norms of queries and keys, [M, heads, d] float32, in place.

    together   of each query and key head, weight [H + kv, d]; or
    widths     of all query heads as one vector, and of all key heads.
    """

    together: Norm | None
    widths: tuple[Norm, Norm] | None

    def __call__(self, qk_MHd: Tensor) -> None:
        if self.together is not None:
            self.together.in_place(qk_MHd)
            return
        assert self.widths is not None
        heads = [len(norm.weight) // qk_MHd.shape[-1] for norm in self.widths]
        for part, norm in zip(qk_MHd.split(heads, dim=1), self.widths, strict=True):
            part.copy_(norm(part.flatten(1)).view_as(part))


# Private operators of torch: where a version lacks them, the ordinary product does the same work.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear:
    """x @ weight.T + bias in the dtype of the weight; and + x @ A.T @ B.T, where `low_rank` = A [R, in], B [out, R].

    In float32 the product B A is added to the weight, once. In 16 bits it is not: the sum would be rounded to the
    weight's own steps, in which the first updates of an adapter vanish, and the sampler would not be the student that
    is trained.

    On a CPU the product is oneDNN's, torch's other matrix library: in float32 it is about twice as fast as the default
    one on AMD processors, and no slower elsewhere. A weight that is used for `steps` tokens before it changes is packed
    for it where that pays, which doubles the speed again for the few rows of a step; it is a copy.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None, *, steps: int | None = None
    ) -> None:
        if low_rank is not None and weight.dtype == torch.float32:
            weight, low_rank = weight + low_rank[1] @ low_rank[0], None
        self._weight, self._bias = weight, bias
        self._low_rank = None if low_rank is None else tuple(matrix.to(weight.dtype) for matrix in low_rank)
        packable = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and native_bfloat16(weight.device))
        self._onednn = weight.device.type == "cpu" and packable and _ONEDNN
        if self._onednn and (steps is None or steps >= _PAYS_FROM):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _USUAL_ROWS)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._weight.dtype)
        if self._onednn:
            product = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        else:
            product = F.linear(x, self._weight, self._bias)
        if self._low_rank is not None:
            a_RI, b_OR = self._low_rank
            product = product + F.linear(F.linear(x, a_RI), b_OR)
        return product

    def added(self, to: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
        """to + norm(self(x)), in one operation where that is possible."""
        if self._onednn and norm is None and self._low_rank is None and to.dtype == self._weight.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x.to(to.dtype), to, self._weight, self._bias, "add")
        product = self(x)
        return to + (product if norm is None else norm(product))


def native_bfloat16(device: torch.device) -> bool:
    """Whether a product in bfloat16 is one there, not an imitation in float32."""
    if device.type == "cpu":
        return not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") or bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class Layer:
    """One block. Norms that an architecture does not have are None."""

    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    head_norm: HeadNorms | None
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


def gather(model: CausalLM, dtype: torch.dtype, *, steps: int | None) -> LeanWeights:
    """The module's current weights in `dtype`, its adapter included. Query, key and value are fused, and gate and up;
    the rest is referenced where it is in that dtype already.

    steps   tokens that they are used for before they change; None: many.
    """
    body, config = model.module.model, model.config
    attention = body.layers[0].self_attn
    norms = _NORMS[model.architecture.__name__]
    fused = partial(_fused, model, dtype, steps)
    layers = []
    for layer in body.layers:
        attn, mlp = layer.self_attn, layer.mlp
        kind = getattr(attn, "layer_type", None)
        layers.append(
            Layer(
                **{name: _norm(getattr(layer, norms[name])) if name in norms else None for name in _SANDWICH},
                head_norm=_head_norms(attn, config) if hasattr(attn, "q_norm") else None,
                qkv=fused(attn.q_proj, attn.k_proj, attn.v_proj),
                out=fused(attn.o_proj),
                gate_up=fused(mlp.gate_proj, mlp.up_proj),
                down=fused(mlp.down_proj),
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
        logits=_logits(model.head, dtype, steps),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        dtype=dtype,
    )


def _logits(head: Head, dtype: torch.dtype, steps: int | None) -> Callable[[Tensor], Tensor]:
    weight_VD = head.weight_VD[: head.vocab_size].detach().to(dtype)
    exact_bias = head.bias_V is None or dtype == torch.float32
    plain = head.scale == 1.0 and head.softcap is None and head.order_V is None and exact_bias
    if plain and weight_VD.device.type == "cpu":
        bias_V = None if head.bias_V is None else head.bias_V[: head.vocab_size].detach()
        product = Linear(weight_VD, bias_V, steps=steps)
        return lambda hidden_ND: product(hidden_ND).float()
    cast = replace(head, weight_VD=weight_VD)
    return lambda hidden_ND: head_logits(hidden_ND.to(dtype), cast)


def _window(attention: Any, config: Any) -> int | None:
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return config.sliding_window if type(attention).__name__ == "MistralAttention" else None


def _head_norms(attention: Any, config: Any) -> HeadNorms:
    query, key = _norm(attention.q_norm), _norm(attention.k_norm)
    if len(query.weight) != attention.head_dim or config.num_attention_heads == 1:
        return HeadNorms(together=None, widths=(query, key))
    weight = [query.weight] * config.num_attention_heads + [key.weight] * config.num_key_value_heads
    assert query.eps == key.eps
    return HeadNorms(together=Norm(torch.stack(weight), query.eps), widths=None)


def _norm(norm: Any) -> Norm:
    weight = norm.weight.detach().float()
    if type(norm).__name__ == "Gemma3RMSNorm":  # stored as the distance from one
        return Norm(1.0 + weight, norm.eps)
    return Norm(weight, norm.variance_epsilon)


def _fused(model: CausalLM, dtype: torch.dtype, steps: int | None, *layers: Any) -> Linear:
    """One projection that gives the outputs of several, side by side."""
    parts = [model.linear_parts(layer) for layer in layers]
    weights = [linear.weight.detach().to(dtype) for linear, _ in parts]
    biases = [linear.bias.detach().to(dtype) for linear, _ in parts if linear.bias is not None]
    low_rank = _side_by_side([(low, len(weight)) for (_, low), weight in zip(parts, weights, strict=True)])
    if len(layers) == 1:
        return Linear(weights[0], biases[0] if biases else None, low_rank, steps=steps)
    return Linear(torch.cat(weights), torch.cat(biases) if biases else None, low_rank, steps=steps)


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
