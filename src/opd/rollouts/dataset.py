"""Answers that come with the data, in the shape of rollouts: what `behaviour: dataset` trains on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd.errors import BadInput, DataError
from opd.protocols import Weights
from opd.types import Prompt, Rollout, SamplingParams


class DatasetAnswers:
    """A `Sampler` that reads every prompt's own completion instead of writing one."""

    def __init__(self) -> None:
        self._version = 0

    def load(self, weights: Weights) -> None:
        """Takes the version only; no model writes here."""
        self._version = weights.version

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """One rollout per prompt, with NaN behaviour log-probabilities.

        A completion longer than `max_tokens` is cut there and finishes with "length": it then has no end token, so that
        stopping early is not learned from it. BadInput unless samples_per_prompt is 1; DataError for a prompt without
        a completion.
        """
        if params.samples_per_prompt != 1:
            raise BadInput(
                f"sampling.samples_per_prompt is {params.samples_per_prompt}, but a row has one answer: with behaviour "
                "dataset it must be 1"
            )
        return [self._rollout(prompt, params, tag) for prompt in prompts_P]

    def _rollout(self, prompt: Prompt, params: SamplingParams, tag: str) -> Rollout:
        if prompt.completion_ids is None or not len(prompt.completion_ids):
            raise DataError(
                f"row {prompt.id} has no completion, but the objective trains on the data's own answers (behaviour "
                "dataset). Give it one, or use an objective whose answers the student writes."
            )
        ids_T = prompt.completion_ids[: params.max_tokens]
        return Rollout(
            id=f"{tag}/{prompt.id}/0",
            prompt=prompt,
            response_ids=ids_T.astype(np.int64),
            behaviour_logprobs=np.full(len(ids_T), np.nan, dtype=np.float32),
            mask=np.ones(len(ids_T), dtype=np.bool_),
            policy_version=self._version,
            behaviour="dataset",
            finish_reason="stop" if len(ids_T) == len(prompt.completion_ids) else "length",
            turns=((0, len(ids_T)),),
        )
