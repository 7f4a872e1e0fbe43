"""What a term that joins tokens in spans may be: refused with the reason and the way out, and what loads."""

from __future__ import annotations

import pytest

from opd.config.alignments import ALM, Gold, Span, Strict
from opd.config.loading import resolved
from opd.config.objective import DivergenceTerm
from opd.config.reads import is_drawn, resolution
from tests.config.recipes import BASE, PROMPTS, STUDENT, load, refused
from tests.config.test_objective_rules import assert_refused, terms

TWO = STUDENT + "scorers: {a: {model: x}, b: {model: y}}\n" + PROMPTS
SPAN, ALM_, GOLD = (
    "name: a, support: sampled, alignment: span",
    "name: a, support: sampled, alignment: alm",
    "name: a, alignment: gold",
)


def test_strict_is_the_default_and_every_kind_may_be_its_name_alone(tmp_path):
    (term,) = load(tmp_path, BASE + terms("name: a")).config.objective.terms
    assert isinstance(term, DivergenceTerm) and term.alignment == Strict()
    for said, kind in ((SPAN, Span()), (ALM_, ALM()), (GOLD, Gold())):
        (term,) = load(tmp_path, BASE + terms(said)).config.objective.terms
        assert isinstance(term, DivergenceTerm) and term.alignment == kind
    config = load(tmp_path, BASE + terms("name: a, alignment: {kind: gold, sort: all}")).config
    assert resolved(config)["objective"]["terms"][0]["alignment"] == {
        "kind": "gold",
        "match": "text",
        "sort": "all",
        "matched_weight": None,
    }


@pytest.mark.parametrize(
    ("alignment", "support", "asked", "drawn"),
    [
        ("strict", "full", "full", False),
        ("strict", {"kind": "student_top_k"}, "entries", False),
        ("strict", "sampled", "sampled", True),
        ("span", "sampled", "sampled", True),
        ("alm", "sampled", "sampled", False),
        ("gold", "full", "full", False),
    ],
)
def test_what_a_kind_asks_of_a_scorer(alignment, support, asked, drawn):
    term = DivergenceTerm.model_validate({"name": "a", "alignment": alignment, "support": support})
    assert (resolution(term), is_drawn(term)) == (asked, drawn)


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (
            "name: a, alignment: span",
            ["objective.terms.0.support: span compares the probabilities of the text", "sampled"],
        ),
        ("name: a, alignment: alm", ["objective.terms.0.support: alm compares the probabilities of the text"]),
        (
            "name: a, support: {kind: teacher_top_k}, alignment: gold",
            ["objective.terms.0.support: gold compares whole distributions", "alignment: strict"],
        ),
        (
            "name: a, support: sampled, alignment: gold",
            ["objective.terms.0.support: gold compares whole distributions", "full"],
        ),
        (
            f"{SPAN}, tokens: {{where: {{of: student, above: 1.0}}}}",
            ["objective.terms.0.tokens.where", "trains a span whole or not at all"],
        ),
        (f"{GOLD}, tokens: {{select: {{by: entropy}}}}", ["objective.terms.0.tokens.select", "alignment: strict"]),
        (f"{ALM_}, tokens: {{importance_of_prefix: 0.5}}", ["objective.terms.0.tokens.importance_of_prefix"]),
        (f"{SPAN}, credit: {{discount: 0.5}}", ["objective.terms.0.credit.discount: span gives the tokens of a span"]),
        (f"{ALM_}, credit: {{discount: 0.5}}", ["objective.terms.0.credit.discount: alm gives"]),
        (f"{SPAN}, credit: {{baseline: exact}}", ["objective.terms.0.credit.baseline", "alignment: strict"]),
        (f"{ALM_}, importance: tis", ["objective.terms.0.importance: it would do nothing: alm is a loss on the text"]),
        (f"{ALM_}, importance: ratio, advantage_under: sampler", ["objective.terms.0.advantage_under: nothing reads"]),
        (
            "name: a, alignment: {kind: gold, sort: all, matched_weight: 0.5}",
            ["objective.terms.0.alignment.matched_weight: nothing reads it", "sort: rest"],
        ),
        (
            "name: a, shape: forward_kl, alignment: {kind: gold, sort: all}",
            ["objective.terms.0.shape: nothing reads it"],
        ),
        ("name: a, support: sampled, alignment: {kind: alm, tau: 0.5}", ["objective.terms.0.alignment.tau"]),
        ("name: a, alignment: {kind: gold, matched_weight: 2}", ["objective.terms.0.alignment.matched_weight"]),
        ("name: a, alignment: spans", ["objective.terms.0.alignment: there is no such kind", "mean span?"]),
        (
            "name: a, alignment: {kind: span, tau: 3}",
            ["objective.terms.0.alignment.tau: only kind alm has this option"],
        ),
    ],
)
def test_what_has_no_meaning_in_spans_is_refused(tmp_path, term, said):
    assert_refused(tmp_path, BASE + terms(term), *said)


@pytest.mark.parametrize(
    "target",
    [
        "{kind: product, weights: {a: 0.5, b: 0.5}}",
        "{kind: extrapolated, teacher: a, reference: b}",
        "{kind: delta, strong: a, weak: b, base: b}",
    ],
)
def test_targets_known_up_to_a_factor_are_for_span_alone(tmp_path, target):
    load(tmp_path, TWO + terms(f"{SPAN}, target: {target}"))
    for term in (f"{GOLD}, shape: forward_kl", f"{ALM_}, shape: forward_kl"):
        text = TWO + terms(f"{term}, target: {target}")
        assert_refused(tmp_path, text, "objective.terms.0.target", "known up to a factor", "alignment: span")


def test_one_mistake_is_told_once(tmp_path):
    """Rules of drawn tokens are silent about alm, which has none; shapes are judged once."""
    product = "target: {kind: product, weights: {a: 0.5, b: 0.5}}"
    for text in (
        BASE + terms(f"{ALM_}, importance: tis"),
        BASE + terms(f"{ALM_}, advantage_under: proximal"),
        TWO + terms(f"{ALM_}, shape: forward_kl, {product}"),
    ):
        assert refused(tmp_path, text).count("objective.terms.0") == 1


def test_alm_is_a_loss_on_any_text(tmp_path):
    """No draw, no ratio: on the data, at another temperature, on answers that are used more than once."""
    load(tmp_path, BASE + terms(ALM_, behaviour="dataset"))
    load(tmp_path, BASE + terms(ALM_) + "sampling: {temperature: 0.7, top_p: 0.9}\nlearner: {updates_per_batch: 2}\n")
    said = "objective.terms.0.support: a sampled term averages over tokens that a model drew"
    assert_refused(tmp_path, BASE + terms(SPAN, behaviour="dataset"), said)
    assert_refused(tmp_path, BASE + terms(SPAN) + "learner: {updates_per_batch: 2}\n", "importance: ratio")


def test_routed_teachers_and_weights_of_drawn_tokens_go_with_spans(tmp_path):
    routed = "target: {kind: routed, routes: {math: a, code: b}}"
    sources = "prompts: {sources: [{kind: jsonl, path: math.jsonl}, {kind: jsonl, path: code.jsonl}]}\n"
    for term in (SPAN, ALM_, GOLD):
        load(tmp_path, TWO.replace(PROMPTS, sources) + terms(f"{term}, {routed}"))
    load(tmp_path, BASE + terms(f"{SPAN}, importance: tis, advantage_under: sampler"))
