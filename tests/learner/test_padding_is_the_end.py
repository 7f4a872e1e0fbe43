"""The token that ends an answer may be the one that batches are padded with; it is trained all the same, once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests import rooms

END = 0  # also what rectangles are filled with


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("support", ["full", "sampled"])
def test_M_10_the_end_of_an_answer_is_trained_where_it_is_the_padding_too(support: str, side) -> None:
    """Against one answer at a time, which has no padding; and the end's own part of the gradient is not zero."""
    fmt = rooms.prompt_format()
    assert fmt.end_ids[0] == END
    student = rooms.causal(seed=0, dtype=torch.float64)
    teacher = rooms.teacher(rooms.causal(seed=1, dtype=torch.float64), fmt)
    made = [
        rooms.answer(prompt, [*range(5, 5 + n), END], [-1.0] * (n + 1))
        for n, prompt in enumerate(rooms.prompts(fmt), 1)
    ]
    term = rooms.objective({"name": "t", "support": support})

    def of(rollouts_N, **options) -> tuple[torch.Tensor, float]:
        learner = rooms.learner(student, term, **options)
        metrics = learner.gradients(rollouts_N, teacher.evidence(rollouts_N))
        return rooms.gradient(student), metrics["trained_tokens"]

    together, tokens = of(made, padding_side=side)
    assert tokens == sum(len(r.response_ids) for r in made)
    alone = sum(len(r.response_ids) * of([r])[0] for r in made) / tokens
    assert rooms.distance(together, alone) < 1e-6
    ends = [dataclasses.replace(r, mask=np.arange(len(r.mask)) == len(r.mask) - 1) for r in made]
    assert of(ends, padding_side=side)[1] == len(made) and of(ends)[0].norm() > 1e-3
