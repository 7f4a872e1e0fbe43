"""An objective, and who scores in it, in words, from a resolved config as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.config.shapes import FORMULAS

_WEIGHTS = {
    "student": "the student as it is",
    "initial": "the student before training",
    "ema": "the student's moving average",
    "past": "an earlier student",
    "adapter_off": "the student with its adapter off",
}


_PLAIN = {"kind": "single", "scorer": "teacher"}


def scorers(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Every scorer by name, `teacher` first."""
    teacher = {"teacher": config["teacher"]} if config.get("teacher") else {}
    return {**teacher, **(config.get("scorers") or {})}


def scorer_model(scorer: Mapping[str, Any]) -> str:
    """The folder or name of a scorer's model, or whose weights it has."""
    return _WEIGHTS.get(scorer.get("weights", "model")) or str(scorer.get("model"))


def is_data(term: Mapping[str, Any]) -> bool:
    """Whether a term is cross-entropy on answers that somebody else wrote."""
    return term.get("kind") == "data"


def formula(term: Mapping[str, Any]) -> str:
    """What a term minimises, in a few words."""
    if is_data(term):
        return "cross-entropy on the data"
    if term.get("kind") == "outcome":
        return "policy gradient of the reward"
    target = term["target"]
    whose = "" if target == _PLAIN else f" of {target_in_words(target)}"
    alignment = term.get("alignment", {"kind": "strict"})
    if alignment["kind"] == "gold" and alignment["sort"] == "all":
        return f"sum |sort(student) - sort(target)|{whose} where spans end"
    return f"{shape_in_words(term['shape'])}{whose} {_where(term, alignment)}"


def shape_in_words(shape: Mapping[str, Any]) -> str:
    """A divergence with its parameters: `JSD(target, student) (beta 0.5, normalised false)`."""
    said = ", ".join(
        f"{name} {str(value).lower() if isinstance(value, bool) else value}"
        for name, value in shape.items()
        if name != "kind" and value is not None
    )
    name = FORMULAS.get(shape["kind"]) or str(shape["kind"])
    return f"{name} ({said})" if said else name


def target_in_words(target: Mapping[str, Any]) -> str:
    """Scorers and their powers: `teacher^1.25 reference^-0.25`, `math_teacher^0.5 code_teacher^0.5`."""
    kind = target["kind"]
    if kind == "single":
        return target["scorer"]
    if kind == "routed":
        routes = ", ".join(f"{value}: {name}" for value, name in target["routes"].items())
        routes += f", others: {target['otherwise']}" if target.get("otherwise") else ""
        return f"the scorer that {target['by']} names ({routes})"
    if kind == "product":
        return " ".join(f"{name}^{weight:g}" for name, weight in target["weights"].items())
    if kind == "extrapolated":
        return _extrapolated(target)
    if kind == "delta":
        return f"{target['base']} ({target['strong']} / {target['weak']})^(1 / {target['alpha']:g})"
    share = target["share"]
    power = f"{share:g}" if isinstance(share, float | int) else f"({share['start']:g} to {share['end']:g})"
    return f"{target['scorer']} student^{power}"


def _extrapolated(target: Mapping[str, Any]) -> str:
    scale, reference = target["scale"], target["reference"]
    one = target["teacher"]["kind"] == "single"
    if isinstance(scale, float | int) and isinstance(reference, str):
        teacher = target["teacher"]["scorer"] if one else f"({target_in_words(target['teacher'])})"
        return f"{teacher}^{scale:g} {reference}^{1 - scale:g}"
    powers = {name: f"{size:g}" for name, size in scale.items()} if isinstance(scale, Mapping) else f"{scale:g}"
    return f"{target_in_words(target['teacher'])} to the power {_pairs(powers)}, away from {_pairs(reference)}"


def _pairs(value: Any) -> str:
    return ", ".join(f"{name}: {one}" for name, one in value.items()) if isinstance(value, Mapping) else str(value)


def _where(term: Mapping[str, Any], alignment: Mapping[str, Any]) -> str:
    """alignment: how a teacher with another tokenizer is joined; strict is not said."""
    if alignment["kind"] == "span":
        return "of spans as they were drawn"
    if alignment["kind"] == "alm":
        return f"of the chances of spans to the power 1 / {alignment['tau']:g}"
    if alignment["kind"] == "gold":
        return "over the shared vocabulary where spans end, and sum |sort(student) - sort(target)| of the rest"
    support = term["support"]
    if support["kind"] == "full":
        return "over the whole vocabulary"
    if support["kind"] == "sampled":
        return "at the drawn tokens"
    return f"over {support['kind'].replace('_', ' ')} {support['k']} ({support['tail'].replace('_', ' ')})"
