"""Who writes which answer: every prompt of a step, or the whole step, is given to one of several writers by lot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from opd.protocols import Sampler, Weights
from opd.rollouts import noise
from opd.types import Prompt, Rollout, SamplingParams


@dataclass(frozen=True)
class Part:
    """One writer.

    share        of the prompts, or of the batches.
    one_answer   it has one answer to a prompt, whatever `samples_per_prompt` says.
    """

    sampler: Sampler
    share: float = 1.0
    one_answer: bool = False


class Writers:
    """A `Sampler` over several.

    The lot is a function of (seed, tag, prompt id), per batch of (seed, tag): neither resuming nor the order of
    prompts changes who writes what. Over many prompts each writer gets its share of them.

    progress   called with the number of answers of the running `generate` call that are finished.
    """

    def __init__(self, parts: Sequence[Part], *, seed: int, per: Literal["prompt", "batch"] = "prompt") -> None:
        self.progress: Callable[[int], None] | None = None
        self._parts = tuple(parts)
        self._seed, self._per = seed, per
        self._ends = np.cumsum([part.share for part in parts])[:-1]

    def load(self, weights: Weights) -> None:
        for part in self._parts:
            part.sampler.load(weights)

    def lots(self, prompts_P: Sequence[Prompt], *, tag: str) -> list[int]:
        """Which writer each prompt is given to."""
        names = [tag if self._per == "batch" else f"{tag}/{prompt.id}" for prompt in prompts_P]
        key_P = np.array([noise.key(self._seed, f"writer:{name}") for name in names], dtype=np.uint64)
        uniform_P = noise.uniforms(key_P, np.zeros(len(names), dtype=np.int64))
        return np.searchsorted(self._ends, uniform_P, side="right").tolist()

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """See `protocols.Sampler`; a prompt of a writer with one answer gets one. Errors are the writers' own."""
        lot_P = self.lots(prompts_P, tag=tag)
        answers: dict[str, list[Rollout]] = {prompt.id: [] for prompt in prompts_P}
        assert len(answers) == len(prompts_P), "a prompt occurs twice in one batch"
        finished = 0
        for i, part in enumerate(self._parts):
            given = [prompt for prompt, lot in zip(prompts_P, lot_P, strict=True) if lot == i]
            if not given:
                continue
            sampler: Any = part.sampler
            if hasattr(sampler, "progress"):
                sampler.progress = partial(self._told, finished)
            asked = replace(params, samples_per_prompt=1) if part.one_answer else params
            for rollout in part.sampler.generate(given, asked, tag=tag):
                answers[rollout.prompt.id].append(rollout)
                finished += 1
        return [rollout for prompt in prompts_P for rollout in answers[prompt.id]]

    def _told(self, before: int, done: int) -> None:
        if self.progress is not None:
            self.progress(before + done)
