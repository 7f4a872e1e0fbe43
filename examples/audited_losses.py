"""Loss functions as they are written in the field, typed again from their formulas, for `opd audit`.

    opd audit examples/audited_losses.py:k3_direct

Each takes student_logits and teacher_logits [N, T, V], the drawn tokens [N, T], a mask [N, T] that is True at tokens
to train, and the log-probabilities [N, T] with which the tokens were drawn; logits at t predict the token at t. Most
return a loss per token, whatever stands at masked ones. What each of them really follows is in docs/audit.md.

Written from published formulas; nothing here is anybody's code. To audit your own loss, write a function like these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.config.objective import DivergenceTerm
from opd.config.shapes import ForwardKL, JensenShannon, ReverseKL, Shape
from opd.config.slots import Sampled, Support, TopK
from opd.objectives.kernels.rows import TermRows, TokenRows
from opd.objectives.kernels.tiled import tiled_loss
from opd.types import Head, ScorerRows

K = 2  # of the audit's five tokens


def drawn(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N, T]: log-probability of the drawn tokens."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


# ---- k1, k2, k3: estimates of KL(student || teacher) from the drawn token, r = q / p --------------------------------


def k1(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """log(p / q)."""
    return drawn(student_logits, tokens) - drawn(teacher_logits, tokens)


def k2(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """(log r)^2 / 2."""
    return k1(student_logits, teacher_logits, tokens).square() / 2


def k3(student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor) -> Tensor:
    """r - 1 - log r."""
    log_r = -k1(student_logits, teacher_logits, tokens)
    return log_r.exp() - 1 - log_r


def k1_direct(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """k1 as a loss."""
    return k1(student_logits, teacher_logits, tokens)


def k2_direct(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """k2 as a loss."""
    return k2(student_logits, teacher_logits, tokens)


def k3_direct(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """k3 as a loss."""
    return k3(student_logits, teacher_logits, tokens)


def k1_as_cost(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """k1, held fixed, as the cost of a policy gradient."""
    return k1(student_logits, teacher_logits, tokens).detach() * drawn(student_logits, tokens)


def k2_as_cost(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """k2, held fixed, as the cost of a policy gradient."""
    return k2(student_logits, teacher_logits, tokens).detach() * drawn(student_logits, tokens)


def k3_as_cost(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """k3, held fixed, as the cost of a policy gradient."""
    return k3(student_logits, teacher_logits, tokens).detach() * drawn(student_logits, tokens)


# ---- a few tokens of the vocabulary -------------------------------------------------------------------------------


def top_k_logprobs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """[N, T, K] each: log p and log q of the teacher's most likely tokens."""
    logq, best = teacher_logits.log_softmax(-1).topk(K, dim=-1)
    return student_logits.log_softmax(-1).gather(-1, best), logq


def naive_top_k(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """sum of p log(p / q) over the teacher's top k, differentiated as it stands."""
    logp, logq = top_k_logprobs(student_logits, teacher_logits)
    return (logp.exp() * (logp - logq)).sum(-1)


def renormalised_top_k(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Reverse KL of both distributions rescaled to the teacher's top k."""
    logp, logq = (logs.log_softmax(-1) for logs in top_k_logprobs(student_logits, teacher_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


def top_k_as_advantage(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """The top-k reverse KL of a state, held fixed, as the cost of the token that was drawn there."""
    value = naive_top_k(student_logits, teacher_logits, tokens, mask, behaviour_logprobs)
    return value.detach() * drawn(student_logits, tokens)


def two_bucket(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Reverse KL over two classes, the drawn token and everything else, differentiated as it stands."""
    p, q = (drawn(logits, tokens).exp() for logits in (student_logits, teacher_logits))
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def two_bucket_without_tail(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """The same with the drawn token alone, rescaled to probability 1."""
    logp, logq = (drawn(logits, tokens)[..., None].log_softmax(-1) for logits in (student_logits, teacher_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


# ---- ours: one micro-batch through the kernel ------------------------------------------------------------------


def ours(
    shape: Shape, support: Support | str, student_logits: Tensor, teacher_logits: Tensor, tokens: Tensor, mask: Tensor,
    behaviour_logprobs: Tensor, importance: str = "none",
) -> Tensor:  # fmt: skip
    """The sum over unmasked tokens of one term of opd's objective.

    The kernel reads hidden states and a head; logits are both, with the identity as the head. A matrix product cannot
    carry infinities: -inf is put down as a very large negative number.
    """
    V = student_logits.shape[-1]
    head = Head(torch.eye(V, dtype=student_logits.dtype), V)
    hidden, teacher = (logits.clamp(min=-1e30).flatten(0, 1) for logits in (student_logits, teacher_logits))
    term = DivergenceTerm.model_validate(
        {"name": "audited", "shape": shape, "support": support, "importance": importance}
    )
    rows = TokenRows(token_T=tokens.flatten(), behaviour_T=behaviour_logprobs.flatten())
    weight = mask.flatten().to(student_logits.dtype)
    term_rows = TermRows(term=term, weight_T=weight, mix={"teacher": torch.ones_like(weight)}, unit=True)
    scorer = ScorerRows("teacher", torch.ones_like(mask).flatten(), 1.0, hidden_TD=teacher.detach(), head=head)
    loss, _ = tiled_loss(hidden, head, rows, [term_rows], [scorer], student_temperature=1.0, chunk_tokens=64)
    return loss


def ours_reverse_kl(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Reverse KL over the whole vocabulary."""
    return ours(ReverseKL(), "full", student_logits, teacher_logits, tokens, mask, behaviour_logprobs)


def ours_forward_kl(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Forward KL over the whole vocabulary."""
    return ours(ForwardKL(), "full", student_logits, teacher_logits, tokens, mask, behaviour_logprobs)


def ours_jsd(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """GKD's JSD with beta = 0.5 over the whole vocabulary."""
    return ours(JensenShannon(beta=0.5), "full", student_logits, teacher_logits, tokens, mask, behaviour_logprobs)


def ours_sampled(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Reverse KL from the drawn token, each weighed by the student now over the student then."""
    return ours(ReverseKL(), Sampled(), student_logits, teacher_logits, tokens, mask, behaviour_logprobs, "ratio")


def ours_sampled_forward(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Forward KL from the drawn token, h = r - 1, weighed alike."""
    return ours(ForwardKL(), Sampled(), student_logits, teacher_logits, tokens, mask, behaviour_logprobs, "ratio")


def ours_top_k(student_logits, teacher_logits, tokens, mask, behaviour_logprobs) -> Tensor:
    """Reverse KL over the teacher's top k and one class for the rest."""
    support = TopK(kind="teacher_top_k", k=K, tail="bucket")
    return ours(ReverseKL(), support, student_logits, teacher_logits, tokens, mask, behaviour_logprobs)


AUDITED = (
    k1_direct,
    k2_direct,
    k3_direct,
    k1_as_cost,
    k2_as_cost,
    k3_as_cost,
    naive_top_k,
    renormalised_top_k,
    top_k_as_advantage,
    two_bucket,
    two_bucket_without_tail,
    ours_reverse_kl,
    ours_forward_kl,
    ours_jsd,
    ours_sampled,
    ours_sampled_forward,
    ours_top_k,
)
