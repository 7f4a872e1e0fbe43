"""The student as its own teacher: it reads more than it will see, or only sharper."""

from __future__ import annotations

from opd.config.behaviours import StudentWrites
from opd.config.objective import DivergenceTerm
from opd.config.presets.registry import Count, Preset, Share, method
from opd.config.schema import Context, Scorer
from opd.config.shapes import ForwardKL, JensenShannon, ReverseKL
from opd.config.slots import Tokens, TopK

_SOLUTION = "{{prompt}}\n\nA correct solution:\n\n{{{column}}}\n\nNow answer in your own words."
_FEEDBACK = "{{prompt}}\n\nFeedback on an earlier answer:\n\n{{{column}}}\n\nAnswer again from the start."


@method("Self-Distilled Reasoner: OPSD (2026), arXiv 2601.18734, and its official code")
def opsd(beta: Share = 0.5, column: str = "solution") -> Preset:
    """JSD_0.5(q, p) over the whole vocabulary, q the student before training with the solution in its prompt

    column holds the solution. The code also clips every vocabulary entry's part of the divergence, which this does not.
    """
    term = DivergenceTerm(name="opsd", shape=JensenShannon(beta=beta, normalised=False))
    teacher = Scorer(weights="initial", context=Context(template=_SOLUTION.format(column=column)))
    return Preset(StudentWrites(), (term,), {"teacher": teacher})


@method("Self-Distillation Fine-Tuning: SDFT (2026), and its official code")
def sdft(k: Count = 20, ema_rate: Share = 0.01, column: str = "answer", skip_first: int = 0) -> Preset:
    """KL(q || p) over the teacher's 20 likeliest entries and the rest, q the student's moving average with the golden
    answer in its prompt

    column holds the answer. Two codes rescale to the 20 instead of keeping the rest; one skips the first 3 tokens.
    """
    term = DivergenceTerm(
        name="sdft",
        shape=ForwardKL(),
        support=TopK(kind="teacher_top_k", k=k),
        tokens=Tokens(skip_first=skip_first),
    )
    context = Context(template=_SOLUTION.format(column=column))
    return Preset(StudentWrites(), (term,), {"teacher": Scorer(weights="ema", ema_rate=ema_rate, context=context)})


@method("SDPO (2026), and its official code")
def sdpo(beta: Share = 0.5, k: Count = 100, ema_rate: Share = 0.05, column: str = "feedback") -> Preset:
    """JSD_0.5(q, p) over the student's 100 likeliest entries and the rest, q its moving average with feedback in its
    prompt

    column holds the feedback; the paper also takes a right answer among those to the same prompt. Its ratio to the
    sampler, capped at 2, is 1 on fresh answers and left out here.
    """
    term = DivergenceTerm(
        name="sdpo",
        shape=JensenShannon(beta=beta, normalised=False),
        support=TopK(kind="student_top_k", k=k),
    )
    context = Context(template=_FEEDBACK.format(column=column))
    return Preset(StudentWrites(), (term,), {"teacher": Scorer(weights="ema", ema_rate=ema_rate, context=context)})


@method(
    "a control, after Does On-Policy Distillation Really Distill? (2026), arXiv 2608.31046 (abstract read)",
    "experimental",
)
def no_teacher(temperature: Share = 0.7) -> Preset:
    """KL(p || p_0^(1 / temperature) / Z), p_0 the student before training: it gets sharper, and learns from nobody

    The paper finds that pushing down the student's unlikely tokens, with one fixed negative advantage, does what the
    teacher's advantages do; its own method weights by entropy. This has the same control in the form of a divergence,
    with a stated optimum; temperature is ours. A distillation that does not beat it has not shown what it distilled.
    """
    teacher = Scorer(weights="initial", temperature=temperature)
    return Preset(StudentWrites(), (DivergenceTerm(name="no_teacher", shape=ReverseKL()),), {"teacher": teacher})
