"""Policy gradients whose advantage is what the teacher says of the token that was drawn."""

from __future__ import annotations

from opd.config.behaviours import StudentWrites, TeacherMixed
from opd.config.objective import DivergenceTerm
from opd.config.presets.registry import Count, Fraction, NotNegative, Positive, Preset, Share, method
from opd.config.shapes import ForwardKL, ReverseKL, TotalVariation
from opd.config.slots import Credit, EntropyGate, PPOClip, Ratio, Sampled, Schedule, Tokens, TopK


@method("Thinking Machines, On-Policy Distillation (2025), doi 10.64434/tml.20251026, and its cookbook")
def tml(discount: Fraction = 0.0) -> Preset:
    """- (p / mu) a_t with a_t = log q(y_t) - log mu(y_t), mu the sampler: sampled KL(student || teacher)

    The cookbook sums over tokens; here it is their mean, so that lr does not change its meaning with the batch.
    """
    term = DivergenceTerm(
        name="tml",
        shape=ReverseKL(),
        support=Sampled(),
        credit=Credit(discount=discount),
        advantage_under="sampler",
        importance=Ratio(),
    )
    return Preset(StudentWrites(), (term,))


@method("Gu et al., MiniLLM (ICLR 2024), and its official code")
def minillm(alpha: Share = 0.2, discount: Fraction = 0.95) -> Preset:
    """KL(p || q) of every position, and - w_t R_{t+1} log p(y_t) with R the mean discounted log(q / p) of what follows;
    answers drawn from alpha q + (1 - alpha) p, w_t = p / mixture

    R leaves out the token's own log-ratio, as in the paper (its code has it in). The immediate part is not weighted by
    w_t: it is exact at the states that the mixture visited. The code's language-model loss is a data term of its own.
    """
    terms = (
        DivergenceTerm(name="now", shape=ReverseKL()),
        DivergenceTerm(
            name="later",
            shape=ReverseKL(),
            support=Sampled(),
            credit=Credit(discount=discount, now=False, length_norm=True),
            importance=Ratio(),
        ),
    )
    return Preset(TeacherMixed(alpha=alpha), terms)


@method("Entropy-Aware On-Policy Distillation (2026), arXiv 2603.07079", "experimental")
def eopd(above: NotNegative = 0.8, k: Count = 16) -> Preset:
    """sampled KL(p || q), and KL(q || p) over the teacher's k likeliest where its entropy is above 0.8 nats"""
    terms = (
        DivergenceTerm(name="reverse_kl", shape=ReverseKL(), support=Sampled(), importance=PPOClip()),
        DivergenceTerm(
            name="forward_kl",
            shape=ForwardKL(),
            support=TopK(kind="teacher_top_k", k=k),
            tokens=Tokens(where=EntropyGate(above=above)),
        ),
    )
    return Preset(StudentWrites(), terms)


@method("Importance-Weighted On-Policy Distillation (2026), arXiv 2606.22600", "experimental")
def iw_opd(gamma: Positive = 0.5) -> Preset:
    """- w_t log(q / p) log p(y_t), w_t = 1 + gamma (1 - share of the answer's |log(q / p)| that lies before t)"""
    term = DivergenceTerm(
        name="iw_opd", shape=ReverseKL(), support=Sampled(), tokens=Tokens(importance_of_prefix=gamma)
    )
    return Preset(StudentWrites(), (term,))


@method("Prefix on-policy distillation (2026), the first tokens of an answer, more from step to step", "experimental")
def prefix_opd() -> Preset:
    """- log(q / p) log p(y_t) on answers that end at sampling.horizon tokens, which grows over the steps"""
    term = DivergenceTerm(name="prefix_opd", shape=ReverseKL(), support=Sampled())
    return Preset(StudentWrites(), (term,), sampling={"horizon": Schedule(start=256, end=1024, steps=100)})


@method("BinaryOPD (2026), arXiv 2609.33791", "experimental")
def binary_opd() -> Preset:
    """- sign(log q / p) log p(y_t): twice the sampled total variation of student and teacher"""
    term = DivergenceTerm(name="binary_opd", coefficient=2.0, shape=TotalVariation(), support=Sampled())
    return Preset(StudentWrites(), (term,))
