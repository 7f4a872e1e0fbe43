"""The answers of one `generate` call while they are being written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.errors import ModelError
from opd.rollouts import noise, sampling
from opd.types import Behaviour, Prompt, Rollout, SamplingParams


class Answers:
    """Tokens and log-probabilities of N rollouts, whichever rows of whichever batch they are written in.

    Rollout n answers prompt n // samples_per_prompt; its id is `<tag>/<prompt id>/<sample>`.

    ids_NT        int64 [N, max_tokens]; the first length_N tokens of a row are its answer.
    logprobs_NT   float32 [N, max_tokens].
    stopped_N     bool [N]; True where the answer ended with a stop token.

    params        how tokens are drawn from the logits that `draw` gets.
    progress      called with the number of finished answers.
    who           whose logits they are, for messages.
    """

    def __init__(
        self,
        prompts_P: Sequence[Prompt],
        params: SamplingParams,
        *,
        tag: str,
        seed: int,
        progress: Callable[[int], None] | None,
        who: str,
    ) -> None:
        samples = params.samples_per_prompt
        self.rollout_ids = [f"{tag}/{prompt.id}/{s}" for prompt in prompts_P for s in range(samples)]
        N = len(self.rollout_ids)
        self.params = params
        self.ids_NT = np.zeros((N, params.max_tokens), dtype=np.int64)
        self.logprobs_NT = np.zeros((N, params.max_tokens), dtype=np.float32)
        self.length_N = np.zeros(N, dtype=np.int64)
        self.stopped_N = np.zeros(N, dtype=np.bool_)
        self._key_N = np.array([noise.key(seed, rollout_id) for rollout_id in self.rollout_ids], dtype=np.uint64)
        self._stops = frozenset(params.stop_ids)
        self._prompts_P = prompts_P
        self._progress = progress
        self._finished = 0
        self._who = who

    def draw(self, logits_NV: Tensor, rollout_N: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.bool_]]:
        """Draws and records the next token of rollouts `rollout_N` from float32 [N, V] logits, one row each.

        Returns the int64 [N] tokens on the device of the logits and, on the host, bool [N]: True for rollouts that go
        on. ModelError when logits are not finite.
        """
        position_N = self.length_N[rollout_N]
        uniform_N = torch.from_numpy(noise.uniforms(self._key_N[rollout_N], position_N)).to(logits_NV.device)
        token_N, logprob_N = sampling.draw(logits_NV, uniform_N, self.params)
        written_N, written_logprob_N = _on_host(token_N, logprob_N)
        if not np.isfinite(written_logprob_N).all():
            n = int(rollout_N[int(np.argmin(np.isfinite(written_logprob_N)))])
            raise ModelError(
                f"the {self._who}'s logits are not finite at position {self.length_N[n]} of rollout "
                f"{self.rollout_ids[n]}. Its weights are broken (in the checkpoint, or by too high a learning rate), "
                "or its dtype overflows."
            )
        self.ids_NT[rollout_N, position_N] = written_N
        self.logprobs_NT[rollout_N, position_N] = written_logprob_N
        self.length_N[rollout_N] += 1
        stopped_N = np.array([token in self._stops for token in written_N.tolist()], dtype=np.bool_)
        self.stopped_N[rollout_N] = stopped_N
        goes_on_N = ~stopped_N & (position_N + 1 < self.params.max_tokens)
        if not goes_on_N.all():
            self._finished += int((~goes_on_N).sum())
            if self._progress is not None:
                self._progress(self._finished)
        return token_N, goes_on_N

    def rollouts(self, *, behaviour: Behaviour, version: int, sampling: SamplingParams) -> list[Rollout]:
        """The finished answers, in the order of the prompts; `sampling` is what was asked for."""
        return [self._rollout(n, behaviour, version, sampling) for n in range(len(self.rollout_ids))]

    def _rollout(self, n: int, behaviour: Behaviour, version: int, sampling: SamplingParams) -> Rollout:
        length = int(self.length_N[n])
        return Rollout(
            id=self.rollout_ids[n],
            prompt=self._prompts_P[n // self.params.samples_per_prompt],
            response_ids=self.ids_NT[n, :length].copy(),
            behaviour_logprobs=self.logprobs_NT[n, :length].copy(),
            mask=np.ones(length, dtype=np.bool_),
            policy_version=version,
            behaviour=behaviour,
            finish_reason="stop" if self.stopped_N[n] else "length",
            sampling=sampling,
            turns=((0, length),),
        )


def _on_host(token_N: Tensor, logprob_N: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Both in one transfer: a device is waited for once per token. Tokens are exact in float64."""
    if token_N.device.type == "cpu":
        return token_N.numpy(), logprob_N.numpy()
    token_N, logprob_N = torch.stack([token_N.double(), logprob_N.double()]).cpu()
    return token_N.long().numpy(), logprob_N.float().numpy()
