"""The distributions that two models draw a token from together.

p is the student's distribution of the next token and q the teacher's, both as `sampling.distribution` makes them; each
function gives the law of the token that comes out, so that one number per token says which it is and how likely it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from opd.rollouts.sampling import distribution, largest
from opd.types import SamplingParams

# float32 [N, V] logits of student and teacher over the student's vocabulary, to float32 [N, V] probabilities
Joint = Callable[[Tensor, Tensor, SamplingParams], Tensor]


def mixed(student_NV: Tensor, teacher_NV: Tensor, params: SamplingParams, *, alpha: float) -> Tensor:
    """alpha q + (1 - alpha) p, both at the sampling temperature (MiniLLM, Gu et al. 2024, section 2.2)."""
    return alpha * distribution(teacher_NV, params) + (1 - alpha) * distribution(student_NV, params)


def verified(
    student_NV: Tensor, teacher_NV: Tensor, params: SamplingParams, *, top_k: int, temperature: float
) -> Tensor:
    """The student proposes v ~ p; it stays where v is among the teacher's `top_k`, else the teacher draws anew from q
    (SKD, Xu et al. 2024, algorithm 1). The token that comes out has probability

        p(v) [v in top k] + (1 - p(top k)) q(v)

    because a refusal has probability 1 - p(top k), whatever was proposed.

    temperature   the teacher's own, at which it draws anew; the student proposes at the sampling temperature.
    """
    p_NV = distribution(student_NV, params)
    q_NV = distribution(teacher_NV, replace(params, temperature=temperature))
    kept_NV = largest(teacher_NV, top_k)
    refused_N1 = (p_NV * ~kept_NV).sum(-1, keepdim=True)  # not 1 - p(top k), which would be rounding noise near 0
    return p_NV * kept_NV + refused_N1 * q_NV
