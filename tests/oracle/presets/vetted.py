"""The vetted presets."""

from __future__ import annotations

from torch import Tensor

from opd.objectives.oracle import divergences as d
from tests.oracle.presets import fields, sources
from tests.oracle.presets.cases import (
    Case,
    after_first,
    answers,
    both,
    by_writer,
    corrected,
    extrapolated,
    local,
    not_special,
    on_top,
    pairs_of,
    rescaled_on_top,
    rewarded_in_one_group,
    rewarded_in_pairs,
    routed,
    times,
)
from tests.oracle.presets.expectation import mean_over_answers, standardised
from tests.oracle.presets.tables import World
from tests.oracle.presets.worlds import (
    BASES,
    END,
    ROUTES,
    SMALL_UNITS,
    SPECIAL,
    by_data,
    by_teacher,
    by_untrained,
    cut,
    graded_alone,
    graded_anchored,
    graded_domains,
    mixed,
    only,
    told_more,
    two_domains,
)


def minillm_field(world: World) -> Tensor:
    return fields.local(world, d.reverse_kl) + fields.policy(world, fields.mean_to_come(0.95))


UNTRAINED = told_more(lambda untrained, student: untrained)
AVERAGED = told_more(lambda untrained, student: untrained.lerp(student, 0.5))
TILT = extrapolated(1.25)
DELTA = fields.product({"reference": 1.0, "teacher": 1 / 0.8, "weak": -1 / 0.8})
FRESH_ONLY, NOT_OLD = ("fresh",), ("fresh", "near")
IN_GROUPS = {"units": sum(SMALL_UNITS), "grouped": True}

VETTED: dict[str, Case] = {
    "reverse_kl": Case("reverse_kl", only("teacher"), local(d.reverse_kl), answers(sources.reverse_kl)),
    "forward_kl": Case("forward_kl", only("teacher"), local(d.forward_kl), answers(sources.forward_kl)),
    "jsd": Case("jsd", only("teacher"), local(d.jensen_shannon(0.5)), answers(sources.jsd(0.5))),
    "jsd 0.1": Case("jsd", only("teacher"), local(d.jensen_shannon(0.1)), answers(sources.jsd(0.1)), {"beta": 0.1}),
    "jsd 0.9 normalised": Case(
        "jsd",
        only("teacher"),
        times(1 / 0.09, local(d.jensen_shannon(0.9))),
        times(1 / 0.09, answers(sources.jsd(0.9))),
        {"beta": 0.9, "normalised": True},
    ),
    "sft": Case("sft", by_data, local(d.forward_kl, by_writer), answers(sources.cross_entropy), behaviour="dataset"),
    "seqkd": Case("seqkd", by_teacher, local(d.forward_kl), answers(sources.cross_entropy), behaviour="teacher"),
    "self_sft": Case(
        "self_sft", by_untrained, local(d.forward_kl), answers(sources.cross_entropy), behaviour="teacher"
    ),
    "tml": Case("tml", only("teacher"), local(d.reverse_kl), answers(sources.thinking_machines), exact=FRESH_ONLY),
    "tml, discount 1": Case(
        "tml",
        only("teacher"),
        lambda world: fields.policy(world, fields.to_go(1.0, lambda w, x: w.tree.logprobs(fields.teacher(w, x)))),
        answers(sources.thinking_machines_discounted(1.0)),
        {"discount": 1.0},
        exact=FRESH_ONLY,
    ),
    "minillm": Case("minillm", mixed, minillm_field, answers(sources.minillm(0.95)), behaviour="teacher_mixed"),
    "mopd": Case(
        "mopd",
        two_domains,
        local(d.reverse_kl, routed),
        answers(sources.mopd(ROUTES, 0.5, 2.0)),
        {"routes": ROUTES},
        exact=NOT_OLD,
    ),
    "mopd with rewards": Case(
        "mopd",
        graded_domains,
        both(local(d.reverse_kl, routed), times(0.7, rewarded_in_pairs)),
        pairs_of(sources.mopd(ROUTES, 0.5, 2.0, 0.7)),
        {"routes": ROUTES, "alpha": 0.7},
        exact=NOT_OLD,
        **IN_GROUPS,
    ),
    "gopd 0.5": Case(
        "gopd",
        only("teacher", "reference"),
        local(d.reverse_kl, extrapolated(0.5)),
        answers(sources.g_opd(0.5, 5.0)),
        {"scale": 0.5},
    ),
    "gopd 1": Case("gopd", only("teacher"), local(d.reverse_kl), answers(sources.g_opd(1.0, 5.0)), {"scale": 1.0}),
    "exopd": Case("exopd", only("teacher", "reference"), local(d.reverse_kl, TILT), answers(sources.g_opd(1.25, 5.0))),
    "exopd, cap 1.5": Case(
        "exopd",
        only("teacher", "reference"),
        local(d.reverse_kl, TILT),
        answers(sources.g_opd(1.25, 1.5)),
        {"cap": 1.5},
        exact=NOT_OLD,
    ),
    "exopd, discount 1": Case(
        "exopd",
        only("teacher", "reference"),
        lambda world: fields.policy(world, fields.to_go(1.0, TILT)),
        answers(sources.g_opd(1.25, 5.0, 1.0)),
        {"discount": 1.0},
    ),
    "exopd_corrected": Case(
        "exopd_corrected", only("teacher", "reference"), local(d.reverse_kl, TILT), answers(sources.g_opd(1.25, 5.0))
    ),
    "exopd_corrected, routed": Case(
        "exopd_corrected",
        two_domains,
        local(d.reverse_kl, corrected),
        answers(sources.g_opd_routed(1.25, 5.0, ROUTES, BASES)),
        {"routes": ROUTES, "reference": BASES},
    ),
    "compass": Case(
        "compass",
        only("teacher", "reference", "weak"),
        times(0.8, local(d.reverse_kl, DELTA)),
        answers(sources.compass(0.8)),
        {"alpha": 0.8},
        exact=FRESH_ONLY,
    ),
    "lsm": Case(
        "lsm",
        cut,
        lambda world: fields.weighted_local(world, rescaled_on_top(d.reverse_kl, 2), not_special),
        answers(sources.local_support_matching(2, SPECIAL)),
        {"k": 2},
        units=4,
        special=frozenset({SPECIAL, END}),
    ),
    "opsd": Case("opsd", UNTRAINED, local(d.jensen_shannon(0.5)), answers(sources.jsd(0.5))),
    "sdft": Case(
        "sdft",
        AVERAGED,
        local(on_top(d.forward_kl, 2, "teacher")),
        answers(sources.two_classes_more(sources.forward_kl, 2, "teacher")),
        {"k": 2},
    ),
    "sdft, skip_first 1": Case(
        "sdft",
        AVERAGED,
        lambda world: fields.weighted_local(world, on_top(d.forward_kl, 2, "teacher"), after_first),
        answers(sources.later(sources.two_classes_more(sources.forward_kl, 2, "teacher"), 1)),
        {"k": 2, "skip_first": 1},
    ),
    "sdpo": Case(
        "sdpo",
        AVERAGED,
        local(on_top(d.jensen_shannon(0.5), 2, "student")),
        answers(sources.two_classes_more(sources.jsd(0.5), 2, "student")),
        {"k": 2},
    ),
    # Of a teacher with the student's tokenizer: every token is a span, and all vocabulary is shared.
    "span": Case("span", only("teacher"), local(d.reverse_kl), answers(sources.reverse_kl_drawn), exact=FRESH_ONLY),
    "gold": Case("gold", only("teacher"), local(d.jensen_shannon(0.5)), answers(sources.jsd(0.5))),
    "gold, half the weight": Case(
        "gold",
        only("teacher"),
        times(0.5, local(d.reverse_kl)),
        times(0.5, answers(sources.reverse_kl)),
        {"divergence": "reverse_kl", "matched_weight": 0.5},
    ),
    "grpo": Case("grpo", graded_alone, rewarded_in_pairs, pairs_of(sources.grpo(0.2)), exact=NOT_OLD, **IN_GROUPS),
    "grpo, one group of all": Case(
        "grpo",
        graded_alone,
        rewarded_in_one_group,
        lambda world: mean_over_answers(standardised(world), sources.grpo(0.2)),
        exact=NOT_OLD,
        units=sum(SMALL_UNITS),
    ),
    "grpo, anchored": Case(
        "grpo",
        graded_anchored,
        both(rewarded_in_pairs, times(0.3, local(d.reverse_kl, fields.product({"reference": 1.0})))),
        both(pairs_of(sources.grpo(0.2)), times(0.3, answers(sources.weighted_reverse_kl({"reference": 1.0})))),
        {"kl": 0.3},
        exact=NOT_OLD,
        **IN_GROUPS,
    ),
}
