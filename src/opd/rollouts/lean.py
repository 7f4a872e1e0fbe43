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
from opd.rollouts.lean_weights import gather
from opd.rollouts.writing import PREFILL_TOKENS

_ZERO = torch.zeros(1)  # what `baddbmm` adds, times 0
_ROUND = 32  # the cache grows by multiples of this, and CUDA reads it so: shapes, and its aligned kernels, repeat

# queries [M, H, d], keys and values [M, 2, kv, d] of one layer to mixed values [M, H d]; M runs over rows x tokens
Attend = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Prefilled:
    """Keys and values of P prompts, one tensor [2, P, kv, T, d] per layer, right-padded; `length_P` on the host."""

    caches: list[Tensor]
    length_P: NDArray[np.int64]


class LeanDecoder:
    """Rows of a batch behind a fixed capacity of `slots` rows and `capacity` positions.

    Weights are taken over when it is made: make one per version of the weights.

    dtype   what products run in; None: the model's compute type.
    steps   tokens that a row gets at most, which is what a copy of the weights has to pay for itself in; None: many.
    """

    joins = pads = True

    def __init__(
        self,
        model: CausalLM,
        *,
        slots: int,
        capacity: int,
        dtype: torch.dtype | None = None,
        steps: int | None = None,
    ) -> None:
        self._weights = w = gather(model, model.compute_dtype if dtype is None else dtype, steps=steps)
        self._device = model.device
        self._slots = slots
        self._limit = _round_up(capacity)
        self._length_N = np.empty(0, dtype=np.int64)  # tokens in the cache, row by row
        self._position_N = torch.empty(0, dtype=torch.int64, device=self._device)  # the same, where the model is
        self._row_N = torch.arange(slots, device=self._device)
        # On a CPU the few rows of a step are multiplied with the cache much faster in float32.
        self._attends_in = torch.float32 if self._device.type == "cpu" else w.dtype
        shape = (2, slots, w.kv_heads, 0, w.head_dim)
        self._caches = [torch.empty(shape, dtype=self._attends_in, device=self._device) for _ in w.layers]
        self._rope = self._rope_tables(self._limit)
        self._column_L = torch.arange(self._limit, device=self._device)

    def prefill_size(self, lengths: Sequence[int]) -> int:
        return max(1, min(len(lengths), PREFILL_TOKENS // lengths[0]))

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[NDArray[np.int64]]) -> tuple[Prefilled, Tensor]:
        """Padding stands behind the prompts, where causal attention never looks."""
        ids_PT, _, _ = pad(prompts, device=self._device)
        P, T = ids_PT.shape
        position_M = torch.arange(T, device=self._device).repeat(P)
        caches: list[Tensor] = []

        def attend(layer: int, q_MHd: Tensor, kv_M2kd: Tensor) -> Tensor:
            spec = self._weights.layers[layer]
            caches.append(kv_M2kd.unflatten(0, (P, T)).permute(2, 0, 3, 1, 4).contiguous())
            q, (k, v) = q_MHd.unflatten(0, (P, T)).transpose(1, 2), caches[-1]
            window = spec.window if spec.window is not None and spec.window < T else None
            seen_TT = None if window is None else _window_mask(T, window, self._device)
            mixed = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen_TT, is_causal=window is None, scale=spec.scale, enable_gqa=True
            )
            return mixed.transpose(1, 2).reshape(P * T, -1)

        hidden_MD = self._run(ids_PT.flatten(), position_M, attend)
        length_P = np.array([len(prompt) for prompt in prompts])
        last_P = torch.from_numpy(np.arange(P) * T + length_P - 1).to(self._device)
        return Prefilled(caches, length_P), self._weights.logits(hidden_MD[last_P])

    @torch.inference_mode()
    def join(self, prefilled: Prefilled, prompt_n: list[int]) -> None:
        old, new = len(self._length_N), len(self._length_N) + len(prompt_n)
        assert new <= self._slots
        self._length_N = np.concatenate([self._length_N, prefilled.length_P[prompt_n]])
        T = int(prefilled.length_P[prompt_n].max())
        self._reserve(T)
        pick_n = torch.tensor(prompt_n, device=self._device)
        first, alike = prompt_n[0], len(set(prompt_n)) == 1
        for cache, read in zip(self._caches, prefilled.caches, strict=True):
            # samples of one prompt are spread without a copy in between
            rows = read[:, first : first + 1, :, :T] if alike else read[:, :, :, :T].index_select(1, pick_n)
            cache[:, old:new, :, :T] = rows
        self._position_N = torch.from_numpy(self._length_N).to(self._device)

    @torch.inference_mode()
    def step(self, token_N: Tensor) -> Tensor:
        w, N, kv = self._weights, len(self._length_N), self._weights.kv_heads
        longest = int(self._length_N.max()) + 1
        on_cpu = self._device.type == "cpu"
        read = longest if on_cpu else min(_round_up(longest), self._limit)
        self._reserve(read)
        row_N, position_N = self._row_N[:N], self._position_N
        masks = {window: self._mask(read, window) for window in {layer.window for layer in w.layers}}
        group = w.heads // kv

        def attend(layer: int, q_NHd: Tensor, kv_N2kd: Tensor) -> Tensor:
            cache, spec = self._caches[layer], w.layers[layer]
            cache[:, row_N, :, position_N] = kv_N2kd
            k_NkLd, v_NkLd = cache[:, :N, :, :read]
            mask_N1L = masks[spec.window]
            # query heads that share a key head become query positions: no key is repeated
            if not on_cpu:
                mask_N11L = None if mask_N1L is None else mask_N1L[:, None]
                q_Nkgd = q_NHd.unflatten(1, (kv, group))
                mixed = F.scaled_dot_product_attention(q_Nkgd, k_NkLd, v_NkLd, attn_mask=mask_N11L, scale=spec.scale)
                return mixed.flatten(1)
            # products over (row, key head) are faster here than the fused kernel
            q_Bgd, k_BLd, v_BLd = q_NHd.reshape(N * kv, group, -1), k_NkLd.flatten(0, 1), v_NkLd.flatten(0, 1)
            scores_BgL = torch.baddbmm(_ZERO, q_Bgd, k_BLd.transpose(1, 2), beta=0, alpha=spec.scale)
            if mask_N1L is not None:
                scores_BgL.view(N, w.heads, read).add_(mask_N1L)
            return torch.bmm(scores_BgL.softmax(-1), v_BLd).view(N, -1)

        hidden_ND = self._run(token_N, position_N, attend)
        self._length_N = self._length_N + 1
        self._position_N = self._position_N + 1
        return self._weights.logits(hidden_ND)

    @torch.inference_mode()
    def keep(self, row_n: list[int]) -> None:
        moved = [(to, source) for to, source in enumerate(row_n) if to != source]
        self._length_N = self._length_N[row_n]
        self._position_N = torch.from_numpy(self._length_N).to(self._device)
        if not moved:
            return
        to_n, source_n = (torch.tensor(x, device=self._device) for x in zip(*moved, strict=True))
        used = int(self._length_N.max())
        for cache in self._caches:
            cache[:, to_n, :, :used] = cache[:, :, :, :used].index_select(1, source_n)

    def _run(self, token_M: Tensor, position_M: Tensor, attend: Attend) -> Tensor:
        """The body of the model over M flattened tokens: hidden states [M, D] behind the final norm."""
        w = self._weights
        x_MD = w.embed(token_M)
        turn = {rope: table[position_M].split(1, dim=1) for rope, table in self._rope.items()}
        H, kv = w.heads, w.kv_heads
        for index, layer in enumerate(w.layers):
            normed_MD = layer.before_attention(x_MD) if layer.before_attention else x_MD
            qkv = layer.qkv(normed_MD).float().view(-1, H + 2 * kv, w.head_dim)
            qk = qkv[:, : H + kv]
            if layer.head_norm is not None:
                layer.head_norm(qk)
            cos_M1d, signed_sin_M1d = turn[layer.rope]
            rolled = qk.roll(w.head_dim // 2, dims=-1)
            qk.mul_(cos_M1d).addcmul_(rolled, signed_sin_M1d)
            qkv = qkv.to(self._attends_in)
            mixed = attend(index, qkv[:, :H], qkv[:, H:].unflatten(1, (2, kv)))
            x_MD = layer.out.added(x_MD, mixed, layer.after_attention)
            normed_MD = layer.before_mlp(x_MD) if layer.before_mlp else x_MD
            gate, up = layer.gate_up(normed_MD).chunk(2, dim=-1)
            x_MD = layer.down.added(x_MD, layer.activation(gate).mul_(up), layer.after_mlp)
        return w.final_norm(x_MD)

    def _rope_tables(self, length: int) -> dict[str | None, Tensor]:
        """Cosine and signed sine [length, 2, d] per rope, by the module's own rotary embedding, scalings included."""
        like = torch.empty(0, device=self._device)  # float32
        position_1L = torch.arange(length, device=self._device)[None]
        tables = {}
        for rope in {layer.rope for layer in self._weights.layers}:
            cos_1Ld, sin_1Ld = self._weights.rotary(like, position_1L, *([rope] if rope else []))
            first, second = sin_1Ld[0].chunk(2, dim=-1)
            tables[rope] = torch.stack([cos_1Ld[0], torch.cat([-first, second], dim=-1)], dim=1)
        return tables

    def _reserve(self, length: int) -> None:
        """Room for `length` positions per row; grows by half, so that short answers never pay for long ones."""
        have = self._caches[0].shape[3]
        if length <= have:
            return
        more = min(self._limit, _round_up(max(length, have + have // 2))) - have
        for layer, cache in enumerate(self._caches):
            self._caches[layer] = F.pad(cache, (0, 0, 0, more))  # zeros: what is masked must still be finite

    def _mask(self, length: int, window: int | None) -> Tensor | None:
        """[N, 1, length] added to scores: 0 where a row may look, -inf behind its end and before its window; None where
        every row looks at everything."""
        if int(self._length_N.min()) + 1 == length and (window is None or length <= window):
            return None
        column_L, position_N1 = self._column_L[:length], self._position_N[:, None]
        hidden_NL = column_L > position_N1
        if window is not None:
            hidden_NL |= column_L <= position_N1 - window
        mask_NL = torch.zeros(hidden_NL.shape, dtype=self._attends_in, device=self._device)
        return mask_NL.masked_fill_(hidden_NL, float("-inf"))[:, None]


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: True where query (row) sees key (column)."""
    position_T = torch.arange(length, device=device)
    distance_TT = position_T[:, None] - position_T
    return (distance_TT >= 0) & (distance_TT < window)


def _round_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
