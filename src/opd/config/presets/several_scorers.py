"""Targets that are made of more than one model: routed, multiplied, extrapolated."""

from __future__ import annotations

from collections.abc import Mapping

from opd.config.behaviours import StudentWrites
from opd.config.objective import DivergenceTerm, OutcomeTerm, Reduction
from opd.config.presets.registry import Fraction, NotNegative, Positive, Preset, method
from opd.config.schema import Scorer
from opd.config.shapes import ReverseKL
from opd.config.slots import TIS, Credit, IcePop, Sampled
from opd.config.targets import Delta, Extrapolated, Product, Routed, Single

ROUTES = {"math": "math_teacher", "code": "code_teacher"}


@method(
    "MiMo-V2-Flash technical report (2025): MOPD; its clip and its alpha are not published", example={"routes": ROUTES}
)
def mopd(
    routes: Mapping[str, str],
    by: str = "domain",
    alpha: NotNegative = 0.0,
    low: NotNegative = 0.5,
    high: Positive = 2.0,
    reduction: Reduction = "token_mean",
) -> Preset:
    """- w_t (log q_route(x) - log p + alpha A) log p(y_t), w_t = p / mu where it lies in [low, high], else 0

    A is the group advantage of the answer's reward. low and high are GLM-5's. The report writes the mean over each
    answer's own length, which is reduction: sequence_mean, and biased for drawn tokens.
    """
    weights = IcePop(low=low, high=high)
    target = Routed(by=by, routes=routes)
    distil = DivergenceTerm(
        name="mopd", target=target, shape=ReverseKL(), support=Sampled(), importance=weights, reduction=reduction
    )
    outcome = OutcomeTerm(name="outcome", coefficient=alpha, importance=weights, reduction=reduction)
    return Preset(StudentWrites(), (distil, outcome) if alpha else (distil,))


@method("DeepSeek-V4 technical report (2026)", "experimental", {"weights": {"math_teacher": 0.5, "code_teacher": 0.5}})
def deepseek_v4(weights: Mapping[str, float]) -> Preset:
    """sum_k w_k KL(p || m_k) over the whole vocabulary: KL(p || prod_k m_k^w_k / Z) up to a constant"""
    return Preset(StudentWrites(), (DivergenceTerm(name="deepseek_v4", target=Product(weights=weights)),))


def _extrapolated(
    name: str,
    scale: float,
    routes: Mapping[str, str] | None,
    reference: str | Mapping[str, str],
    cap: float,
    discount: float,
) -> tuple[DivergenceTerm, ...]:
    teacher = Routed(routes=routes) if routes else Single()
    target = teacher if scale == 1 else Extrapolated(teacher=teacher, reference=reference, scale=scale)
    return (
        DivergenceTerm(
            name=name,
            target=target,
            shape=ReverseKL(),
            support=Sampled(),
            credit=Credit(discount=discount),
            importance=TIS(cap=cap),
        ),
    )


def _reference(scale: float) -> dict[str, Scorer]:
    return {} if scale == 1 else {"reference": Scorer(weights="initial")}


@method("G-OPD (2026), arXiv 2602.12125, and its official code", example={"scale": 0.5})
def gopd(scale: float, routes: Mapping[str, str] | None = None, cap: float = 5.0, discount: Fraction = 0.0) -> Preset:
    """- w_t (scale log q + (1 - scale) log m - log p) log p(y_t), m the student before training, w_t = min(p / mu, 5)

    With scale 1 it is on-policy distillation, and no reference is read.
    """
    terms = _extrapolated("gopd", scale, routes, "reference", cap, discount)
    return Preset(StudentWrites(), terms, _reference(scale))


@method("ExOPD: G-OPD (2026), arXiv 2602.12125, with scale 1.25")
def exopd(
    scale: float = 1.25, routes: Mapping[str, str] | None = None, cap: float = 5.0, discount: Fraction = 0.0
) -> Preset:
    """- w_t (1.25 log q - 0.25 log m - log p) log p(y_t), m the student before training: beyond the teacher"""
    terms = _extrapolated("exopd", scale, routes, "reference", cap, discount)
    return Preset(StudentWrites(), terms, _reference(scale))


@method("ExOPD with reward correction: G-OPD (2026), arXiv 2602.12125, strong to weak")
def exopd_corrected(
    scale: float = 1.25,
    routes: Mapping[str, str] | None = None,
    reference: str | Mapping[str, str] = "reference",
    cap: float = 5.0,
    discount: Fraction = 0.0,
) -> Preset:
    """- w_t (1.25 log q - 0.25 log m - log p) log p(y_t), m the model that the teacher was before its RL

    reference is a scorer, or one for every teacher: {math_teacher: math_base, code_teacher: code_base}.
    """
    return Preset(StudentWrites(), _extrapolated("exopd_corrected", scale, routes, reference, cap, discount))


@method("CompassOPD (2026), arXiv 2609.10154; here for one tokenizer")
def compass(alpha: Positive = 1.0) -> Preset:
    """- ((log q - log q_weak) - alpha (log p - log m)) log p(y_t), q_weak a weak model of the teacher's family, m the
    student before training
    """
    term = DivergenceTerm(
        name="compass", coefficient=alpha, target=Delta(alpha=alpha), shape=ReverseKL(), support=Sampled()
    )
    return Preset(StudentWrites(), (term,), {"reference": Scorer(weights="initial")})
