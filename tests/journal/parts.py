"""Rollouts for tests of the journal, the costs and the reports."""

from __future__ import annotations

import numpy as np

from opd.types import Prompt, Rollout, Row


def rollouts(prompts: int = 2, samples: int = 2, tokens: int = 5, prompt_tokens: int = 3) -> list[Rollout]:
    random = np.random.default_rng(0)
    made = []
    for p in range(prompts):
        row = Row(id=f"letters/{p}", domain="letters", prompt="x")
        prompt = Prompt(row=row, ids=random.integers(0, 99, prompt_tokens))
        for s in range(samples):
            made.append(
                Rollout(
                    id=f"train/{prompt.id}/{s}",
                    prompt=prompt,
                    response_ids=random.integers(0, 99, tokens),
                    behaviour_logprobs=-random.exponential(size=tokens).astype(np.float32),
                    mask=np.arange(tokens) > 0,
                    policy_version=7,
                    behaviour="student",
                    finish_reason="stop",
                    turns=((0, tokens),),
                )
            )
    return made
