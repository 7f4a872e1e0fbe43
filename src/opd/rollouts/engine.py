"""The embedded engine: the student writes in our own process, with the parameters the learner is changing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from opd.errors import BadInput, ModelError
from opd.models.causal import CausalLM
from opd.protocols import Weights
from opd.rollouts.answers import Answers
from opd.rollouts.generic import GenericDecoder
from opd.rollouts.lean import LeanDecoder
from opd.rollouts.lean_weights import unsupported
from opd.rollouts.writing import Decoder, write
from opd.types import Prompt, Rollout, SamplingParams

_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # of the largest logit


class EmbeddedEngine:
    """A `Sampler` over a live `CausalLM`.

    slots      answers written at the same time.
    path       lean: our decoder; generic: the model's own forward; auto: lean where it knows the architecture and
               agrees with the model's own logits, which is tried once, here.
    progress   called with the number of answers of the running `generate` call that are finished.

    ModelError when path is lean and the lean decoder cannot run this model.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        seed: int,
        slots: int,
        path: Literal["auto", "lean", "generic"],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.progress = progress
        self._model = model
        self._seed = seed
        self._slots = slots
        self._version = 0
        self._lean, self._joins = False, True
        with _Evaluating(model):
            if path != "generic":
                self._lean = self._lean_works(required=path == "lean")
            if not self._lean:
                self._joins = self._rows_can_join()

    @property
    def path(self) -> Literal["lean", "generic"]:
        """Which decoder writes."""
        return "lean" if self._lean else "generic"

    def load(self, weights: Weights) -> None:
        """Takes the version; tensors that are not the module's own are copied into it."""
        own = self._model.module.state_dict(keep_vars=True)
        tensors = weights.tensors()
        assert tensors.keys() <= own.keys(), f"tensors of another model: {sorted(tensors.keys() - own.keys())[:3]}"
        arrived = {own[name].data_ptr() for name in tensors}
        missing = [name for name, p in self._model.module.named_parameters() if p.data_ptr() not in arrived]
        assert not missing, f"weights version {weights.version} lacks {missing[:3]}: the sampler would mix two versions"
        with torch.no_grad():
            for name, tensor in tensors.items():
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self._version = weights.version

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """See `protocols.Sampler`. Weights are read anew by every call.

        BadInput when a prompt is empty, occurs twice, or leaves no room for max_tokens in the model's context;
        ModelError when logits are not finite.
        """
        samples = params.samples_per_prompt
        self._check(prompts_P, params)
        names = [f"{tag}/{prompt.id}/{s}" for prompt in prompts_P for s in range(samples)]
        answers = Answers(names, params, seed=self._seed, progress=self.progress)
        if prompts_P:
            longest = max(len(prompt.ids) for prompt in prompts_P) + params.max_tokens
            slots = min(self._slots, len(names))
            with _Evaluating(self._model):
                decoder = self._decoder(slots=slots, capacity=longest)
                write(decoder, [prompt.ids for prompt in prompts_P], answers, samples=samples, slots=slots)
        return [self._rollout(answers, n, prompts_P[n // samples]) for n in range(len(names))]

    def _rollout(self, answers: Answers, n: int, prompt: Prompt) -> Rollout:
        length = int(answers.length_N[n])
        return Rollout(
            id=answers.rollout_ids[n],
            prompt=prompt,
            response_ids=answers.ids_NT[n, :length].copy(),
            behaviour_logprobs=answers.logprobs_NT[n, :length].copy(),
            mask=np.ones(length, dtype=np.bool_),
            policy_version=self._version,
            behaviour="student",
            finish_reason="stop" if answers.stopped_N[n] else "length",
            sampling=answers.params,
            turns=((0, length),),
        )

    def _check(self, prompts_P: Sequence[Prompt], params: SamplingParams) -> None:
        seen: set[str] = set()
        room = self._model.max_positions
        for prompt in prompts_P:
            if not len(prompt.ids):
                raise BadInput(f"prompt {prompt.id} has no tokens: the student needs at least one to go on from")
            if prompt.id in seen:
                raise BadInput(f"prompt {prompt.id} occurs twice in one batch: its answers would have the same ids")
            seen.add(prompt.id)
            if room is not None and len(prompt.ids) + params.max_tokens > room:
                raise BadInput(
                    f"prompt {prompt.id} has {len(prompt.ids)} tokens; with max_tokens {params.max_tokens} its answer "
                    f"may end at position {len(prompt.ids) + params.max_tokens}, but the student's context is {room}. "
                    "Lower sampling.max_tokens or prompts.max_prompt_tokens."
                )

    def _decoder(self, *, slots: int, capacity: int) -> Decoder:
        if self._lean:
            return LeanDecoder(self._model, slots=slots, capacity=capacity)
        return GenericDecoder(self._model, joins=self._joins)

    def _lean_works(self, *, required: bool) -> bool:
        name = self._model.architecture.__name__
        reason = unsupported(self._model)
        if reason is None:
            worst = disagreement(LeanDecoder(self._model, slots=3, capacity=_PROBE + 2), self._model)
            if worst <= _TOLERANCE[self._model.compute_dtype]:
                return True
            reason = f"its logits differ from the model's own by {worst:.2g} of the largest logit"
            if not required:
                warnings.warn(f"{name} runs on the slower generic path: {reason}", RuntimeWarning, stacklevel=3)
        if required:
            raise ModelError(f"engine.path is lean, but {name} cannot run on it: {reason}. Use auto or generic.")
        return False

    def _rows_can_join(self) -> bool:
        decoder = GenericDecoder(self._model)
        if not decoder.joins:
            return False
        worst = disagreement(decoder, self._model)
        if worst > _TOLERANCE[self._model.compute_dtype]:
            warnings.warn(
                f"{self._model.architecture.__name__} writes answers to prompts of one length at a time: with mixed "
                f"lengths its logits differ from those of single prompts by {worst:.2g} of the largest logit",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        return True


_PROBE = 24  # tokens of the longer probe prompt


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


class _Evaluating:
    """The module in eval mode for a while: dropout off, and caches on even where training recomputes activations."""

    def __init__(self, model: CausalLM) -> None:
        self._module = model.module

    def __enter__(self) -> None:
        self._training = self._module.training
        self._module.eval()

    def __exit__(self, *_: object) -> None:
        self._module.train(self._training)
