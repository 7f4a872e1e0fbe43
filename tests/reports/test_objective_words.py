"""Targets and shapes in words: scorers with their powers, shapes with their parameters."""

from __future__ import annotations

import pytest

from opd.config.objective import DivergenceTerm
from opd.reports.objective import formula, shape_in_words, target_in_words


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("coach", "coach"),
        ({"kind": "extrapolated", "scale": 1.25}, "teacher^1.25 reference^-0.25"),
        ({"kind": "extrapolated", "scale": 0.5}, "teacher^0.5 reference^0.5"),
        (
            {"kind": "extrapolated", "teacher": {"kind": "routed", "routes": {"x": "a"}}, "scale": 2},
            "(the scorer that domain names (x: a))^2 reference^-1",
        ),
        (
            {"kind": "extrapolated", "reference": {"teacher": "old"}, "scale": {"teacher": 1.5}},
            "teacher to the power teacher: 1.5, away from teacher: old",
        ),
        ({"kind": "product", "weights": {"a": 0.75, "b": 0.25}}, "a^0.75 b^0.25"),
        ({"kind": "delta", "alpha": 2}, "reference (teacher / weak)^(1 / 2)"),
        ({"kind": "veto", "share": 0.5}, "teacher student^0.5"),
        ({"kind": "veto"}, "teacher student^(0.5 to 0)"),
        (
            {"kind": "routed", "by": "topic", "routes": {"x": "a"}, "otherwise": "b"},
            "the scorer that topic names (x: a, others: b)",
        ),
    ],
)
def test_targets(target, words: str) -> None:
    term = DivergenceTerm.model_validate({"name": "t", "target": target})
    assert target_in_words(term.target.model_dump(mode="json")) == words
    assert formula(term.model_dump(mode="json")) == f"KL(student || target) of {words} over the whole vocabulary"


def test_shapes_and_the_plain_target() -> None:
    assert shape_in_words({"kind": "clipped", "low": None, "high": 5.0}) == "clipped KL(student || target) (high 5.0)"
    term = DivergenceTerm.model_validate({"name": "t", "shape": "jsd", "support": "sampled"})
    words = "JSD(target, student) (beta 0.5, normalised false) at the drawn tokens"
    assert formula(term.model_dump(mode="json")) == words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"support": "sampled", "alignment": "span"}, "KL(student || target) of spans as they were drawn"),
        (
            {"support": "sampled", "alignment": {"kind": "alm", "tau": 10}},
            "KL(student || target) of the chances of spans to the power 1 / 10",
        ),
        (
            {"alignment": "gold", "target": "coach"},
            "KL(student || target) of coach over the shared vocabulary where spans end, and "
            "sum |sort(student) - sort(target)| of the rest",
        ),
        ({"alignment": {"kind": "gold", "sort": "all"}}, "sum |sort(student) - sort(target)| where spans end"),
        ({"alignment": "strict"}, "KL(student || target) over the whole vocabulary"),
    ],
)
def test_how_a_teacher_with_another_tokenizer_is_joined(changes, words: str) -> None:
    term = DivergenceTerm.model_validate({"name": "t", **changes}).model_dump(mode="json")
    assert formula(term) == words
    if changes["alignment"] == "strict":
        assert formula({key: value for key, value in term.items() if key != "alignment"}) == words, "an older run"
