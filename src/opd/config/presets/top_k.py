"""KL over the likeliest entries of the vocabulary, and what becomes of the others."""

from __future__ import annotations

from opd.config.behaviours import StudentWrites
from opd.config.objective import DivergenceTerm
from opd.config.presets.registry import Count, Preset, Share, method
from opd.config.shapes import ReverseKL
from opd.config.slots import Tokens, TopK


@method("Revisiting On-Policy Distillation (2026), arXiv 2603.25562: local support matching")
def lsm(k: Count = 32, top_p: Share = 0.9) -> Preset:
    """KL(p^ || q^), both rescaled to the teacher's k likeliest entries, on answers drawn with top_p 0.9

    Special tokens are masked. Mass outside the k gets no gradient; the released command also trains the top 20 % of
    tokens by entropy alone, which the paper does not have.
    """
    term = DivergenceTerm(
        name="lsm",
        shape=ReverseKL(),
        support=TopK(kind="teacher_top_k", k=k, tail="renormalise"),
        tokens=Tokens(special="mask"),
    )
    return Preset(StudentWrites(), (term,), sampling={"top_p": top_p})


@method("Tail-Aware Top-k On-Policy Distillation (2026), arXiv 2608.14728", "experimental")
def ta_opd(k: Count = 32) -> Preset:
    """KL(p || q) over the teacher's k likeliest entries and one more class for the rest"""
    term = DivergenceTerm(name="ta_opd", shape=ReverseKL(), support=TopK(kind="teacher_top_k", k=k))
    return Preset(StudentWrites(), (term,))
