"""Answers that a scorer writes alone (SeqKD), in the student's ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from opd.protocols import Weights
from opd.rollouts.decoding import DecoderPath
from opd.rollouts.engine import EmbeddedEngine
from opd.rollouts.scorer import WritingScorer, as_read, fetched
from opd.text.agreement import Agreement
from opd.types import Prompt, Rollout, SamplingParams


class TeacherAnswers:
    """A `Sampler` in which `scorer` samples, each prompt in its own format and context.

    The student's ids stand in the rollouts, and the student's prompts. `behaviour_logprobs` are the scorer's: it is
    what was sampled from. `policy_version` is the student's at that time.

    A scorer with another tokenizer writes up to max_tokens of its own tokens; the text is then put into the student's,
    cut at max_tokens of these. Nobody sampled them: `behaviour_logprobs` are NaN.

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
        asked = replace(params, stop_ids=self._stops(params))
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
        return [self._as_student(r, prompts_P[n // params.samples_per_prompt], params) for n, r in enumerate(written)]

    def _stops(self, params: SamplingParams) -> tuple[int, ...]:
        """What ends an answer, in the scorer's ids: what ends the student's, where it has that, and its own ends."""
        agreement, ends = self._scorer.agreement, self._scorer.format.end_ids
        stops = np.array(params.stop_ids, dtype=np.int64)
        if isinstance(agreement, Agreement):
            theirs = agreement.teacher_ids(stops)
            ends = tuple(n for n in ends if n < agreement.vocab_size)
        else:
            theirs = agreement.teacher_of_V[stops]
        return tuple(dict.fromkeys([*theirs[theirs >= 0].tolist(), *ends]))

    def _as_student(self, written: Rollout, prompt: Prompt, params: SamplingParams) -> Rollout:
        agreement = self._scorer.agreement
        said = {"prompt": prompt, "policy_version": self._version, "behaviour": "teacher", "sampling": params}
        if isinstance(agreement, Agreement):
            ids = agreement.teacher_ids(written.response_ids)  # an exchange is its own inverse
            return replace(written, response_ids=ids, **said)
        theirs, stopped = written.response_ids, written.finish_reason == "stop"
        ended = stopped and int(theirs[-1]) in self._scorer.format.end_ids  # other stop tokens are text
        ids_T = agreement.student_answer(prompt, theirs, ended=ended)
        over = np.flatnonzero(np.isin(ids_T, params.stop_ids))
        stopped |= len(over) > 0
        whole_T = ids_T[: over[0] + 1] if len(over) else ids_T
        cut_T = whole_T[: params.max_tokens]
        return replace(
            written,
            response_ids=cut_T,
            behaviour_logprobs=np.full(len(cut_T), np.nan, dtype=np.float32),
            mask=np.ones(len(cut_T), dtype=np.bool_),
            turns=((0, len(cut_T)),),
            finish_reason="stop" if stopped and len(cut_T) == len(whole_T) else "length",
            **said,
        )
