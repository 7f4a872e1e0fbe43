"""Rewards: how good whole answers are that are trained on, as a grader sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from opd.loop.answers import MOST_DOMAINS, as_key
from opd.protocols import Grader
from opd.types import Rollout


class AnswerRewards:
    """Grades the answers of a step.

    decode   token ids to the text that the grader reads, without special tokens.
    """

    def __init__(self, grader: Grader, decode: Callable[[Iterable[int]], str]) -> None:
        self._grader, self._decode = grader, decode

    def grade(self, rollouts_N: Sequence[Rollout]) -> list[Rollout]:
        """The same rollouts with their `reward`, in [0, 1]. None for answers that came with the data, which nobody
        sampled, and where the grader could not decide. What the grader raises passes through."""
        graded = [n for n, rollout in enumerate(rollouts_N) if _is_sampled(rollout)]
        rows = [rollouts_N[n].prompt.row for n in graded]
        texts = [self._decode(rollouts_N[n].response_ids) for n in graded]
        scores = {n: grade.score for n, grade in zip(graded, self._grader.grade(rows, texts), strict=True)}
        return [replace(rollout, reward=scores.get(n)) for n, rollout in enumerate(rollouts_N)]

    def close(self) -> None:
        """Ends the grader's processes."""
        self._grader.close()


def reward_metrics(rollouts_N: Sequence[Rollout]) -> dict[str, float]:
    """Plain finite numbers about a step that was graded; a mean of nothing is left out.

    reward_graded                share of the sampled answers that the grader could decide on
    reward_mean                  over those
    reward_mean/domain/NAME      where there are several domains; the largest 20 of them
    """
    sampled = [rollout for rollout in rollouts_N if _is_sampled(rollout)]
    known = [(as_key(rollout.domain), rollout.reward) for rollout in sampled if rollout.reward is not None]
    if not sampled:
        return {}
    facts = {"reward_graded": len(known) / len(sampled)}
    if not known:
        return facts
    facts["reward_mean"] = float(np.mean([reward for _, reward in known]))
    by_domain: dict[str, list[float]] = {}
    for domain, reward in known:
        by_domain.setdefault(domain, []).append(reward)
    if len({rollout.domain for rollout in sampled}) > 1:
        largest = sorted(by_domain, key=lambda name: (-len(by_domain[name]), name))[:MOST_DOMAINS]
        facts |= {f"reward_mean/domain/{name}": float(np.mean(by_domain[name])) for name in sorted(largest)}
    return facts


def _is_sampled(rollout: Rollout) -> bool:
    return rollout.behaviour != "dataset"
