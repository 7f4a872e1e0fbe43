"""Answers that a scorer writes alone (SeqKD), in the student's ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from opd.protocols import Weights
from opd.rollouts.decoding import DecoderPath
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.scorer import WritingScorer, as_read, fetched
from opd.types import Prompt, Rollout, SamplingParams


class TeacherAnswers:
    """A `Sampler` in which `scorer` samples, each prompt in its own format and context.

    The student's ids stand in the rollouts, and the student's prompts. `behaviour_logprobs` are the scorer's: it is
    what was sampled from. `policy_version` is the student's at that time.

    progress   called with the number of answers of the running `generate` call that are finished.
    """

    def __init__(
        self,
        scorer: WritingScorer,
        *,
        seed: int,
        slots: int,
        path: DecoderPath,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.progress = progress
        self._scorer = scorer
        self._seed, self._slots = seed, slots
        self._path: DecoderPath = path
        self._version = 0

    def load(self, weights: Weights) -> None:
        """Takes the version only; the student does not write here."""
        self._version = weights.version

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """See `protocols.Sampler`. An answer also ends where the scorer itself would end it.

        BadInput when a prompt leaves no room for max_tokens in the scorer's context; ModelError when its logits are not
        finite.
        """
        if not prompts_P:
            return []
        agreement = self._scorer.agreement
        stops = agreement.teacher_ids(np.array(params.stop_ids, dtype=np.int64)).tolist()
        stops += [n for n in self._scorer.format.end_ids if n < agreement.vocab_size]
        asked = replace(params, stop_ids=tuple(dict.fromkeys(stops)))
        with fetched(self._scorer) as model:
            # Made anew by every call: an engine that stayed would keep a model in memory that is loaded for each step.
            engine = EmbeddedEngine(
                model,
                seed=self._seed,
                slots=self._slots,
                path=self._path,
                progress=self.progress,
                who=f"scorer {self._scorer.name}",
            )
            written = engine.generate(as_read(prompts_P, self._scorer), asked, tag=tag)
        return [
            replace(
                rollout,
                prompt=prompts_P[n // params.samples_per_prompt],
                response_ids=agreement.teacher_ids(rollout.response_ids),  # an exchange is its own inverse
                policy_version=self._version,
                behaviour="teacher",
                sampling=params,
            )
            for n, rollout in enumerate(written)
        ]
