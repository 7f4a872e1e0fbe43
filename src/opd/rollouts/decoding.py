"""Which decoder runs a model: ours where it knows the architecture and agrees with the model's own logits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from opd.errors import BadInput, ModelError
from opd.models.causal import CausalLM
from opd.rollouts.generic import GenericDecoder
from opd.rollouts.lean import LeanDecoder
from opd.rollouts.lean_weights import native_bfloat16, unsupported
from opd.rollouts.writing import Decoder
from opd.types import Prompt

DecoderPath = Literal["auto", "lean", "generic"]

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit
_PROBE = 24  # tokens of the longer probe prompt


class Decoding:
    """How one model is run token by token; found once, here, by trying.

    path   lean: our decoder; generic: the model's own forward; auto: lean where it knows the architecture and agrees
           with the model's own logits.
    dtype  what the lean decoder computes in; None: the model's compute type. The model's own forward knows no other.

    ModelError when path is lean, or dtype is not the model's, and the lean decoder cannot run this model.
    """

    def __init__(self, model: CausalLM, *, path: DecoderPath, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.dtype = model.compute_dtype if dtype is None else dtype
        self._lean, self._joins = False, True
        if self.dtype == torch.bfloat16 != model.compute_dtype and not native_bfloat16(model.device):
            warnings.warn(
                "engine.dtype is bfloat16, but this processor has no bfloat16 products: writing will be slower than in "
                "float32. Set engine.dtype to auto",
                RuntimeWarning,
                stacklevel=3,
            )
        with Evaluating(model):
            if path != "generic":
                self._lean = self._lean_works(required=path == "lean")
            elif self.dtype != model.compute_dtype:
                raise self._own_forward_only("engine.path is generic")
            if not self._lean:
                self._joins = self._rows_can_join()

    @property
    def path(self) -> Literal["lean", "generic"]:
        """Which decoder it is."""
        return "lean" if self._lean else "generic"

    def decoder(self, *, slots: int, capacity: int, steps: int) -> Decoder:
        """A decoder over the weights as they are now, for `slots` rows of `capacity` positions, of which at most
        `steps` are written."""
        if self._lean:
            return LeanDecoder(self.model, slots=slots, capacity=capacity, dtype=self.dtype, steps=steps)
        return GenericDecoder(self.model, joins=self._joins)

    def _lean_works(self, *, required: bool) -> bool:
        name = self.model.architecture.__name__
        reason = unsupported(self.model)
        if reason is None:
            worst = disagreement(LeanDecoder(self.model, slots=3, capacity=_PROBE + 2, dtype=self.dtype), self.model)
            if worst <= max(_TOLERANCE[self.dtype], _TOLERANCE[self.model.compute_dtype]):
                return True
            reason = f"its logits differ from the model's own by {worst:.2g} of the largest logit"
            if not required and self.dtype == self.model.compute_dtype:
                warnings.warn(f"{name} runs on the slower generic path: {reason}", RuntimeWarning, stacklevel=4)
        if required:
            raise ModelError(f"engine.path is lean, but {name} cannot run on it: {reason}. Use auto or generic.")
        if self.dtype != self.model.compute_dtype:
            raise self._own_forward_only(f"our decoder cannot run it: {reason}")
        return False

    def _own_forward_only(self, reason: str) -> ModelError:
        own, asked = (str(dtype).removeprefix("torch.") for dtype in (self.model.compute_dtype, self.dtype))
        return ModelError(
            f"engine.dtype is {asked}, but {self.model.architecture.__name__} writes with its own forward, which "
            f"computes in {own}: {reason}. Set engine.dtype to auto."
        )

    def _rows_can_join(self) -> bool:
        decoder = GenericDecoder(self.model)
        if not decoder.joins:
            return False
        worst = disagreement(decoder, self.model)
        if worst > _TOLERANCE[self.model.compute_dtype]:
            warnings.warn(
                f"{self.model.architecture.__name__} writes answers to prompts of one length at a time: with mixed "
                f"lengths its logits differ from those of single prompts by {worst:.2g} of the largest logit",
                RuntimeWarning,
                stacklevel=4,
            )
            return False
        return True


def check_prompts(prompts_P: Sequence[Prompt], max_tokens: int, model: CausalLM, *, who: str) -> None:
    """BadInput when a prompt is empty, occurs twice, or leaves no room for `max_tokens` in the context of `model`.

    who   the model's name in messages, e.g. "student".
    """
    seen: set[str] = set()
    room = model.max_positions
    for prompt in prompts_P:
        if not len(prompt.ids):
            raise BadInput(f"prompt {prompt.id} has no tokens: the {who} needs at least one to go on from")
        if prompt.id in seen:
            raise BadInput(f"prompt {prompt.id} occurs twice in one batch: its answers would have the same ids")
        seen.add(prompt.id)
        if room is not None and len(prompt.ids) + max_tokens > room:
            raise BadInput(
                f"prompt {prompt.id} has {len(prompt.ids)} tokens; with max_tokens {max_tokens} its answer "
                f"may end at position {len(prompt.ids) + max_tokens}, but the {who}'s context is {room}. "
                "Lower sampling.max_tokens or prompts.max_prompt_tokens."
            )


@torch.no_grad()
def disagreement(decoder: Decoder, model: CausalLM) -> float:
    """Largest difference between a decoder's logits and the model's own, as a share of the largest logit.

    Two prompts of different lengths are read apart, continued together, one is dropped and the other goes on: every
    way in which rows touch each other. inf when logits are not finite on one side only.
    """
    room = min(_PROBE, (model.max_positions or _PROBE) - 2)
    token_T = np.random.default_rng(0).integers(0, model.vocab_size, _PROBE + 2)
    lengths = room, max(1, room // 2)
    worst = 0.0

    def compare(logits_NV: torch.Tensor, used: Sequence[int]) -> None:
        nonlocal worst
        for ours_V, length in zip(logits_NV, used, strict=True):
            ids_1T = torch.from_numpy(token_T[:length])[None].to(model.device)
            with model.autocast():
                logits_1TV = model.module(
                    input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False
                ).logits
            theirs_V = logits_1TV[0, -1, : model.vocab_size].float()
            gap = ((ours_V - theirs_V).abs().max() / theirs_V.abs().max().clamp(min=1e-6)).item()
            worst = max(worst, gap if np.isfinite(gap) else float("inf"))

    for length in lengths:
        prefilled, logits_PV = decoder.prefill([token_T[:length]])
        compare(logits_PV, [length])
        decoder.join(prefilled, [0])
    for step in range(2):
        rows = lengths if step == 0 else lengths[1:]
        next_N = torch.from_numpy(token_T[[length + step for length in rows]]).to(model.device)
        compare(decoder.step(next_N), [length + step + 1 for length in rows])
        if step == 0:
            decoder.keep([1])
    return worst


class Evaluating:
    """The module in eval mode for a while: dropout off, and caches on even where training recomputes activations."""

    def __init__(self, model: CausalLM) -> None:
        self._module = model.module

    def __enter__(self) -> None:
        self._training = self._module.training
        self._module.eval()

    def __exit__(self, *_: object) -> None:
        self._module.train(self._training)
