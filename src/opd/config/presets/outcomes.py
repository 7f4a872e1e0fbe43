"""Rewards of whole answers, alone or beside a teacher. All of them need `rewards`."""

from __future__ import annotations

from opd.config.behaviours import StudentWrites
from opd.config.objective import DivergenceTerm, OutcomeTerm
from opd.config.presets.divergences import Divergence, shape_of
from opd.config.presets.registry import NotNegative, Positive, Preset, Share, method
from opd.config.schema import Scorer
from opd.config.shapes import ReverseKL, VerifierGatedKL
from opd.config.slots import Number, PPOClip, Sampled, Schedule
from opd.config.targets import Single

ANNEALED = Schedule(start=1.0, end=0.1, steps=100)


@method("Shao et al., DeepSeekMath (2024), arXiv 2402.03300: GRPO")
def grpo(clip: Share = 0.2, kl: NotNegative = 0.0) -> Preset:
    """- min(r A, clip(r, 0.8, 1.2) A), r = p / mu, A = (reward - mean) / deviation among the answers to one prompt

    kl adds kl x KL(p || student before training), exactly. The paper takes each answer's mean over its own tokens
    first, which favours short right and long wrong answers; here it is the mean over all tokens.
    """
    terms = [OutcomeTerm(name="grpo", importance=PPOClip(low=clip, high=clip))]
    if not kl:
        return Preset(StudentWrites(), tuple(terms))
    anchor = DivergenceTerm(name="anchor", coefficient=kl, target=Single(scorer="reference"), shape=ReverseKL())
    return Preset(StudentWrites(), (*terms, anchor), {"reference": Scorer(weights="initial")})


@method("Agarwal et al., GKD (ICLR 2024), arXiv 2306.13649, with RL", "experimental")
def gkd_rl(alpha: Share = 0.5, divergence: Divergence = "reverse_kl", beta: Share = 0.9) -> Preset:
    """- (1 - alpha) E[reward] + alpha E_student[mean_t D(q || p)], D = KL(p || q) or JSD_0.9

    alpha is a choice for every task in the paper; the default is ours.
    """
    terms = (
        OutcomeTerm(name="outcome", coefficient=1 - alpha, advantage="plain"),
        DivergenceTerm(name="gkd", coefficient=alpha, shape=shape_of(divergence, beta), reduction="sequence_mean"),
    )
    return Preset(StudentWrites(), terms)


@method("KDRL (2025)", "experimental")
def kdrl(beta: Number = ANNEALED, clip: Share = 0.2) -> Preset:
    """GRPO + beta k2, k2 = (log p / q)^2 / 2, whose gradient on the student's own tokens is that of KL(p || q)

    beta is annealed; the numbers of the schedule are ours.
    """
    terms = (
        OutcomeTerm(name="grpo", importance=PPOClip(low=clip, high=clip)),
        DivergenceTerm(name="k2", coefficient=beta, shape=ReverseKL(), support=Sampled(), importance=PPOClip()),
    )
    return Preset(StudentWrites(), terms)


@method("OPDVR (2026), arXiv 2608.24696", "experimental")
def opdvr(right_from: Positive = 0.5) -> Preset:
    """- R max(R log(q / p), 0) log p(y_t), R = 1 for right and -1 for wrong answers"""
    term = DivergenceTerm(name="opdvr", shape=VerifierGatedKL(right_from=right_from), support=Sampled())
    return Preset(StudentWrites(), (term,))
