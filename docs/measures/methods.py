"""The named methods as points of the algebra, read off the presets themselves."""

from __future__ import annotations

from collections.abc import Mapping

from opd.config.alignments import ALM, Alignment, Gold, Span
from opd.config.behaviours import Behaviour, Cached, Mixture, Speculative, TeacherMixed, TeacherWrites
from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm, Term
from opd.config.presets import METHODS, Method, Preset, expand
from opd.config.schema import Scorer
from opd.config.shapes import (
    ClippedKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Shape,
    SkewForwardKL,
    SkewReverseKL,
    TanhKL,
    TotalVariation,
    VerifierGatedKL,
)
from opd.config.slots import (
    TIS,
    Credit,
    Full,
    IcePop,
    Importance,
    NoImportance,
    PPOClip,
    Sampled,
    Schedule,
    Support,
    Tokens,
)
from opd.config.targets import Delta, Extrapolated, Product, Routed, Single, Target

NOTHING = "–"


def points() -> str:
    """A row for every term of every method, with the parameters' defaults (or the example's, where there are none)."""
    rows = [
        "| method | writer | target | shape | support, tail | credit | weights, tokens, mean | status |",
        "|---" * 8 + "|",
    ]
    for method in METHODS.values():
        preset = expand(method.name, method.example)
        for i, term in enumerate(preset.terms):
            first = i == 0
            cells = (
                f"`{method.name}`" if first else "",
                _writer(preset.behaviour, preset.scorers) if first else "",
                *_slots(term, preset),
                (method.status if first else ""),
            )
            rows.append("| " + " | ".join(cell.replace("|", "‖") for cell in cells) + " |")
    return "\n".join(rows)


def sources() -> str:
    rows = ["| method | what is minimised | source |", "|---|---|---|"]
    for method in METHODS.values():
        formula = method.formula.replace("||", "‖").replace("|", "\\|").replace("*", "\\*")
        rows.append(f"| `{method.name}`{_parameters(method)} | {formula} | {method.source} |")
    return "\n".join(rows)


def counts() -> str:
    vetted = sum(m.status == "vetted" for m in METHODS.values())
    return f"{len(METHODS)} methods, {vetted} vetted and {len(METHODS) - vetted} experimental."


def _parameters(method: Method) -> str:
    names = ", ".join(method.parameters.model_fields)
    return f"<br>({names})" if names else ""


# ---- who writes --------------------------------------------------------------------------------------------------


def _writer(behaviour: Behaviour, scorers: Mapping[str, Scorer]) -> str:
    if isinstance(behaviour, Mixture):
        parts = ", ".join(f"{100 * part.share:g} % {_writer(part.writer, scorers)}" for part in behaviour.of)
        return parts + (" (by batch)" if behaviour.per == "batch" else "")
    match behaviour:
        case TeacherWrites():
            return "teacher" if behaviour.scorer not in scorers else _scorer(behaviour.scorer, scorers)
        case TeacherMixed():
            return f"{behaviour.alpha:g} q + {1 - behaviour.alpha:g} p"
        case Speculative():
            return f"student; teacher outside its top {behaviour.top_k}"
        case Cached():
            return "an earlier run"
    return {"dataset": "data"}.get(behaviour.kind, behaviour.kind)


# ---- a term's slots ----------------------------------------------------------------------------------------------


def _slots(term: Term, preset: Preset) -> tuple[str, str, str, str, str]:
    size = f"{_number(term.coefficient)} × " if term.coefficient != 1 else ""
    importance = NoImportance() if isinstance(term, DataTerm) else term.importance
    weights = _weights(importance, term, preset.sampling)
    match term:
        case DataTerm():
            return NOTHING, f"{size}cross-entropy", "drawn token", NOTHING, weights
        case OutcomeTerm():
            return NOTHING, f"{size}{term.advantage} advantage of the reward", "drawn token", "whole answer", weights
    assert isinstance(term, DivergenceTerm)
    target = _target(term.target, preset.scorers)
    support = _support(term.support) + _alignment(term.alignment)
    return target, size + _shape(term.shape), support, _credit(term.credit), weights


def _number(value: float | Schedule) -> str:
    if isinstance(value, Schedule):
        return f"({value.start:g} to {value.end:g} over {value.steps} steps)"
    return f"{value:g}"


def _target(target: Target, scorers: Mapping[str, Scorer]) -> str:
    match target:
        case Single():
            return _scorer(target.scorer, scorers)
        case Routed():
            return f"the teacher that {target.by} names"
        case Product():
            return "product of m_k^w_k"
        case Extrapolated():
            scale = target.scale
            reference = target.reference if isinstance(target.reference, str) else "reference"
            said = "q^lambda m^(1 - lambda)" if isinstance(scale, Mapping) else f"q^{scale:g} m^{1 - scale:g}"
            return f"{said}, m {_scorer(reference, scorers)}"
        case Delta():
            return f"m (q / q_weak)^{1 / target.alpha:g}, m {_scorer(target.base, scorers)}"
    return f"q p^{_number(target.share)}"


def _scorer(name: str, scorers: Mapping[str, Scorer]) -> str:
    """A scorer by name, or what the preset makes it of."""
    if name not in scorers or scorers[name].weights == "model":
        return "q" if name == "teacher" else f"the scorer `{name}`"
    scorer = scorers[name]
    who = {
        "initial": "the student before training",
        "ema": f"the student's moving average ({scorer.ema_rate:g})",
        "student": "the student as it is",
        "past": "an earlier student",
        "adapter_off": "the student without its adapter",
    }[scorer.weights]
    more = ", told more" if scorer.context != type(scorer.context)() else ""
    return who + more + (f", temperature {scorer.temperature:g}" if scorer.temperature is not None else "")


def _shape(shape: Shape) -> str:
    match shape:
        case ReverseKL():
            return "reverse KL"
        case ForwardKL():
            return "forward KL"
        case JensenShannon():
            return f"JSD({shape.beta:g})" + (", normalised" if shape.normalised else "")
        case SkewForwardKL():
            return f"skew forward KL({shape.alpha:g})"
        case SkewReverseKL():
            return f"skew reverse KL({shape.alpha:g})"
        case TotalVariation():
            return "total variation"
        case ClippedKL():
            return f"log r in [{shape.low}, {shape.high}]"
        case TanhKL():
            return f"tanh({shape.scale:g})"
        case VerifierGatedKL():
            return "reverse KL, one side by verdict"


def _support(support: Support) -> str:
    match support:
        case Full():
            return "whole vocabulary"
        case Sampled():
            return "drawn token"
    kind = {
        "student_top_k": "student's top",
        "teacher_top_k": "teacher's top",
        "union": "either's top",
        "intersection": "both's top",
    }
    return f"{kind[support.kind]} {support.k}, {support.tail.replace('_', ' ')}"


def _alignment(alignment: Alignment) -> str:
    match alignment:
        case Span():
            return ", of spans"
        case Gold():
            by = "all by rank" if alignment.sort == "all" else "what is not shared by rank"
            return f", at the ends of spans, {by}"
        case ALM():
            return f", of spans, root {alignment.tau:g}"
    return ""


def _credit(credit: Credit) -> str:
    when = "now and later" if credit.now else "later"
    said = f"{when}, discount {credit.discount:g}" if credit.discount else "now"
    said += ", over the tokens left" if credit.length_norm else ""
    return said + (", exact baseline" if credit.baseline == "exact" else "")


def _weights(importance: Importance, term: Term, sampling: Mapping[str, object]) -> str:
    parts = []
    match importance:
        case TIS():
            parts.append(f"min(p / mu, {importance.cap:g})")
        case IcePop():
            parts.append(f"p / mu in [{importance.low:g}, {importance.high:g}], else 0")
        case PPOClip():
            parts.append(f"PPO clip [{1 - importance.low:g}, {1 + importance.high:g}]")
        case NoImportance():
            pass
        case _:
            parts.append("p / mu")
    if isinstance(term, DivergenceTerm) and term.advantage_under == "sampler":
        parts.append("log-ratio to mu")
    parts += _tokens(term.tokens)
    if term.written_by:
        parts.append(f"answers of {' and '.join(term.written_by)}")
    if term.reduction != "token_mean":
        parts.append(term.reduction.replace("_", " "))
    parts += [f"{key} {_number(value) if isinstance(value, Schedule) else value}" for key, value in sampling.items()]
    return ", ".join(parts) or NOTHING


def _tokens(tokens: Tokens) -> list[str]:
    parts = []
    if tokens.special == "mask":
        parts.append("no special tokens")
    if tokens.truncated == "mask":
        parts.append("no cut answers")
    if tokens.skip_first:
        parts.append(f"without the first {tokens.skip_first}")
    if tokens.first is not None:
        parts.append(f"first {tokens.first} alone")
    if (gate := tokens.where) is not None:
        bound = f"above {gate.above:g}" if gate.above is not None else f"below {gate.below:g}"
        parts.append(f"where the entropy of {gate.of} is {bound} nats")
    if tokens.select is not None:
        parts.append(f"top {100 * tokens.select.share:g} % by {tokens.select.by}")
    if tokens.importance_of_prefix:
        parts.append(f"prefix weight, gamma {tokens.importance_of_prefix:g}")
    return parts
