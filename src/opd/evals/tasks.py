"""A held-out task, and what one model makes of it. Works through the Sampler and the Grader it is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.evals.intervals import Estimate, avg_at_k
from opd.protocols import Grader, Sampler
from opd.types import Prompt, SamplingParams


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """Problems, the grader that knows their answers, and how the model is sampled on them.

    params  `samples_per_prompt` is the k of avg@k.
    """

    name: str
    prompts_P: tuple[Prompt, ...]
    grader: Grader
    params: SamplingParams


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What one model scored on one task.

    scores           problem id to the scores of its k answers, in sample order.
    mean_length      tokens per answer, end token included.
    truncated_share  answers cut off by `max_tokens`; they are graded as they stand.
    answers          one plain record per answer: id, problem, prompt (its last message), answer, score,
                     reason, tokens, finish_reason.
    """

    task: str
    estimate: Estimate
    scores: Mapping[str, tuple[float | None, ...]]
    mean_length: float
    truncated_share: float
    answers: tuple[dict[str, Any], ...]


def run_task(
    task: EvalTask,
    sampler: Sampler,
    decode: Callable[[NDArray[np.int64]], str],
    *,
    tag: str,
    confidence: float,
) -> EvalResult:
    """Samples k answers to every problem, grades them and estimates avg@k.

    decode      response ids (int64 [T]) to the text the grader reads, special tokens left out.
    tag         first part of the rollout ids, and so of their noise: the same tag at two steps compares two models
                under the same random numbers; different tags draw fresh ones.
    confidence  of the interval, two-sided.
    """
    rollouts_N = sampler.generate(task.prompts_P, task.params, tag=tag)
    texts = [decode(rollout.response_ids) for rollout in rollouts_N]
    grades = task.grader.grade([rollout.prompt.row for rollout in rollouts_N], texts)
    scores: dict[str, list[float | None]] = {prompt.id: [] for prompt in task.prompts_P}
    for rollout, grade in zip(rollouts_N, grades, strict=True):
        scores[rollout.prompt.id].append(grade.score)
    k = task.params.samples_per_prompt
    assert all(len(row) == k for row in scores.values()), "the sampler must write k answers to every problem"
    answers = tuple(
        {
            "id": rollout.id,
            "problem": rollout.prompt.id,
            "prompt": _asked(rollout.prompt),
            "answer": text,
            "score": grade.score,
            "reason": grade.reason,
            "tokens": len(rollout.response_ids),
            "finish_reason": rollout.finish_reason,
        }
        for rollout, text, grade in zip(rollouts_N, texts, grades, strict=True)
    )
    return EvalResult(
        task=task.name,
        estimate=avg_at_k(list(scores.values()), confidence),
        scores={problem: tuple(row) for problem, row in scores.items()},
        mean_length=_mean([a["tokens"] for a in answers]),
        truncated_share=_mean([a["finish_reason"] == "length" for a in answers]),
        answers=answers,
    )


def _asked(prompt: Prompt) -> str:
    """What was asked, for people: the prompt, of a chat its last message."""
    asked = prompt.row.prompt
    return asked if isinstance(asked, str) else asked[-1]["content"]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
