"""Answers of an earlier run, step by step, token by token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.errors import DataError
from opd.journal.reader import read_events, read_rollouts, recorded_steps
from opd.protocols import Weights
from opd.types import Prompt, Rollout, SamplingParams

Line = Mapping[str, Any]


class CachedAnswers:
    """A `Sampler` that gives every prompt of a step what an earlier run wrote to it in the same step.

    Tokens, log-probabilities, masks and policy versions are those of the record; an answer longer than `max_tokens` is
    cut there. `sampling` is what this run asked for, not what the tokens were drawn with. Rewards are not taken over:
    this run grades for itself.

    folder       the earlier run's.
    vocab_size   the student's tokens.
    """

    def __init__(self, folder: str | Path, *, vocab_size: int) -> None:
        self.folder = Path(folder).expanduser()
        self._vocab_size = vocab_size

    def load(self, weights: Weights) -> None:
        """Nothing is written here: an answer keeps the version of the weights that wrote it."""

    def generate(self, prompts_P: Sequence[Prompt], params: SamplingParams, *, tag: str) -> list[Rollout]:
        """See `protocols.Sampler`; `tag` ends in the step, counted from 0.

        DataError when the step is not there, or does not hold enough answers to these prompts.
        """
        found = self._step(int(tag.rpartition("/")[2]))
        return [
            self._rollout(line, prompt, params, f"{tag}/{prompt.id}/{s}")
            for prompt in prompts_P
            for s, line in enumerate(self._answers(found, prompt, params.samples_per_prompt))
        ]

    def check(
        self,
        batch: Callable[[int], Sequence[Prompt]],
        *,
        steps: int,
        samples: int,
        fingerprint: str,
        show: Callable[[NDArray[np.int64]], str],
    ) -> None:
        """Whether the record can be used for a run of `steps` steps; reads its first and its last one.

        batch         the prompts of a step.
        samples       answers to a prompt.
        fingerprint   of the training prompts, as the record's first event names them.
        show          token ids as text: the same as in the record where the tokenizer is the same.

        DataError when the folder is no run, or its steps, prompts or tokenizer are not this run's.
        """
        there = recorded_steps(self.folder)
        missing = [step for step in range(steps) if step + 1 not in there]
        if missing:
            raise DataError(
                f"{self.folder}: it has rollouts of {len(there)} steps, but step {missing[0] + 1} of run.steps = "
                f"{steps} is not among them. Ask for fewer steps, or name a run that has them all"
            )
        starts = [event["data"] for event in read_events(self.folder) if event["kind"] == "start"]
        if starts and starts[-1] != fingerprint:
            raise DataError(
                f"{self.folder}: its prompts are not those of this run (fingerprint {starts[-1]} there, {fingerprint} "
                "here). Give this run the same prompts, student.format and tokenizer"
            )
        for step in dict.fromkeys((0, steps - 1)):
            found = self._step(step)
            for prompt in batch(step):
                for line in self._answers(found, prompt, samples):
                    shown = show(np.array(line["response_ids"], dtype=np.int64))
                    if shown != line["response"]:
                        raise DataError(
                            f"{self.folder}: rollout {line['id']} was written with another tokenizer: its ids read "
                            f"{shown[:80]!r} here, {line['response'][:80]!r} there"
                        )

    def _step(self, step: int) -> dict[str, list[Line]]:
        """What was written in a step (from 0; the record counts from 1), by prompt id, in its order."""
        found: dict[str, list[Line]] = defaultdict(list)
        for line in read_rollouts(self.folder, step + 1):
            found[line["prompt_id"]].append(line)
        return found

    def _answers(self, found: Mapping[str, list[Line]], prompt: Prompt, samples: int) -> list[Line]:
        lines = found.get(prompt.id, [])
        if len(lines) < samples:
            raise DataError(
                f"{self.folder}: it has {len(lines)} answers to prompt {prompt.id} in this step, and "
                f"sampling.samples_per_prompt is {samples}. Use as many as there are, and the same prompts.per_step, "
                "prompts.seed and sources"
            )
        for line in lines[:samples]:
            if line["prompt_ids"] != prompt.ids.tolist():
                raise DataError(
                    f"{self.folder}: rollout {line['id']} answers another prompt: {len(line['prompt_ids'])} tokens "
                    f"there, {len(prompt.ids)} here, and they differ. Give this run the same prompts, student.format "
                    "and tokenizer"
                )
            if max(line["response_ids"], default=0) >= self._vocab_size:
                raise DataError(
                    f"{self.folder}: rollout {line['id']} holds token {max(line['response_ids'])}, but the student "
                    f"has {self._vocab_size} tokens. It was written with another tokenizer"
                )
        return lines[:samples]

    def _rollout(self, line: Line, prompt: Prompt, params: SamplingParams, rollout_id: str) -> Rollout:
        T = min(len(line["response_ids"]), params.max_tokens)
        logprobs = [np.nan if x is None else x for x in line["behaviour_logprobs"][:T]]
        whole = len(line["response_ids"]) == T
        return Rollout(
            id=rollout_id,
            prompt=prompt,
            response_ids=np.array(line["response_ids"][:T], dtype=np.int64),
            behaviour_logprobs=np.array(logprobs, dtype=np.float32),
            mask=np.array(line["mask"][:T], dtype=np.bool_),
            policy_version=line["policy_version"],
            behaviour="cached",
            finish_reason=line["finish_reason"] if whole else "length",
            sampling=params,
            turns=tuple((start, min(end, T)) for start, end in line["turns"] if start < T),
        )
