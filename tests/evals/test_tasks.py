"""A task through a scripted Sampler (the seam) and a real grader."""

from __future__ import annotations

import numpy as np
import pytest

from opd.evals.tasks import EvalTask, run_task
from opd.grading.graders import make_grader
from opd.types import Prompt, Rollout, Row, SamplingParams

ALPHABET = "0123456789 "


class ScriptedSampler:
    """Answers from a table: problem id to its texts; a text that ends in ~ was cut off."""

    def __init__(self, texts):
        self.texts = texts

    def generate(self, prompts_P, params, *, tag):
        return [
            self._rollout(prompt, params, f"{tag}/{prompt.id}/{i}", text)
            for prompt in prompts_P
            for i, text in enumerate(self.texts[prompt.id])
        ]

    def load(self, weights):
        raise AssertionError("an eval never changes the weights")

    def _rollout(self, prompt, params, id, text):
        ids = np.array([ALPHABET.index(c) for c in text.rstrip("~")], dtype=np.int64)
        return Rollout(
            id=id,
            prompt=prompt,
            response_ids=ids,
            behaviour_logprobs=np.zeros(len(ids), np.float32),
            mask=np.ones(len(ids), bool),
            policy_version=0,
            behaviour="student",
            finish_reason="length" if text.endswith("~") else "stop",
            sampling=params,
        )


def decode(ids):
    return "".join(ALPHABET[i] for i in ids)


def task(k=2):
    rows = [Row(id=f"sums/{i}", domain="sums", prompt="?", columns={"answer": str(i)}) for i in range(3)]
    return EvalTask(
        name="sums",
        prompts_P=tuple(Prompt(row=row, ids=np.array([1])) for row in rows),
        grader=make_grader("exact", {"answer_column": "answer", "ignore_case": False}, 1),
        params=SamplingParams(max_tokens=4, samples_per_prompt=k),
    )


def test_scores_are_grouped_by_problem_and_truncated_answers_are_graded_as_they_stand():
    sampler = ScriptedSampler({"sums/0": ["0", "0~"], "sums/1": ["1", "7777~"], "sums/2": ["11", "3"]})
    result = run_task(task(), sampler, decode, tag="eval/sums", confidence=0.9)
    assert result.scores == {"sums/0": (1.0, 1.0), "sums/1": (1.0, 0.0), "sums/2": (0.0, 0.0)}
    assert (result.estimate.mean, result.estimate.n, result.estimate.k) == (0.5, 3, 2)
    assert result.mean_length == pytest.approx(10 / 6) and result.truncated_share == pytest.approx(2 / 6)
    assert result.answers[3] == {
        "id": "eval/sums/sums/1/1",
        "problem": "sums/1",
        "prompt": "?",
        "answer": "7777",
        "score": 0.0,
        "reason": "",
        "tokens": 4,
        "finish_reason": "length",
    }


def test_X_12_scores_join_by_id_whatever_order_the_sampler_answers_in():
    class Reversed(ScriptedSampler):
        def generate(self, prompts_P, params, *, tag):
            return super().generate(prompts_P, params, tag=tag)[::-1]

    sampler = Reversed({"sums/0": ["0"], "sums/1": ["7"], "sums/2": ["2"]})
    result = run_task(task(k=1), sampler, decode, tag="t", confidence=0.95)
    assert result.scores == {"sums/0": (1.0,), "sums/1": (0.0,), "sums/2": (1.0,)}


def test_a_sampler_that_answers_too_few_times_is_our_fault():
    sampler = ScriptedSampler({"sums/0": ["0"], "sums/1": ["7"], "sums/2": ["2"]})
    with pytest.raises(AssertionError, match="k answers"):
        run_task(task(k=2), sampler, decode, tag="t", confidence=0.95)
