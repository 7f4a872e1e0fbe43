"""From answers that are already written to the questions that training will ask about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd.config.schema import Config
from opd.config.scorers import all_scorers, loaded_as
from opd.errors import BadInput, DataError
from opd.journal.reader import read_rollouts, recorded_steps
from opd.models.loading import read_config
from opd.prompts.sources import read_source
from opd.teachers.as_read import AsRead
from opd.teachers.service import Question
from opd.types import FinishReason, Prompt, Rollout
from opd.wiring.build import Texts, load_prompts, render, scorer_role

AT_ONCE = 256  # questions that a service has at the same time; how many it works on is its own affair


class WrittenAnswers:
    """Questions about answers, as training will ask them: the key of a score is what both have in common.

    prompts  those of the answers, as far as they have been read.
    cut      answers that were longer than sampling.max_tokens.
    """

    def __init__(self, config: Config, scorer: str, texts: Texts, top_k: int, place: Path) -> None:
        self.config, self.place, self.top_k = config, place, top_k
        self.student, self.teacher, self.agreement = texts.student, texts.scorers[scorer], texts.agreements[scorer]
        self.prompts: list[Prompt] = []
        self.cut = 0

    def rows(self) -> Iterator[Question]:
        """Rows with a completion; others are passed over."""
        for row in read_source(self.config.prompts.sources[0]):
            prompt = render(row, self.student)
            if prompt.completion_ids is not None:
                self.prompts.append(prompt)
                yield from self._asked(row.id, prompt, self.teacher.prompt_ids(row), prompt.completion_ids, "stop")

    def recorded(self, step: int | None) -> Iterator[Question]:
        """The rollouts of a run, behind the prompts that its config gives again."""
        stream = load_prompts(self.config, self.student)
        steps = sorted(recorded_steps(self.place)) if step is None else [step]
        if not steps:
            raise DataError(f"{self.place}: this run has written no rollouts yet")
        for number in steps:
            prompts = {prompt.id: prompt for prompt in stream.batch(number - 1)}
            read = {}
            for line in read_rollouts(self.place, number):
                prompt = prompts.get(line["prompt_id"])
                if prompt is None or prompt.ids.tolist() != line["prompt_ids"]:
                    raise DataError(
                        f"{self.place}: the prompt of rollout {line['id']} ({len(line['prompt_ids'])} tokens there) is "
                        f"{'not in this step' if prompt is None else f'another one ({len(prompt.ids)} tokens)'} here. "
                        "Give the prompts, student.format and tokenizer that the run had; its files must not have "
                        "changed"
                    )
                if prompt.id not in read:
                    read[prompt.id] = self.teacher.prompt_ids(prompt.row)
                    self.prompts.append(prompt)
                if line["response_ids"]:
                    ids = np.array(line["response_ids"], dtype=np.int64)
                    yield from self._asked(line["id"], prompt, read[prompt.id], ids, line["finish_reason"])

    def _asked(
        self,
        name: str,
        prompt: Prompt,
        prompt_ids: NDArray[np.int64],
        answer_ids: NDArray[np.int64],
        finish_reason: FinishReason,
    ) -> Iterator[Question]:
        """A question, or none about an answer in which a scorer with another tokenizer has nothing to read."""
        limit = self.config.sampling.max_tokens
        self.cut += len(answer_ids) > limit
        if int(answer_ids.max()) >= self.student.tokenizer.vocab_size:
            raise DataError(
                f"{self.place}: {name} holds token {int(answer_ids.max())}, but the student has "
                f"{self.student.tokenizer.vocab_size} tokens. It was written with another tokenizer"
            )
        written = Rollout(
            id=name,
            prompt=prompt,
            response_ids=answer_ids[:limit],
            behaviour_logprobs=np.full(len(answer_ids[:limit]), np.nan, dtype=np.float32),
            mask=np.ones(len(answer_ids[:limit]), dtype=np.bool_),
            policy_version=0,
            behaviour="dataset",
            finish_reason=finish_reason if len(answer_ids) <= limit else "length",
        )
        answer = AsRead(self.teacher, self.agreement, [written]).ids(written)
        if len(answer):
            yield Question(rollout_id=name, prompt_ids=prompt_ids, answer_ids=answer, top_k=self.top_k)


def check_lengths(config: Config, name: str, questions: Sequence[Question]) -> None:
    scorer = all_scorers(config)[name]
    spec = loaded_as(config, scorer)
    positions = getattr(read_config(spec, scorer_role(config, name)).get_text_config(), "max_position_embeddings", None)
    for question in questions:
        prompt, answer = len(question.prompt_ids), len(question.answer_ids)
        if positions is not None and prompt + answer > positions:
            raise BadInput(
                f"{question.rollout_id}: its prompt ({prompt} tokens) and answer ({answer}) need {prompt + answer} "
                f"positions, {name} {spec.model} has {positions}. Lower sampling.max_tokens, or leave it out"
            )


def chunks(questions: Sequence[Question], budget: int | None) -> Iterator[list[Question]]:
    """In their order. With a budget of tokens, a chunk is what one forward pass takes: padded it is within it."""
    chunk: list[Question] = []
    longest = 0
    for question in questions:
        length = len(question.prompt_ids) + len(question.answer_ids)
        full = len(chunk) >= AT_ONCE if budget is None else max(longest, length) * (len(chunk) + 1) > budget
        if chunk and full:
            yield chunk
            chunk, longest = [], 0
        chunk.append(question)
        longest = max(longest, length)
    if chunk:
        yield chunk
