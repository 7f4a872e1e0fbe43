"""Any other architecture: the model's own forward with its own transformers cache.

Prompts of equal length are read together and without padding, so that no padding token ever enters a recurrent state.
Rows of different lengths then decode in one batch: their states are stacked, and where a layer keeps keys and values
the shorter rows get columns on the left that a mask hides; every row is told its own positions.

Cost: one prefill per distinct prompt length, and transformers' caches copy their keys and values with every token
(about 1.5 to 2 times the time per token of the lean decoder on small models). A cache layer of another kind than those
in `_JOINABLE`, or a model that disagrees with itself when lengths are mixed (tried once by the engine), gets batches of
one prompt length that begin only when the batch before has ended.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicCache

from opd.errors import ModelError
from opd.models.causal import CausalLM
from opd.rollouts.writing import PREFILL_TOKENS

_JOINABLE = {
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
    cache_utils.DummyLayer,
}


@dataclass(frozen=True)
class Prefilled:
    """The cache of P prompts of `length` tokens each."""

    cache: Cache
    length: int


class GenericDecoder:
    """Rows of a batch as one transformers cache.

    `joins=False` keeps rows of different lengths apart. ModelError when the model takes no transformers cache.
    """

    pads = False

    def __init__(self, model: CausalLM, *, joins: bool = True) -> None:
        self._model = model
        takes = inspect.signature(model.module.forward).parameters
        if "past_key_values" not in takes:
            raise ModelError(
                f"{model.architecture.__name__} takes no `past_key_values`: opd cannot "
                "write answers with it token by token"
            )
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes
        chunked = "chunked_attention" in (getattr(model.config, "layer_types", None) or ())
        layers = {type(layer) for layer in self._new_cache().layers}
        self.joins = joins and self._takes_positions and not chunked and layers <= _JOINABLE
        self._cache: Cache | None = None
        self._length_N = np.empty(0, dtype=np.int64)

    def prefill_size(self, lengths: Sequence[int]) -> int:
        alike = next((i for i, length in enumerate(lengths) if length != lengths[0]), len(lengths))
        return max(1, min(alike, PREFILL_TOKENS // lengths[0]))

    @torch.no_grad()
    def prefill(self, prompts: Sequence[NDArray[np.int64]]) -> tuple[Prefilled, Tensor]:
        cache = self._new_cache()
        ids_PT = torch.from_numpy(np.stack(prompts)).to(self._model.device)
        position_PT = torch.arange(ids_PT.shape[1], device=ids_PT.device).expand_as(ids_PT)
        logits_PV = self._forward(ids_PT, cache, position_PT, torch.ones_like(ids_PT))
        return Prefilled(cache, ids_PT.shape[1]), logits_PV

    @torch.no_grad()
    def join(self, prefilled: Prefilled, prompt_n: list[int]) -> None:
        added = _selected(prefilled.cache, self._rows(prompt_n))
        length_n = np.full(len(prompt_n), prefilled.length)
        if self._cache is None:
            self._cache, self._length_N = added, length_n
            return
        assert self.joins
        columns = max(int(self._length_N.max()), prefilled.length)
        for ours, theirs in zip(self._cache.layers, added.layers, strict=True):
            _append(_fitted(ours, columns), _fitted(theirs, columns))
        self._length_N = np.concatenate([self._length_N, length_n])

    @torch.no_grad()
    def step(self, token_N: Tensor) -> Tensor:
        assert self._cache is not None
        position_N1 = torch.from_numpy(self._length_N).to(token_N.device)[:, None]
        columns = int(self._length_N.max()) + 1
        mask_NS = (torch.arange(columns, device=token_N.device) >= columns - 1 - position_N1).long()
        logits_NV = self._forward(token_N[:, None], self._cache, position_N1, mask_NS)
        self._length_N = self._length_N + 1
        return logits_NV

    @torch.no_grad()
    def keep(self, row_n: list[int]) -> None:
        assert self._cache is not None
        self._length_N = self._length_N[row_n]
        if not row_n:
            self._cache = None
            return
        self._cache.reorder_cache(self._rows(row_n))
        if self.joins:
            for layer in self._cache.layers:
                _fitted(layer, int(self._length_N.max()))

    def _forward(self, ids_NT: Tensor, cache: Cache, position_NT: Tensor, mask_NS: Tensor) -> Tensor:
        """float32 [N, V] at the last token; the cache is extended in place."""
        given = {"position_ids": position_NT} if self._takes_positions else {}
        with self._model.autocast():
            logits_NTV = self._model.module(
                input_ids=ids_NT,
                attention_mask=mask_NS,
                past_key_values=cache,
                use_cache=True,
                **given,
                **self._options,
            ).logits
        return logits_NTV[:, -1, : self._model.vocab_size].float()

    def _rows(self, row_n: list[int]) -> torch.LongTensor:
        return cast(torch.LongTensor, torch.tensor(row_n, device=self._model.device))

    def _new_cache(self) -> Cache:
        return DynamicCache(config=self._model.module.config)


def _selected(cache: Cache, row_n: torch.LongTensor) -> Cache:
    """A cache of the given rows, which may repeat; the one it is taken from stays as it was.

    Beam search's reordering is the one selection that layers of every kind have, recurrent ones included.
    """
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        vars(layer).update({k: dict(v) for k, v in vars(layer).items() if isinstance(v, dict)})
    chosen.reorder_cache(row_n)
    return chosen


def _fitted(layer: Any, columns: int) -> Any:
    """Gives keys and values `columns` columns (a window's worth in a sliding layer), on the left; in place."""
    if getattr(layer, "keys", None) is None or not layer.is_initialized:
        return layer
    kept = columns
    if getattr(layer, "is_sliding", False):
        kept = min(columns, layer.sliding_window - 1)
        layer.cumulative_length = columns
    missing = kept - layer.keys.shape[-2]  # negative: columns that no row uses any more are cut off
    layer.keys = F.pad(layer.keys, (0, 0, missing, 0))
    layer.values = F.pad(layer.values, (0, 0, missing, 0))
    return layer


def _append(ours: Any, theirs: Any) -> None:
    """Stacks the rows of `theirs` under those of `ours`."""
    if getattr(ours, "keys", None) is not None:
        ours.keys = torch.cat([ours.keys, theirs.keys])
        ours.values = torch.cat([ours.values, theirs.values])
    for name in ("conv_states", "recurrent_states"):
        states = getattr(ours, name, {})
        for index, state in states.items():
            if state is not None:
                states[index] = torch.cat([state, getattr(theirs, name)[index]])
