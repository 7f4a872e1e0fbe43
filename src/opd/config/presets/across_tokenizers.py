"""Teachers with another tokenizer than the student's: `docs/across_tokenizers.md` says how their tokens are joined.

With a teacher of the student's own tokenizer every token is a span of its own, and all vocabulary is shared.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opd.config.alignments import ALM, Gold, Span
from opd.config.behaviours import StudentWrites
from opd.config.objective import DivergenceTerm
from opd.config.presets.divergences import Divergence, shape_of
from opd.config.presets.registry import Count, Fraction, Preset, Share, method
from opd.config.shapes import ReverseKL
from opd.config.slots import Sampled, TopK

Root = Annotated[float, Field(ge=1)]


@method("A comparison of cross-tokenizer on-policy distillation (2026), arXiv 2610.08448", "experimental")
def shared_top_k(k: Count = 16) -> Preset:
    """KL(p || q) over those of the student's k likeliest entries that both vocabularies have, and the rest as one more
    class, at the tokens that both texts have in common

    The comparison was read at second hand; a bucket for the rest is our choice.
    """
    support = TopK(kind="student_top_k", k=k)
    return Preset(StudentWrites(), (DivergenceTerm(name="shared_top_k", shape=ReverseKL(), support=support),))


@method("the chain rule: log-probabilities of a span's tokens add up; checked by enumeration")
def span() -> Preset:
    """- a_s sum of log p(y_t) over the tokens of span s, a_s = log q(s) - log p(s): sampled KL(p || q) of spans"""
    term = DivergenceTerm(name="span", shape=ReverseKL(), support=Sampled(), alignment=Span())
    return Preset(StudentWrites(), (term,))


@method("GOLD (Hugging Face, 2025) and its official code, TRL's GOLD trainer; there in another form by default")
def gold(
    divergence: Divergence = "jsd",
    beta: Share = 0.5,
    matched_weight: Fraction | None = None,
    match: Literal["text", "token"] = "text",
) -> Preset:
    """w D(q, p) over the shared vocabulary + (1 - w) sum |sort(p) - sort(q)| over the rest, p and q the distributions
    at the end of a span, each times the probability of the span's tokens before it

    w is matched_weight, or the share of the teacher's vocabulary that the student has, as in the code. The merged form
    is the correct, shifted one: every probability is that of the position that predicts the token, and end tokens are
    trained. In spans of several tokens the text that was written is all that both sides share; with match: token equal
    vocabulary is compared there too, as in the code, although it is different text. The code's default (observed) takes
    each probability one position late and leaves ends out; it also mixes answers of the data in, where here the student
    writes all of them.
    """
    alignment = Gold(matched_weight=matched_weight, match=match)
    return Preset(
        StudentWrites(), (DivergenceTerm(name="gold", shape=shape_of(divergence, beta), alignment=alignment),)
    )


@method("Boizard et al., Universal Logit Distillation (2024), arXiv 2402.12030", "experimental")
def uld() -> Preset:
    """sum |sort(p) - sort(q)| over whole vocabularies, p and q the distributions at the end of a span, each times the
    probability of the span's tokens before it

    The paper joins positions by their number and cuts the longer text; here they are joined by the text. It adds
    cross-entropy on the data, which is a term of its own.
    """
    return Preset(StudentWrites(), (DivergenceTerm(name="uld", alignment=Gold(sort="all")),))


@method("Minixhofer et al., Approximate Likelihood Matching (2025), arXiv 2503.20083", "experimental")
def alm(divergence: Divergence = "forward_kl", beta: Share = 0.5, tau: Root = 100.0) -> Preset:
    """D between (b, 1 - b) and (a, 1 - a) of every span, b = q(span)^(1 / tau) and a = p(span)^(1 / tau)

    A loss on the text as it was written, by whomever. The paper chooses spans in which its tokenizers are unbiased;
    here a span is the least that both have.
    """
    term = DivergenceTerm(name="alm", shape=shape_of(divergence, beta), support=Sampled(), alignment=ALM(tau=tau))
    return Preset(StudentWrites(), (term,))
