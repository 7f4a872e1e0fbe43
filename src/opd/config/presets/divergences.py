"""A divergence over the whole vocabulary, on answers of the student, the data or the teacher."""

from __future__ import annotations

from typing import Literal

from opd.config.behaviours import Behaviour, DatasetWrites, Mixture, Speculative, StudentWrites, TeacherWrites
from opd.config.behaviours import Share as Part
from opd.config.objective import DivergenceTerm
from opd.config.presets.registry import Count, Fraction, Preset, Share, method
from opd.config.shapes import ForwardKL, JensenShannon, ReverseKL, Shape, SkewForwardKL, SkewReverseKL

Divergence = Literal["jsd", "forward_kl", "reverse_kl"]


def shape_of(divergence: Divergence, beta: float, normalised: bool = False) -> Shape:
    """The shape that a parameter names; beta and normalised are the JSD's."""
    if divergence == "jsd":
        return JensenShannon(beta=beta, normalised=normalised)
    return ForwardKL() if divergence == "forward_kl" else ReverseKL()


def student_and_data(on_policy: float, *, per: Literal["prompt", "batch"]) -> Behaviour:
    """The student writes this share of the answers, the data has the others."""
    if on_policy in (0, 1):
        return StudentWrites() if on_policy else DatasetWrites()
    parts = (Part(writer=StudentWrites(), share=on_policy), Part(writer=DatasetWrites(), share=1 - on_policy))
    return Mixture(of=parts, per=per)


@method("Thinking Machines, On-Policy Distillation (2025), doi 10.64434/tml.20251026; here over the whole vocabulary")
def reverse_kl() -> Preset:
    """mean over student tokens of sum_v p_v log(p_v / q_v): the exact KL(student || teacher)"""
    return Preset(StudentWrites(), (DivergenceTerm(name="reverse_kl", shape=ReverseKL()),))


@method("Agarwal et al., GKD (ICLR 2024), arXiv 2306.13649, with lambda = 1")
def forward_kl() -> Preset:
    """mean over student tokens of sum_v q_v log(q_v / p_v): the exact KL(teacher || student)"""
    return Preset(StudentWrites(), (DivergenceTerm(name="forward_kl", shape=ForwardKL()),))


@method("Agarwal et al., GKD (ICLR 2024), arXiv 2306.13649, with lambda = 1")
def jsd(beta: Share = 0.5, normalised: bool = False) -> Preset:
    """mean over student tokens of beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p

    normalised divides it by beta (1 - beta), which is continuous to forward (0) and reverse KL (1).
    """
    return Preset(StudentWrites(), (DivergenceTerm(name="jsd", shape=JensenShannon(beta=beta, normalised=normalised)),))


@method("Agarwal et al., GKD (ICLR 2024), arXiv 2306.13649; defaults of TRL's GKD trainer", "experimental")
def gkd(
    on_policy: Fraction = 0.5, divergence: Divergence = "jsd", beta: Share = 0.5, normalised: bool = False
) -> Preset:
    """(1 - lambda) E_data[mean_t D(q || p)] + lambda E_student[mean_t D(q || p)], D = JSD_beta or a KL

    on_policy is lambda: the probability that a step's batch is written by the student. A row of the data has one
    answer, and the student writes sampling.samples_per_prompt: a batch of data is that much smaller.
    """
    term = DivergenceTerm(name="gkd", shape=shape_of(divergence, beta, normalised), reduction="sequence_mean")
    return Preset(student_and_data(on_policy, per="batch"), (term,))


@method("Ko et al., DistiLLM (ICML 2024)", "experimental")
def distillm(divergence: Literal["skl", "srkl"] = "srkl", alpha: Share = 0.1, on_policy: Fraction = 0.5) -> Preset:
    """skl: KL(q || alpha q + (1 - alpha) p); srkl: KL(p || (1 - alpha) q + alpha p); on student and data answers

    The paper raises the student's share while it trains and replays old answers; here the share is fixed.
    """
    shape = SkewForwardKL(alpha=alpha) if divergence == "skl" else SkewReverseKL(alpha=alpha)
    return Preset(student_and_data(on_policy, per="prompt"), (DivergenceTerm(name=divergence, shape=shape),))


@method("Ko et al., DistiLLM-2 (2025)", "experimental")
def distillm2(alpha: Share = 0.1, on_policy: Share = 0.5) -> Preset:
    """E_teacher[KL(q || alpha q + (1 - alpha) p)] + E_student[KL(p || (1 - alpha) q + alpha p)]

    The paper also lets alpha grow with how easy an answer is; here it is fixed.
    """
    parts = (Part(writer=StudentWrites(), share=on_policy), Part(writer=TeacherWrites(), share=1 - on_policy))
    terms = (
        DivergenceTerm(name="skl", shape=SkewForwardKL(alpha=alpha), written_by=("teacher",)),
        DivergenceTerm(name="srkl", shape=SkewReverseKL(alpha=alpha), written_by=("student",)),
    )
    return Preset(Mixture(of=parts), terms)


@method("Xu et al., Speculative Knowledge Distillation (ICLR 2025)", "experimental")
def skd(top_k: Count = 25, divergence: Divergence = "reverse_kl", beta: Share = 0.5) -> Preset:
    """D(q, p) on answers whose tokens the student proposes; those outside the teacher's top_k the teacher redraws

    The paper takes any divergence; the default here is ours.
    """
    term = DivergenceTerm(name="skd", shape=shape_of(divergence, beta))
    return Preset(Speculative(top_k=top_k), (term,))
