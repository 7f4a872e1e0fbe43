"""The hidden states that predict answers, of any causal language model; a prompt with several answers is read once.

    plain    [prompt answer padding]                      one rectangle, a prompt for every answer
    shared   [padding prompt] then [answer padding]       the prompts' keys and values stay, and each answer reads them

In the shared form padding stands before prompts and behind answers. Nothing lies between a prompt and its answer, so
that a distance in columns is a distance in positions, which sliding windows count on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from opd.models.causal import CausalLM
from opd.models.families import Padded, families
from opd.models.padding import pad
from opd.objectives.head import head_logits
from opd.objectives.transfer import free_to_look, onto

Ids = NDArray[np.int64]
Side = Literal["left", "right"]
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def answer_states(
    model: CausalLM, prompts_N: Sequence[Ids], answers_N: Sequence[Ids], *, share: bool, side: Side = "right"
) -> Tensor:
    """[T, D] in the model's compute type: the state that predicts each answer token, one answer after the other.

    prompts_N, answers_N  int64 ids of each sequence; at least one sequence, no prompt empty. Answers may be.
    share                 read a prompt that several answers have once, where that saves tokens and the model can.
                          No result depends on it beyond rounding. A model that cannot reads in pieces, none of which
                          is larger than what sharing would have held.
    side                  of the padding of a plain rectangle; no result depends on it.
    """
    family_N, firsts = families(prompts_N)
    padded = Padded.of([len(p) for p in prompts_N], [len(a) for a in answers_N], len(firsts))
    if not (share and padded.pays):
        return _plain(model, prompts_N, answers_N, side)
    if can_share(model):
        return _shared(model, prompts_N, answers_N, family_N, firsts)
    rows = max(1, padded.held // padded.longest)
    pieces = [slice(n, n + rows) for n in range(0, len(answers_N), rows)]
    return torch.cat([_plain(model, prompts_N[piece], answers_N[piece], side) for piece in pieces])


def can_share(model: CausalLM) -> bool:
    """Whether answers may stand on top of a prompt that was read once: tried out when it is first asked of a model.

    Layers with another memory than keys and values (linear attention) cannot, and layers that are recomputed in the
    backward pass keep no cache.
    """
    if model.recomputes:
        return False
    if model.shares_prompts is None:
        model.shares_prompts = _same_states(model)
    return model.shares_prompts


@torch.no_grad()
def _same_states(model: CausalLM) -> bool:
    """Both ways on a few ragged sequences: two prompts, one of which has three answers."""
    if getattr(model.config, "_attn_implementation", None) == "flex_attention":
        return False  # its masks are compiled for every shape that comes
    if "chunked_attention" in (getattr(model.config, "layer_types", None) or ()):
        return False  # its chunks are longer than what is tried here
    lengths = ((5, 4), (3, 3), (5, 1), (5, 2))  # of prompt and answer
    ids = np.arange(1, 10) % model.vocab_size
    prompts_N = [ids[:prompt] for prompt, _ in lengths]
    answers_N = [ids[::-1][n : n + answer] for n, (_, answer) in enumerate(lengths)]
    try:
        if any(type(layer) not in _PLAIN_LAYERS for layer in DynamicCache(config=model.module.config).layers):
            return False
        plain_TD = _plain(model, prompts_N, answers_N, "right")
        shared_TD = _shared(model, prompts_N, answers_N, *families(prompts_N))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what a body does with a cache that is not of its kind is its own affair
        return False
    plain_TV, shared_TV = (head_logits(states_TD, model.head) for states_TD in (plain_TD, shared_TD))
    tolerance = 5e-2 if model.compute_dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((plain_TV - shared_TV).abs().max() <= tolerance * plain_TV.abs().max().clamp(min=1.0))


def _plain(model: CausalLM, prompts_N: Sequence[Ids], answers_N: Sequence[Ids], side: Side) -> Tensor:
    """The state at a token's predecessor predicts it, hence its column - 1."""
    sequences = [np.concatenate(pair) for pair in zip(prompts_N, answers_N, strict=True)]
    ids_NS, attention_NS, positions_NS = pad(sequences, device=model.device, side=side)
    width = ids_NS.shape[1]
    given = (attention_NS, positions_NS)
    if side == "right" and not free_to_look(model.device):
        given = (None, None)  # padding stands behind, where nobody looks: without a mask devices have faster kernels
    columns = []
    for prompt, answer in zip(prompts_N, answers_N, strict=True):
        start = width - len(prompt) - len(answer) if side == "left" else 0
        first = start + len(prompt) - 1
        columns.append(np.arange(first, first + len(answer)))
    row_T = _tensor(np.repeat(np.arange(len(answers_N)), [len(a) for a in answers_N]), model)
    return model.hidden(ids_NS, *given)[row_T, _tensor(np.concatenate(columns), model)]


def _shared(
    model: CausalLM, prompts_N: Sequence[Ids], answers_N: Sequence[Ids], family_N: Ids, firsts: Sequence[int]
) -> Tensor:
    """A prompt's last state predicts the first token of its answers, an answer's tokens but the last predict the rest.

    M answers have more than one token.
    """
    ids_PS, attention_PS, positions_PS = pad([prompts_N[n] for n in firsts], device=model.device, side="left")
    read = DynamicCache()
    states_RD = model.hidden(ids_PS, attention_PS, positions_PS, read)[:, -1]
    longer = [n for n, answer in enumerate(answers_N) if len(answer) > 1]
    width = 0
    if longer:
        ids_MS, attention_MS, positions_MS = pad([answers_N[n][:-1] for n in longer], device=model.device)
        family_M, width = _tensor(family_N[longer], model), ids_MS.shape[1]
        begin_M = _tensor(np.array([len(prompts_N[n]) for n in longer]), model)
        cache = Cache(layers=[_ReadOnce(layer, family_M) for layer in read.layers])
        both_MS = torch.cat([attention_PS[family_M], attention_MS], 1)
        states_MSD = model.hidden(ids_MS, both_MS, begin_M[:, None] + positions_MS, cache)
        states_RD = torch.cat([states_RD, states_MSD.flatten(0, 1)])
    begin_N = np.zeros(len(answers_N), dtype=np.int64)
    begin_N[longer] = len(firsts) + width * np.arange(len(longer))
    rows = [
        np.concatenate([family_N[n : n + 1], np.arange(begin_N[n], begin_N[n] + len(answer) - 1)])
        for n, answer in enumerate(answers_N)
        if len(answer)
    ]
    return states_RD[_tensor(np.concatenate([np.empty(0, np.int64), *rows]), model)]


class _ReadOnce(DynamicLayer):
    """Keys and values of prompts, seen from their answers. They are repeated when the layer is reached and not kept
    after it, so that without a gradient one layer's copies exist at a time.

    read      the layer's cache after the prompts, [P, heads, S, width].
    family_M  int64 [M]: the prompt of each answer.
    """

    def __init__(self, read: Any, family_M: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(read.keys, read.values)
        self.keys, self.values = read.keys, read.values
        self._family_M = family_M

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self._behind(self.keys, key_states), self._behind(self.values, value_states)

    def _behind(self, prompt_PHSW: Tensor, answer_MHSW: Tensor) -> Tensor:
        return torch.cat([prompt_PHSW.index_select(0, self._family_M), answer_MHSW], dim=-2)


def _tensor(indices: NDArray[np.int64], model: CausalLM) -> Tensor:
    return onto(indices, model.device)
