"""Our decoder for Llama-like models: few large operations, a preallocated key-value cache, grouped heads folded.

A step is about a dozen operations per layer whatever the number of rows. Rows are kept dense: row r of the cache is row
r of the batch, so that attention reads a slice and nothing is gathered. When rows leave, the last ones fill
their places. Layers with a sliding window keep all positions and mask those that have left the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from opd.models.causal import CausalLM
from opd.models.padding import pad
from opd.rollouts.lean_weights import Norm, gather
from opd.rollouts.writing import PREFILL_TOKENS

_ROUND = 32  # the cache is read up to a multiple of this, so that shapes (and CUDA's aligned kernels) repeat

# queries [M, H, d], keys and values [M, kv, d] of one layer to mixed values [M, H, d]; M runs over rows x tokens
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prefilled:
    """Keys and values of P prompts, one tensor [P, kv, T, d] per layer, right-padded; `length_P` on the host."""

    keys: list[Tensor]
    values: list[Tensor]
    length_P: NDArray[np.int64]


class LeanDecoder:
    """Rows of a batch behind a fixed capacity of `slots` rows and `capacity` positions.

    Weights are taken over when it is made: make one per version of the weights.
    """

    joins = pads = True

    def __init__(self, model: CausalLM, *, slots: int, capacity: int) -> None:
        self._weights = w = gather(model)
        self._device = model.device
        self._slots = slots
        self._limit = _round_up(capacity)
        self._length_N = np.empty(0, dtype=np.int64)  # tokens in the cache, row by row
        shape = (slots, w.kv_heads, 0, w.head_dim)
        self._keys = [torch.empty(shape, dtype=w.dtype, device=self._device) for _ in w.layers]
        self._values = [torch.empty(shape, dtype=w.dtype, device=self._device) for _ in w.layers]
        self._cos, self._sin = self._rope_tables(self._limit)

    def prefill_size(self, lengths: Sequence[int]) -> int:
        return max(1, min(len(lengths), PREFILL_TOKENS // lengths[0]))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[NDArray[np.int64]]) -> tuple[Prefilled, Tensor]:
        """Padding stands behind the prompts, where causal attention never looks."""
        ids_PT, _, _ = pad(prompts, device=self._device)
        P, T = ids_PT.shape
        position_M = torch.arange(T, device=self._device).repeat(P)
        keys: list[Tensor] = []
        values: list[Tensor] = []

        def attend(layer: int, q_MHd: Tensor, k_Mkd: Tensor, v_Mkd: Tensor) -> Tensor:
            spec = self._weights.layers[layer]
            q, k, v = (x.unflatten(0, (P, T)).transpose(1, 2) for x in (q_MHd, k_Mkd, v_Mkd))
            keys.append(k.contiguous())
            values.append(v.contiguous())
            window = spec.window if spec.window is not None and spec.window < T else None
            seen_TT = None if window is None else _window_mask(T, window, self._device)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen_TT, is_causal=window is None, scale=spec.scale, enable_gqa=True
            )
            return mixed.transpose(1, 2).flatten(0, 1)

        hidden_MD = self._run(ids_PT.flatten(), position_M, attend)
        length_P = np.array([len(prompt) for prompt in prompts])
        last_P = torch.from_numpy(np.arange(P) * T + length_P - 1).to(self._device)
        return Prefilled(keys, values, length_P), self._weights.logits(hidden_MD[last_P])

    @torch.inference_mode()
    def join(self, prefilled: Prefilled, prompt_n: list[int]) -> None:
        old, new = len(self._length_N), len(self._length_N) + len(prompt_n)
        assert new <= self._slots
        self._length_N = np.concatenate([self._length_N, prefilled.length_P[prompt_n]])
        T = int(prefilled.length_P[prompt_n].max())
        self._reserve(T)
        pick_n = torch.tensor(prompt_n, device=self._device)
        for layer in range(len(self._weights.layers)):
            self._keys[layer][old:new, :, :T] = prefilled.keys[layer][:, :, :T].index_select(0, pick_n)
            self._values[layer][old:new, :, :T] = prefilled.values[layer][:, :, :T].index_select(0, pick_n)

    @torch.inference_mode()
    def step(self, token_N: Tensor) -> Tensor:
        w, N = self._weights, len(self._length_N)
        read = _round_up(int(self._length_N.max()) + 1)
        self._reserve(read)
        position_N = torch.from_numpy(self._length_N).to(self._device)
        row_N = torch.arange(N, device=self._device)
        masks = {window: self._mask(position_N, read, window) for window in {layer.window for layer in w.layers}}

        def attend(layer: int, q_NHd: Tensor, k_Nkd: Tensor, v_Nkd: Tensor) -> Tensor:
            keys, values = self._keys[layer], self._values[layer]
            keys[row_N, :, position_N] = k_Nkd
            values[row_N, :, position_N] = v_Nkd
            spec = w.layers[layer]
            # query heads that share a key head become query positions: no key is repeated
            q = q_NHd.unflatten(1, (w.kv_heads, -1))
            k, v, mask_N11L = keys[:N, :, :read], values[:N, :, :read], masks[spec.window]
            if self._device.type == "cpu" and w.dtype == torch.float32:  # faster here than the fused kernel
                scores = torch.matmul(q * spec.scale, k.transpose(2, 3)).add_(mask_N11L)
                return torch.matmul(scores.softmax(-1), v).flatten(1, 2)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_N11L, scale=spec.scale).flatten(1, 2)

        hidden_ND = self._run(token_N, position_N, attend)
        self._length_N = self._length_N + 1
        return self._weights.logits(hidden_ND)

    @torch.inference_mode()
    def keep(self, row_n: list[int]) -> None:
        moved = [(to, source) for to, source in enumerate(row_n) if to != source]
        self._length_N = self._length_N[row_n]
        if not moved:
            return
        to_n, source_n = (torch.tensor(x, device=self._device) for x in zip(*moved, strict=True))
        used = int(self._length_N.max())
        for cache in (*self._keys, *self._values):
            cache[to_n, :, :used] = cache[:, :, :used].index_select(0, source_n)

    def _run(self, token_M: Tensor, position_M: Tensor, attend: Attend) -> Tensor:
        """The body of the model over M flattened tokens: hidden states [M, D] behind the final norm."""
        w = self._weights
        x_MD = w.embed(token_M)
        cos = {rope: table[position_M].unsqueeze(1) for rope, table in self._cos.items()}
        sin = {rope: table[position_M].unsqueeze(1) for rope, table in self._sin.items()}
        H, kv = w.heads, w.kv_heads
        for index, layer in enumerate(w.layers):
            normed_MD = layer.before_attention(x_MD) if layer.before_attention else x_MD
            q, k, v = layer.qkv(normed_MD).split([H * w.head_dim, kv * w.head_dim, kv * w.head_dim], dim=-1)
            q = _normed_heads(q, layer.query_norm, w.head_dim)
            k = _normed_heads(k, layer.key_norm, w.head_dim)
            qk = _rotate(torch.cat([q, k], dim=1), cos[layer.rope], sin[layer.rope]).to(w.dtype)
            mixed = attend(index, qk[:, :H], qk[:, H:], v.unflatten(-1, (kv, w.head_dim)))
            update_MD = layer.out(mixed.flatten(1))
            x_MD = x_MD + (layer.after_attention(update_MD) if layer.after_attention else update_MD)
            normed_MD = layer.before_mlp(x_MD) if layer.before_mlp else x_MD
            gate, up = layer.gate_up(normed_MD).chunk(2, dim=-1)
            update_MD = layer.down(layer.activation(gate) * up)
            x_MD = x_MD + (layer.after_mlp(update_MD) if layer.after_mlp else update_MD)
        return w.final_norm(x_MD)

    def _rope_tables(self, length: int) -> tuple[dict[str | None, Tensor], dict[str | None, Tensor]]:
        """Cosine and signed sine [length, d] per rope, by the module's own rotary embedding, scalings included."""
        like = torch.empty(0, device=self._device)  # float32
        position_1L = torch.arange(length, device=self._device)[None]
        cos, sin = {}, {}
        for rope in {layer.rope for layer in self._weights.layers}:
            cos_1Ld, sin_1Ld = self._weights.rotary(like, position_1L, *([rope] if rope else []))
            first, second = sin_1Ld[0].chunk(2, dim=-1)
            cos[rope], sin[rope] = cos_1Ld[0], torch.cat([-first, second], dim=-1)
        return cos, sin

    def _reserve(self, length: int) -> None:
        """Room for `length` positions per row; grows by half, so that short answers never pay for long ones."""
        have = self._keys[0].shape[2]
        if length <= have:
            return
        more = min(self._limit, _round_up(max(length, have + have // 2))) - have
        for caches in (self._keys, self._values):
            for layer, cache in enumerate(caches):
                caches[layer] = F.pad(cache, (0, 0, 0, more))  # zeros: what is masked must still be finite

    def _mask(self, position_N: Tensor, length: int, window: int | None) -> Tensor:
        """[N, 1, 1, length] added to scores: 0 where a row may look, -inf behind its end and before its window."""
        column_L = torch.arange(length, device=self._device)
        hidden_NL = column_L > position_N[:, None]
        if window is not None:
            hidden_NL |= column_L <= position_N[:, None] - window
        mask_NL = torch.zeros(hidden_NL.shape, dtype=self._weights.dtype, device=self._device)
        return mask_NL.masked_fill_(hidden_NL, float("-inf"))[:, None, None]


def _normed_heads(x_MX: Tensor, norm: Norm | None, head_dim: int) -> Tensor:
    """[M, heads, d], normed per head or over the whole width, as wide as the norm's own weight."""
    if norm is not None and len(norm.weight) == x_MX.shape[-1]:
        x_MX = norm(x_MX)
        norm = None
    x_MHd = x_MX.unflatten(-1, (-1, head_dim))
    return norm(x_MHd) if norm is not None else x_MHd


def _rotate(x_MHd: Tensor, cos_M1d: Tensor, signed_sin_M1d: Tensor) -> Tensor:
    return torch.addcmul(x_MHd * cos_M1d, x_MHd.roll(x_MHd.shape[-1] // 2, dims=-1), signed_sin_M1d)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: True where query (row) sees key (column)."""
    position_T = torch.arange(length, device=device)
    distance_TT = position_T[:, None] - position_T
    return (distance_TT >= 0) & (distance_TT < window)


def _round_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
