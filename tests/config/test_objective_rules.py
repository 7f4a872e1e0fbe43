"""Terms without a valid gradient, and options of a term that nothing reads: what is refused, why, and the way out."""

from __future__ import annotations

import pytest

from opd.config.checks import ConfigWarning
from tests.config.recipes import BASE, PROMPTS, STUDENT, load, refused

NO_TEACHER = STUDENT + PROMPTS
REWARDS = "rewards: {grader: {kind: exact}}\n"
MIXED = "{kind: mixture, of: [{writer: student, share: 0.5}, {writer: dataset, share: 0.5}]}"
TWO = STUDENT + "scorers: {a: {model: x}, b: {model: y}}\n" + PROMPTS


def terms(*each: str, behaviour: str = "student") -> str:
    return f"objective: {{behaviour: {behaviour}, terms: [{', '.join(f'{{{term}}}' for term in each)}]}}\n"


def assert_refused(tmp_path, text: str, *said: str) -> None:
    error = refused(tmp_path, text)
    assert all(part in error for part in said), error


# ---- who wrote the answers ------------------------------------------------------------------------------------------


def test_O_18_cross_entropy_on_the_students_own_samples_is_refused(tmp_path):
    data = "name: a, kind: data"
    said = "objective.terms.0.kind: cross-entropy has gradient zero in expectation on the student's own samples"
    assert_refused(tmp_path, NO_TEACHER + terms(data), said, "objective.behaviour: dataset or teacher")
    load(tmp_path, NO_TEACHER + terms(data, behaviour="dataset"))
    load(tmp_path, BASE + terms(data, behaviour="teacher"))
    assert_refused(tmp_path, BASE + terms("name: b", data, behaviour=MIXED), "written_by: [dataset]")
    load(tmp_path, BASE + terms("name: b", data + ", written_by: [dataset]", behaviour=MIXED))


def test_O_18_the_student_as_its_own_writer_is_refused(tmp_path):
    text = STUDENT + "teacher: {weights: student}\n" + PROMPTS + terms("name: a, kind: data", behaviour="teacher")
    assert_refused(tmp_path, text, "teacher.weights", "the student's own samples")
    load(tmp_path, text.replace("weights: student", "weights: initial"))


def test_sampled_terms_need_draws_with_a_known_probability(tmp_path):
    sampled = "name: a, support: sampled, importance: ratio"
    said = "objective.terms.0.support: a sampled term averages over tokens that a model drew"
    assert_refused(tmp_path, BASE + terms(sampled, behaviour="dataset"), said, "support: full")
    assert_refused(tmp_path, BASE + terms(sampled, behaviour=MIXED), said)
    load(tmp_path, BASE + terms(sampled + ", written_by: [student]", "name: b", behaviour=MIXED))
    corrected = "name: a, support: {kind: teacher_top_k, tail: sampled_correction}"
    assert_refused(tmp_path, BASE + terms(corrected, behaviour="dataset"), "objective.terms.0.support.tail")
    outcome = terms("name: a, kind: outcome", behaviour="dataset")
    assert_refused(tmp_path, NO_TEACHER + REWARDS + outcome, "objective.terms.0.kind: a sampled term")


@pytest.mark.parametrize("writer", ["teacher", "teacher_mixed", "speculative", "{kind: cached, run: runs/a}"])
def test_O_04_answers_of_others_need_the_ratio(tmp_path, writer):
    text = BASE + terms("name: a, support: sampled", behaviour=writer)
    assert_refused(tmp_path, text, "objective.terms.0.importance", "the ratio to who drew them is needed")
    weighted = text.replace("support: sampled", "support: sampled, importance: ratio")
    load(tmp_path, weighted)
    updates = "learner: {updates_per_batch: 2}\n"
    proximal = text.replace("support: sampled", "support: sampled, importance: {kind: ratio, against: proximal}")
    assert_refused(tmp_path, proximal + updates, "objective.terms.0.importance.against", "somebody else")


def test_the_advantage_under_the_sampler_is_that_of_a_student(tmp_path):
    text = terms("name: a, support: sampled, importance: ratio, advantage_under: sampler", behaviour="teacher_mixed")
    assert_refused(tmp_path, BASE + text, "objective.terms.0.advantage_under: teacher_mixed drew the tokens")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (terms("name: a, written_by: [dataset]"), "objective.terms.0.written_by: nobody of the kind dataset writes"),
        (terms("name: a, written_by: [student]"), "objective.terms.0.written_by: it would do nothing"),
        (
            terms("name: a, written_by: [student]", behaviour=MIXED),
            "objective.behaviour.of.1: no term reads the answers of dataset",
        ),
        (terms("name: a, domains: [b]"), "objective.terms.0.domains: no row has the domain 'b'"),
        (terms("name: a, domains: [a]"), "objective.terms.0.domains: it would do nothing"),
        (
            terms("name: a, domains: [a]") + "prompts: {sources: [{kind: jsonl, path: a}, {kind: jsonl, path: b}]}\n",
            "prompts.sources.1: no term trains its rows",
        ),
    ],
)
def test_rows_and_answers_that_nobody_has_or_reads(tmp_path, text, said):
    base = BASE.replace(PROMPTS, "") if "prompts" in text else BASE
    assert_refused(tmp_path, base + text, said)


@pytest.mark.parametrize("option", ["advantage: group", "normalise: true", "whiten: true"])
def test_O_17_O_22_an_advantage_of_a_teacher_has_nothing_that_standardises_it(tmp_path, option):
    """Rewards are compared within their group; a log-ratio is taken as it is, and an option for more does not exist."""
    said = f"objective.terms.0.{option.partition(':')[0]}"
    assert_refused(tmp_path, BASE + terms(f"name: a, support: sampled, {option}"), said)
    mixed = NO_TEACHER + REWARDS + terms("name: a, kind: outcome, orm_advantage_weight: 0.5")
    assert_refused(tmp_path, mixed, "objective.terms.0.orm_advantage_weight: there is no such option")


# ---- importance, advantage, reduction -------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["importance: ratio", "advantage_under: sampler"])
def test_weights_of_drawn_tokens_do_nothing_on_a_full_support(tmp_path, option):
    said = f"objective.terms.0.{option.partition(':')[0]}: it would do nothing"
    assert_refused(tmp_path, BASE + terms(f"name: a, {option}"), said)


def test_the_sampled_correction_has_a_drawn_token_to_weight(tmp_path):
    text = terms("name: a, support: {kind: student_top_k, tail: sampled_correction}, importance: IMPORTANCE")
    load(tmp_path, BASE + text.replace("IMPORTANCE", "tis"))
    sequence = text.replace("IMPORTANCE", "{kind: tis, level: sequence}")
    assert_refused(tmp_path, BASE + sequence, "objective.terms.0.importance.level", "the exact part")


@pytest.mark.parametrize("option", ["importance: {kind: ppo, against: proximal}", "advantage_under: proximal"])
def test_the_proximal_student_needs_several_updates(tmp_path, option):
    more = "" if "importance" in option else ", importance: ratio"
    text = BASE + terms(f"name: a, support: sampled{more}, {option}")
    assert_refused(tmp_path, text, "nothing reads it: learner.updates_per_batch is 1")
    load(tmp_path, text + "learner: {updates_per_batch: 2}\n")


def test_sequence_mean_on_drawn_tokens_warns_with_the_reason(tmp_path):
    with pytest.warns(ConfigWarning, match="1 / length depends on the tokens drawn"):
        load(tmp_path, BASE + terms("name: a, support: sampled, reduction: sequence_mean"))
    with pytest.warns(ConfigWarning, match="1 / length depends"):
        load(tmp_path, NO_TEACHER + REWARDS + terms("name: a, kind: outcome, reduction: sequence_mean"))


def test_the_constant_of_answers_of_the_data_is_unknown(tmp_path):
    text = terms("name: a, kind: data, reduction: constant", behaviour="dataset")
    assert_refused(tmp_path, NO_TEACHER + text, "objective.terms.0.reduction")
    mixed = "{kind: mixture, of: [{writer: student, share: 0.5}, {writer: dataset, share: 0.5}]}"
    text = terms("name: a, reduction: constant", behaviour=mixed)
    assert_refused(tmp_path, BASE + text, "objective.terms.0.reduction")
    own = "name: a, reduction: constant, written_by: [student]"
    load(tmp_path, BASE + terms(own, "name: b, kind: data, written_by: [dataset]", behaviour=mixed))


# ---- shape, target, support -----------------------------------------------------------------------------------------

UNNORMALISED = [
    "{kind: product, weights: {a: 0.5, b: 0.5}}",
    "{kind: extrapolated, teacher: a, reference: b, scale: 1.25}",
    "{kind: veto, scorer: a, share: 0.5}",
]


@pytest.mark.parametrize("target", UNNORMALISED)
@pytest.mark.parametrize("shape", ["forward_kl", "clipped", "tanh", "total_variation"])
def test_other_shapes_need_a_normalised_target_on_the_full_support(tmp_path, target, shape):
    text = terms(f"name: a, target: {target}, shape: {{kind: {shape}}}, support: SUPPORT")
    base = TWO.replace(", b: {model: y}", "") if "veto" in target else TWO
    for support in ("sampled", "teacher_top_k"):
        support = "sampled" if support == "sampled" else "{kind: teacher_top_k}"
        said = "known up to a factor, which only log r can bear"
        assert_refused(tmp_path, base + text.replace("SUPPORT", support), "objective.terms.0.support.kind", said)
        load(tmp_path, base + text.replace("SUPPORT", support).replace(shape, "reverse_kl"))
    load(tmp_path, base + text.replace("SUPPORT", "full"))


def test_O_12_which_jsd_must_be_said(tmp_path):
    text = terms("name: a, shape: {kind: jsd, beta: 0.1}")
    assert_refused(tmp_path, BASE + text, "objective.terms.0.shape.normalised: say which", "allowed: false")
    for said in ("true", "false"):
        load(tmp_path, BASE + text.replace("0.1", f"0.1, normalised: {said}"))


@pytest.mark.parametrize(("tail", "why"), [("renormalise", "changes the optimum"), ("drop", "ends where bucket does")])
def test_O_07_tails_without_a_field_outside_warn(tmp_path, tail, why):
    with pytest.warns(ConfigWarning, match=why):
        load(tmp_path, BASE + terms(f"name: a, support: {{kind: student_top_k, tail: {tail}}}"))
    text = terms(f"name: a, support: {{kind: student_top_k, tail: {tail}, floor: 0.01}}")
    assert_refused(tmp_path, BASE + text, "objective.terms.0.support.floor: nothing reads it")


# ---- credit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("credit", ["discount: 0.9", "baseline: exact", "now: false", "length_norm: true"])
@pytest.mark.parametrize("support", ["full", "{kind: union}"])
def test_credit_is_about_drawn_tokens(tmp_path, credit, support):
    text = BASE + terms(f"name: a, support: {support}, credit: {{{credit}}}")
    assert_refused(tmp_path, text, f"objective.terms.0.credit.{credit.partition(':')[0]}: on support")


@pytest.mark.parametrize("credit", ["now: false", "length_norm: true"])
def test_without_a_discount_there_is_no_future(tmp_path, credit):
    text = BASE + terms(f"name: a, support: sampled, credit: {{{credit}}}")
    assert_refused(tmp_path, text, "there is no future: credit.discount is 0")
    load(tmp_path, text.replace(credit, f"{credit}, discount: 0.9"))


@pytest.mark.parametrize("shape", ["forward_kl", "tanh", "jsd, normalised: true"])
def test_discounts_take_any_shape_of_a_normalised_target(tmp_path, shape):
    load(tmp_path, BASE + terms(f"name: a, support: sampled, shape: {{kind: {shape}}}, credit: {{discount: 0.9}}"))


@pytest.mark.parametrize(
    "spoilt",
    [
        "tokens: {special: mask}",
        "tokens: {truncated: mask}",
        "tokens: {importance_of_prefix: 0.5}",
        "tokens: {select: {by: entropy}}",
        "importance: tis",
        "importance: icepop",
        "importance: ppo",
        "importance: {kind: ratio, level: sequence}",
        "reduction: sequence_mean",
    ],
)
def test_an_exact_baseline_bears_no_weight_that_depends_on_the_token(tmp_path, spoilt):
    text = BASE + terms(f"name: a, support: sampled, credit: {{baseline: exact}}, {spoilt}")
    assert_refused(tmp_path, text, "objective.terms.0.credit.baseline: the baseline drops out of the mean only where")


def test_an_exact_baseline_bears_the_unclipped_ratio_and_gates_of_the_state(tmp_path):
    gate = "tokens: {where: {of: student, above: 1}}"
    load(tmp_path, BASE + terms(f"name: a, support: sampled, credit: {{baseline: exact}}, importance: ratio, {gate}"))


def test_a_return_with_one_tokens_ratio_is_called_an_approximation(tmp_path):
    text = terms("name: a, support: sampled, importance: ratio, credit: {discount: 0.9}", behaviour="teacher_mixed")
    with pytest.warns(ConfigWarning, match="the ratio of one token stands for that of a whole return"):
        load(tmp_path, BASE + text)


def test_the_samplers_advantage_on_later_updates_warns(tmp_path):
    with pytest.warns(ConfigWarning, match="advantage_under"):
        load(tmp_path, BASE + "objective: {preset: tml}\nlearner: {updates_per_batch: 2}\n")


# ---- outcome and data terms, tokens ---------------------------------------------------------------------------------


def test_groups_have_more_than_one_answer(tmp_path):
    text = NO_TEACHER + REWARDS + terms("name: a, kind: outcome")
    one = "sampling: {samples_per_prompt: 1}\n"
    assert_refused(tmp_path, text + one, "objective.terms.0.advantage: group compares the answers to one prompt")
    load(tmp_path, text + one, "objective.terms.0.advantage=plain")


def test_rewards_need_a_reader_and_readers_need_rewards(tmp_path):
    assert_refused(tmp_path, BASE + REWARDS, "rewards: nothing reads it")
    assert_refused(tmp_path, NO_TEACHER + terms("name: a, kind: outcome"), "rewards: this is required")
    gated = BASE + terms("name: a, shape: {kind: verifier_gated}")
    assert_refused(tmp_path, gated, "rewards: this is required", "verifier_gated")
    load(tmp_path, gated + REWARDS)


@pytest.mark.parametrize("option", ["importance_of_prefix: 0.5", "select: {by: divergence}", "select: {by: either}"])
def test_terms_without_a_target_have_nothing_to_differ_from(tmp_path, option):
    text = NO_TEACHER + terms(f"name: a, kind: data, tokens: {{{option}}}", behaviour="dataset")
    assert_refused(tmp_path, text, "has no target to differ from")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("skip_first: 1024", "objective.terms.0.tokens.skip_first: no token is left"),
        ("first: 1024", "objective.terms.0.tokens.first: it would do nothing"),
    ],
)
def test_positions_lie_inside_the_answers(tmp_path, option, said):
    assert_refused(tmp_path, BASE + terms(f"name: a, tokens: {{{option}}}"), said)
    load(tmp_path, BASE + terms(f"name: a, tokens: {{{option}}}", behaviour="dataset"))


def test_positions_lie_inside_the_shortest_horizon(tmp_path):
    text = BASE + "sampling: {horizon: {start: 4, end: 32, steps: 5}}\n"
    said = "objective.terms.0.tokens.skip_first: no token is left: sampling.horizon cuts at 4"
    assert_refused(tmp_path, text + terms("name: a, tokens: {skip_first: 4}"), said, "less than 4")
    load(tmp_path, text + terms("name: a, tokens: {skip_first: 3}"))


def test_a_horizon_cuts_what_the_mask_would_leave_out(tmp_path):
    text = BASE + terms("name: a, tokens: {truncated: mask}")
    horizon = "sampling: {horizon: {start: 16, end: 32, steps: 5}}\n"
    assert_refused(tmp_path, text + horizon, "objective.terms.0.tokens.truncated: sampling.horizon cuts answers")


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["top_p: 0.99", "top_k: 100"])
@pytest.mark.parametrize(
    "term", ["support: sampled", "support: {kind: student_top_k, tail: sampled_correction}", "OUT"]
)
def test_T_06_T_07_no_ratio_brings_a_cut_tail_back(tmp_path, cut, term):
    drawn = "kind: outcome" if term == "OUT" else term
    base = NO_TEACHER + REWARDS if term == "OUT" else BASE
    text = base + terms(f"name: a, {drawn}, importance: ratio") + f"sampling: {{{cut}}}\n"
    assert_refused(tmp_path, text, f"sampling.{cut.partition(':')[0]}: objective.terms.0 averages over the student's")


@pytest.mark.parametrize("behaviour", ["teacher_mixed", "speculative"])
def test_T_01_T_04_mixed_writers_have_one_temperature_too(tmp_path, behaviour):
    text = BASE + terms("name: a, support: sampled, importance: ratio", behaviour=behaviour)
    assert_refused(
        tmp_path, text + "sampling: {temperature: 0.9}\n", "sampling.temperature: objective.terms.0 compares"
    )
    full = BASE + terms("name: a", behaviour=behaviour)
    assert_refused(tmp_path, full + "sampling: {temperature: 0}\n", "the arg max is one answer")


def test_a_teacher_may_write_its_arg_max(tmp_path):
    load(tmp_path, BASE + "objective: {preset: seqkd}\nsampling: {temperature: 0, samples_per_prompt: 1}\n")


@pytest.mark.parametrize(
    ("horizon", "said"),
    [
        ("{start: 0, end: 10, steps: 2}", "an answer has at least one token"),
        ("{start: 10, end: 2000, steps: 2}", "it goes beyond sampling.max_tokens, 1024"),
        ("{start: 1024, end: 1024, steps: 2}", "it would do nothing"),
    ],
)
def test_horizons(tmp_path, horizon, said):
    assert_refused(tmp_path, BASE + f"sampling: {{horizon: {horizon}}}\n", "sampling.horizon", said)


def test_horizons_are_for_answers_that_are_drawn_for_training(tmp_path):
    horizon = "sampling: {horizon: {start: 16, end: 32, steps: 5}}\n"
    assert_refused(tmp_path, NO_TEACHER + "objective: {preset: sft}\n" + horizon, "sampling.horizon: nothing reads it")
    task = "evals: {tasks: [{name: h, source: {kind: jsonl, path: b}, grader: {kind: exact}, SAMPLING}]}\n"
    assert_refused(tmp_path, BASE + task.replace("SAMPLING", horizon.strip()), "evals.tasks.0.sampling.horizon")


# ---- the words of the schema ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (terms("name: a, importance: raito"), ["objective.terms.0.importance: there is no such kind", "mean ratio?"]),
        (terms("name: a", behaviour="studnt"), ["objective.behaviour: there is no such kind", "mean student?"]),
        (terms("name: a, kind: outcom"), ["objective.terms.0.kind: there is no such kind", "mean outcome?"]),
        (terms("name: a, coefficient: much"), ["objective.terms.0.coefficient: this value", "a number or a section"]),
        (
            terms("name: a, coefficient: {start: 1, end: 0}"),
            ["objective.terms.0.coefficient.steps: this is required and not given"],
        ),
        (terms("name: a, advantage: plain"), ["objective.terms.0.advantage: only kind outcome has this option"]),
        (terms("name: a, support: {kind: top_k}"), ["objective.terms.0.support.kind: there is no such kind"]),
        (terms("name: a, support: {kind: union, k: 0}"), ["objective.terms.0.support.k", "at least 1"]),
        (terms("name: a, tokens: {where: {of: student}}"), ["objective.terms.0.tokens.where: above or below is req"]),
        (
            terms("name: a, target: {kind: product, weights: {a: 1, b: 1}}"),
            ["objective.terms.0.target: the weights add up to 2"],
        ),
        (
            terms("name: a, target: {kind: extrapolated, scale: {t: x}}"),
            ["objective.terms.0.target.scale.t: this value does not fit"],
        ),
        (
            terms(
                "name: a", behaviour="{kind: mixture, of: [{writer: student, share: 0.5}, {writer: data, share: 1}]}"
            ),
            ["objective.behaviour.of.1.writer: there is no such kind", "dataset"],
        ),
        ("scorers: {m: {modle: x}}\n", ["scorers.m.modle: there is no such option", "did you mean scorers.m.model"]),
        ("scorers: {m: x}\n", ["scorers.m: this is a section, not a single value"]),
    ],
)
def test_mistakes_are_named_as_they_were_written(tmp_path, text, said):
    error = refused(tmp_path, BASE + text)
    assert all(part in error for part in said), error
    assert "divergence." not in error and "mixture." not in error and "Value error" not in error
