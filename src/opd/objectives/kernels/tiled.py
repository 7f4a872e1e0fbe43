"""From hidden states to loss and gradients, a tile of tokens at a time: the logits of a whole batch never exist.

One pass serves every term of the objective. Per tile of C tokens the student's and the scorers' logits are made once,
the gradient with respect to the student's logits is written down in closed form, and carried at once into the hidden
states and the head:

    full support       d loss / d z_v = -w p_v (h(r_v) - E_p[h])
    sampled token y    d loss / d z_v = -w s (1[v = y] - p_v),    s = advantage x importance ratio, held fixed
    data token y       the same with s = 1 (cross-entropy)

Everything that is not a matrix product is float32, as is the sum of the head's gradient (float64 for float64 models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opd.config.objective import Term
from opd.objectives.head import head_logits
from opd.objectives.shapes import REVERSE_KL, maths
from opd.types import Head, ScorerRows


@dataclass(frozen=True)
class TokenRows:
    """The response tokens of one micro-batch, flattened to [T].

    token_T          int64; the tokens that were drawn.
    behaviour_T      float32; their log-probability under the sampler, NaN where there is none.
    weights          term name to float32 [T]; 0 leaves a token out, whatever its values are.
    """

    token_T: Tensor
    behaviour_T: Tensor
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class TokenValues:
    """Per-token facts of the pass, float32 [T], all detached.

    terms           term name to the value of its divergence (full) or its estimate (sampled), unweighted.
    logprob_T       the student's log-probability of the drawn token.
    entropy_T       of the student's distribution.
    reverse_kl_T    KL(student || teacher) in full, or log p - log q of the drawn token; None without a teacher.
    teacher_T       the teacher's log-probability of the drawn token; None without a teacher.
    """

    terms: dict[str, Tensor]
    logprob_T: Tensor
    entropy_T: Tensor
    reverse_kl_T: Tensor | None
    teacher_T: Tensor | None


def tiled_loss(
    hidden_TD: Tensor,
    head: Head,
    rows: TokenRows,
    terms: Sequence[Term],
    *,
    scorer: ScorerRows | None,
    student_temperature: float,
    chunk_tokens: int,
) -> tuple[Tensor, TokenValues]:
    """The weighted sum of all terms over these tokens (scalar, differentiable in `hidden_TD` and the head).

    hidden_TD   [T, D] student states that predict `rows.token_T`, in the compute dtype.
    scorer      the teacher's rows; needed by terms with target "teacher". Full-support terms need its hidden states.
    """
    bias_V = head.bias_V
    values: list[TokenValues] = []
    loss = _TiledLoss.apply(
        hidden_TD, head.weight_VD, bias_V, head, rows, tuple(terms), scorer, student_temperature, chunk_tokens, values
    )
    return loss, values[0]


class _TiledLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, while a tile's logits are alive, and only scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        rows: TokenRows,
        terms: tuple[Term, ...],
        scorer: ScorerRows | None,
        student_temperature: float,
        chunk_tokens: int,
        values: list[TokenValues],
    ) -> Tensor:
        V = head.vocab_size
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight = weight_VD.detach()[:V].to(hidden_TD.dtype)
        frozen_head = Head(weight, V, None if bias_V is None else bias_V.detach(), head.scale, head.softcap)
        wide = {"dtype": torch.promote_types(hidden_TD.dtype, torch.float32), "device": hidden_TD.device}
        dhidden_TD = torch.zeros_like(hidden_TD) if needs_hidden else None
        dweight_VD = torch.zeros(weight_VD.shape, **wide) if needs_weight else None
        dbias_V = torch.zeros(weight_VD.shape[0], **wide) if needs_bias else None
        total = torch.zeros((), **wide)
        pieces: list[TokenValues] = []
        for start in range(0, hidden_TD.shape[0], chunk_tokens):
            tile = slice(start, start + chunk_tokens)
            hidden_CD = hidden_TD.detach()[tile]
            logits_CV = head_logits(hidden_CD, frozen_head)
            capped_CV = None if head.softcap is None else logits_CV / head.softcap
            logp_CV = torch.log_softmax(logits_CV / student_temperature, dim=-1)
            del logits_CV  # a tile is the largest thing alive (0.3 GB at C = 512, V = 152k): none is kept unread
            piece_loss, dlogits_CV, piece = _tile(logp_CV, tile, rows, terms, scorer, student_temperature)
            total += piece_loss
            pieces.append(piece)
            if capped_CV is not None:
                dlogits_CV *= 1.0 - capped_CV.square()
            if head.scale != 1.0:
                dlogits_CV *= head.scale
            dlogits_cast_CV = dlogits_CV.to(weight.dtype)
            if dhidden_TD is not None:
                dhidden_TD[tile] = dlogits_cast_CV @ weight
            if dweight_VD is not None:
                dweight_VD[:V] += dlogits_cast_CV.T @ hidden_CD
            if dbias_V is not None:
                dbias_V[:V] += dlogits_CV.sum(0)
            del logp_CV, dlogits_CV, dlogits_cast_CV, capped_CV
        ctx.gradients = (dhidden_TD, dweight_VD, dbias_V)
        values.append(_joined(pieces))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        (scale,) = outputs
        assert ctx.gradients is not None, "these gradients are made once; a second backward needs a second forward"
        gradients = [None if g is None else g.mul_(scale) for g in ctx.gradients]  # ours alone: no second [V, D]
        ctx.gradients = None
        return (*gradients, *[None] * 7)


def _tile(
    logp_CV: Tensor,
    tile: slice,
    rows: TokenRows,
    terms: tuple[Term, ...],
    scorer: ScorerRows | None,
    student_temperature: float,
) -> tuple[Tensor, Tensor, TokenValues]:
    """Loss, gradient with respect to the logits (before scale and cap), and per-token facts of one tile."""
    p_CV = logp_CV.exp()
    token_C = rows.token_T[tile, None]
    logp_C = logp_CV.gather(1, token_C)[:, 0]
    logq_CV, logq_C = _scorer_tile(scorer, tile, token_C)
    dlogits_CV = torch.zeros_like(logp_CV)
    loss = logp_CV.new_zeros(())
    if logq_CV is not None:
        reverse_kl_C = REVERSE_KL.f_mass(logp_CV, logq_CV).sum(-1)
    else:
        reverse_kl_C = None if logq_C is None else logp_C - logq_C
    term_values: dict[str, Tensor] = {}
    for term in terms:
        weight_C = rows.weights[term.name][tile]
        kept_C = weight_C != 0
        if term.target == "teacher" and term.support == "full":
            assert logq_CV is not None, "a full-support term needs the teacher's distribution"
            shape = maths(term.shape)
            value_C = reverse_kl_C if shape is REVERSE_KL else shape.f_mass(logp_CV, logq_CV).sum(-1)
            assert value_C is not None
            field_CV = shape.h_mass(logp_CV, logq_CV)
            field_CV.addcmul_(p_CV, field_CV.sum(-1, keepdim=True), value=-1.0)
            # A masked token may hold NaN: choose, never multiply by zero.
            dlogits_CV -= field_CV.mul_(weight_C[:, None]).masked_fill_(~kept_C[:, None], 0.0)
            del field_CV
            loss = loss + torch.where(kept_C, weight_C * value_C, 0.0).sum()
        else:
            strength_C, value_C = _sampled(term, logp_C, logq_C, rows.behaviour_T[tile])
            pull_C = torch.where(kept_C, weight_C * strength_C, 0.0).to(p_CV.dtype)
            dlogits_CV.addcmul_(p_CV, pull_C[:, None])
            dlogits_CV.scatter_add_(1, token_C, -pull_C[:, None])
            loss = loss + torch.where(kept_C, weight_C * value_C, 0.0).sum()
        term_values[term.name] = value_C
    dlogits_CV /= student_temperature
    return loss, dlogits_CV, TokenValues(term_values, logp_C, -(p_CV * logp_CV).sum(-1), reverse_kl_C, logq_C)


def _scorer_tile(scorer: ScorerRows | None, tile: slice, token_C: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The scorer's log-probabilities of the tile: over the vocabulary where it can, and at the drawn tokens."""
    if scorer is None:
        return None, None
    if scorer.hidden_TD is None or scorer.head is None:
        assert scorer.logprobs_T is not None
        return None, scorer.logprobs_T[tile]
    with torch.no_grad():
        logits_CV = head_logits(scorer.hidden_TD[tile], scorer.head).div_(scorer.temperature)
        logq_CV = torch.log_softmax(logits_CV, dim=-1)
    return logq_CV, logq_CV.gather(1, token_C)[:, 0]


def _sampled(term: Term, logp_C: Tensor, logq_C: Tensor | None, behaviour_C: Tensor) -> tuple[Tensor, Tensor]:
    """Strength s of the pull towards the drawn token, and the value that is reported for the term."""
    if term.target == "data":
        return torch.ones_like(logp_C), -logp_C
    assert logq_C is not None, "a teacher term needs the teacher's log-probabilities"
    advantage_C = maths(term.shape).h(behaviour_C if term.advantage_under == "sampler" else logp_C, logq_C)
    ratio_C = torch.exp(logp_C - behaviour_C) if term.importance == "ratio" else torch.ones_like(logp_C)
    strength_C = advantage_C * ratio_C
    return strength_C, -strength_C


def _joined(pieces: list[TokenValues]) -> TokenValues:
    reverse_kl = [p.reverse_kl_T for p in pieces if p.reverse_kl_T is not None]
    teacher = [p.teacher_T for p in pieces if p.teacher_T is not None]
    return TokenValues(
        terms={name: torch.cat([p.terms[name] for p in pieces]) for name in pieces[0].terms},
        logprob_T=torch.cat([p.logprob_T for p in pieces]),
        entropy_T=torch.cat([p.entropy_T for p in pieces]),
        reverse_kl_T=torch.cat(reverse_kl) if reverse_kl else None,
        teacher_T=torch.cat(teacher) if teacher else None,
    )
