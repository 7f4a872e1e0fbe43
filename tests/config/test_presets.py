"""Named methods: the least that a user types loads, is what the source says, and replays from config.json."""

from __future__ import annotations

import json
import math

import pytest

from opd.config.catalogue import catalogue, described, example
from opd.config.loading import config_hash, given, load_config, resolved
from opd.config.objective import DataTerm, DivergenceTerm, OutcomeTerm
from opd.config.presets import METHODS, expand
from opd.config.presets.registry import Method
from opd.config.reads import needs_reward, readers, scorers
from opd.config.targets import Single
from opd.errors import ConfigError
from tests.config.recipes import BASE, PROMPTS, STUDENT, load, refused, write

ALL = sorted(METHODS)


def words(text: str) -> list[str]:
    return sorted(text.split())


NAMED = words("""
    reverse_kl forward_kl jsd sft seqkd self_sft gkd gkd_rl distillm distillm2 minillm tml mopd gopd exopd
    exopd_corrected deepseek_v4 lsm ta_opd eopd opdvr kdrl iw_opd prefix_opd opsd sdft sdpo compass binary_opd skd grpo
    no_teacher shared_top_k span gold uld alm
""")
# methods.md marks these with nothing better than (secondary).
SECONDARY = words("""
    gkd gkd_rl distillm distillm2 deepseek_v4 ta_opd eopd opdvr kdrl iw_opd prefix_opd binary_opd skd no_teacher
    shared_top_k uld alm
""")
PRICED = {"lsm"}  # its tail is renormalised, which warns

pytestmark = pytest.mark.filterwarnings("ignore::opd.config.checks.ConfigWarning")


def test_every_named_method_is_there():
    assert NAMED == ALL
    assert sorted(name for name, method in METHODS.items() if method.status == "experimental") == SECONDARY


@pytest.mark.parametrize("name", ALL)
def test_O_26_the_least_that_a_user_types_loads_and_replays(tmp_path, name):
    loaded = load(tmp_path, example(name))
    stored = write(tmp_path, json.dumps(resolved(loaded.config)), "config.json")
    again = load_config([stored]).config
    assert again == loaded.config and resolved(again) == resolved(loaded.config)
    assert config_hash(again) == config_hash(loaded.config)
    assert load_config([given(loaded.config)]).config == loaded.config
    assert loaded.config.objective.terms and loaded.config.objective.behaviour is not None


@pytest.mark.parametrize("name", ALL)
def test_what_was_given_is_the_example_itself(tmp_path, name):
    import yaml

    said = given(load(tmp_path, example(name)).config)
    assert said == yaml.safe_load(example(name))


@pytest.mark.parametrize("name", sorted(set(ALL) - PRICED))
@pytest.mark.filterwarnings("error::opd.config.checks.ConfigWarning")
def test_presets_run_without_a_warning(tmp_path, name):
    load(tmp_path, example(name))


@pytest.mark.parametrize("name", ALL)
def test_every_scorer_of_a_preset_is_read_and_every_reader_has_one(tmp_path, name):
    config = load(tmp_path, example(name)).config
    assert set(readers(config.objective)) == set(scorers(config))
    assert (config.rewards is not None) == any(map(needs_reward, config.objective.terms))


@pytest.mark.parametrize("name", ALL)
def test_O_25_every_preset_says_what_it_is_and_where_it_is_from(name):
    method = METHODS[name]
    assert isinstance(method, Method) and method.source and method.formula and "\n" not in method.formula
    entry = next(e for e in catalogue() if e["name"] == name)
    assert set(entry) == {"name", "formula", "source", "status", "evidence", "cost", "terms"}
    assert entry["cost"].endswith((")", "N_student")) or "N_" in entry["cost"]
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert described(name)["terms"] == entry["terms"]


@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("minillm", "R leaves out the token's own log-ratio, as in the paper (its code has it in)"),
        ("lsm", "trains the top 20 % of tokens by entropy alone, which the paper does not have"),
        ("opsd", "The code also clips every vocabulary entry's part of the divergence, which this does not"),
        ("sdft", "Two codes rescale to the 20 instead of keeping the rest"),
        ("tml", "The cookbook sums over tokens; here it is their mean"),
        ("mopd", "The report writes the mean over each answer's own length"),
        ("gold", "The code's default (observed) takes each probability one position late and leaves ends out"),
        ("uld", "The paper joins positions by their number and cuts the longer text; here they are joined by the text"),
        ("alm", "here a span is the least that both have"),
    ],
)
def test_O_25_where_paper_and_code_differ_a_preset_says_which_it_follows(name, which):
    assert which in " ".join(METHODS[name].doc.split())


@pytest.mark.parametrize(
    ("name", "evidence", "cost"),
    [
        ("reverse_kl", {"teacher": "full"}, "8 N_student + 2 N_teacher"),  # 8 N_s T + 2 N_t T, methods.md 1.9
        ("tml", {"teacher": "sampled"}, "8 N_student + 2 N_teacher"),
        ("sft", {}, "6 N_student"),
        ("seqkd", {}, "6 N_student + 2 N_teacher"),
        ("self_sft", {}, "8 N_student"),
        ("opsd", {"teacher": "full"}, "10 N_student"),
        ("exopd", {"teacher": "sampled", "reference": "sampled"}, "10 N_student + 2 N_teacher"),
        ("minillm", {"teacher": "full"}, "8 N_student + 4 N_teacher"),
        ("grpo", {"reward": "answer"}, "8 N_student"),
        ("kdrl", {"teacher": "sampled", "reward": "answer"}, "8 N_student + 2 N_teacher"),
        ("shared_top_k", {"teacher": "entries"}, "8 N_student + 2 N_teacher"),
        ("span", {"teacher": "sampled"}, "8 N_student + 2 N_teacher"),
        ("gold", {"teacher": "full"}, "8 N_student + 2 N_teacher"),
        ("alm", {"teacher": "sampled"}, "8 N_student + 2 N_teacher"),
    ],
)
def test_evidence_and_cost(name, evidence, cost):
    entry = next(e for e in catalogue() if e["name"] == name)
    assert (entry["evidence"], entry["cost"]) == (evidence, cost)


# ---- constants, as the sources have them ---------------------------------------------------------------------------


def term(name: str, i: int = 0, **parameters):
    return expand(name, parameters).terms[i]


@pytest.mark.parametrize(
    ("found", "source"),
    [
        (lambda: term("gkd").shape.beta, 0.5),
        (lambda: expand("gkd", {}).behaviour.of[0].share, 0.5),
        (lambda: expand("gkd", {}).behaviour.per, "batch"),
        (lambda: term("gkd_rl", 1, divergence="jsd").shape.beta, 0.9),
        (lambda: term("distillm").shape.alpha, 0.1),
        (lambda: expand("minillm", {}).behaviour.alpha, 0.2),
        (lambda: term("minillm", 1).credit.discount, 0.95),
        (lambda: term("minillm", 1).credit.now, False),
        (lambda: term("tml").advantage_under, "sampler"),
        (lambda: term("tml").credit.discount, 0.0),
        (
            lambda: (term("mopd", routes={"a": "t"}).importance.low, term("mopd", routes={"a": "t"}).importance.high),
            (0.5, 2),
        ),
        (lambda: term("exopd").target.scale, 1.25),
        (lambda: term("exopd").importance.cap, 5.0),
        (lambda: term("lsm").support.k, 32),
        (lambda: expand("lsm", {}).sampling["top_p"], 0.9),
        (lambda: term("lsm").tokens.special, "mask"),
        (lambda: (term("eopd", 1).tokens.where.above, term("eopd", 1).support.k), (0.8, 16)),
        (lambda: term("iw_opd").tokens.importance_of_prefix, 0.5),
        (lambda: expand("opsd", {}).scorers["teacher"].weights, "initial"),
        (lambda: (expand("sdft", {}).scorers["teacher"].ema_rate, term("sdft").support.k), (0.01, 20)),
        (lambda: (expand("sdpo", {}).scorers["teacher"].ema_rate, term("sdpo").support.k), (0.05, 100)),
        (lambda: expand("skd", {}).behaviour.top_k, 25),
        (lambda: (term("gold").shape.beta, term("gold").shape.kind, term("gold").alignment.sort), (0.5, "jsd", "rest")),
        (lambda: term("uld").alignment.sort, "all"),
        (lambda: (term("alm").alignment.tau, term("alm").shape.kind), (100.0, "forward_kl")),
        (lambda: (term("shared_top_k").support.k, term("shared_top_k").alignment.kind), (16, "strict")),
        (lambda: (term("grpo").importance.low, term("grpo").advantage), (0.2, "group")),
    ],
)
def test_O_25_constants_are_those_of_the_source(found, source):
    assert found() == source


def test_O_16_the_coefficients_of_exopd_ascend():
    """log q~ = scale log q + (1 - scale) log m: more of what the teacher has over the reference."""
    target = term("exopd", scale=1.5).target
    assert (target.scale, target.reference, target.teacher) == (1.5, "reference", Single(scorer="teacher"))


def test_compass_has_its_alpha_before_the_students_part():
    """(l_T - l_R) - alpha (log p - log m) = alpha (log q~ - log p) with log q~ = log m + (l_T - l_R) / alpha."""
    made = term("compass", alpha=0.5)
    teacher, weak, base, student = -1.0, -2.0, -0.3, -0.7
    tilted = base + (teacher - weak) / made.target.alpha
    expected = (teacher - weak) - 0.5 * (student - base)
    assert math.isclose(made.coefficient * (tilted - student), expected)


def test_binary_opd_is_the_sign():
    made = term("binary_opd")
    assert made.coefficient * 0.5 == 1.0 and made.shape.kind == "total_variation"  # h = sign(r - 1) / 2


def test_parameters_that_change_which_terms_there_are():
    assert [type(t) for t in expand("mopd", {"routes": {"a": "t"}, "alpha": 0.5}).terms] == [
        DivergenceTerm,
        OutcomeTerm,
    ]
    assert [t.name for t in expand("grpo", {"kl": 0.04}).terms] == ["grpo", "anchor"]
    assert expand("gkd", {"on_policy": 1}).behaviour.kind == "student"
    assert expand("gkd", {"on_policy": 0}).behaviour.kind == "dataset"
    assert expand("gopd", {"scale": 1}).terms[0].target == Single() and not expand("gopd", {"scale": 1}).scorers
    assert isinstance(expand("seqkd", {}).terms[0], DataTerm)


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("preset: mopd", ["objective.parameters.routes: preset 'mopd' needs it", "math_teacher"]),
        ("preset: gopd", ["objective.parameters.scale: preset 'gopd' needs it"]),
        ("preset: mopd, parameters: {routes: 5}", ["objective.parameters.routes: preset 'mopd' refuses it"]),
        ("preset: gkd, parameters: {on_policy: 2}", ["objective.parameters.on_policy", "less than or equal to 1"]),
        ("preset: jsd, parameters: {normalised: 'no'}", ["objective.parameters.normalised", "valid boolean"]),
        ("preset: deepseek_v4, parameters: {weights: {a: 1, b: 1}}", ["the weights add up to 2"]),
        ("preset: sdft, parameters: {k: 2.5}", ["objective.parameters.k"]),
    ],
)
def test_parameters_are_read_as_strictly_as_a_config(tmp_path, objective, said):
    error = refused(tmp_path, BASE + f"objective: {{{objective}}}\n")
    assert all(part in error for part in said), error


def test_a_schedule_is_a_parameter():
    made = expand("kdrl", {"beta": {"start": 0.2, "end": 0, "steps": 5}}).terms[1]
    assert (made.coefficient.start, made.coefficient.steps) == (0.2, 5)
    with pytest.raises(ConfigError, match="needs it"):
        expand("gopd", {})


# ---- scorers that a preset brings ----------------------------------------------------------------------------------

OWN = STUDENT + PROMPTS + "objective: {preset: opsd}\n"


def test_a_presets_scorer_is_filled_in_with_its_origin(tmp_path):
    loaded = load(tmp_path, OWN)
    teacher = loaded.config.teacher
    assert teacher.weights == "initial" and "{solution}" in teacher.context.template
    assert loaded.origins["teacher.weights"].endswith("recipe.yaml:5")
    assert loaded.origins["teacher.context.template"].endswith("recipe.yaml:5")
    assert loaded.origins["teacher.device"] == "default"


def test_the_configs_own_entries_win(tmp_path):
    mine = OWN + "teacher: {weights: ema, ema_rate: 0.1, context: {system_prompt: Think.}}\n"
    teacher = load(tmp_path, mine).config.teacher
    assert (teacher.weights, teacher.ema_rate, teacher.context.system_prompt) == ("ema", 0.1, "Think.")
    assert "{solution}" in teacher.context.template  # what was left open
    teacher = load(tmp_path, OWN + "teacher: {model: big}\n").config.teacher
    assert (teacher.model, teacher.weights) == ("big", "model") and "{solution}" in teacher.context.template
    teacher = load(tmp_path, OWN + "scorers: {teacher: {offload: cpu}}\n").config.scorers["teacher"]
    assert (teacher.weights, teacher.offload) == ("initial", "cpu")


def test_other_names_of_scorers_are_filled_in_too(tmp_path):
    config = load(tmp_path, BASE + "objective: {preset: exopd}\n").config
    assert config.scorers["reference"].weights == "initial"
    config = load(tmp_path, BASE + "objective: {preset: exopd}\nscorers: {reference: {model: base}}\n").config
    assert (config.scorers["reference"].model, config.scorers["reference"].weights) == ("base", "model")


def test_a_required_scorer_that_is_not_given_is_named_with_its_line(tmp_path):
    error = refused(tmp_path, BASE + "objective: {preset: exopd_corrected}\n")
    assert error.startswith("scorers.reference: this is required: the objective's term 'exopd_corrected' reads it")
    assert "scorers: {reference: {model: a folder or hub name}}, or {reference: {weights: initial}}" in error
    error = refused(tmp_path, BASE + "objective: {preset: compass}\n")
    assert error.startswith("scorers.weak: this is required")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective: {preset: lsm}\n", ["sampling.top_p: preset 'lsm' samples with 0.9", "sampling: {top_p: 0.9}"]),
        ("objective: {preset: prefix_opd}\n", ["sampling.horizon: this is required", "start: 256"]),
        ("objective: {preset: grpo}\n", ["rewards: this is required: objective.terms.0 is an outcome term"]),
    ],
)
def test_what_a_method_cannot_do_without(tmp_path, text, said):
    error = refused(tmp_path, BASE + text)
    assert all(part in error for part in said), error


def test_any_horizon_will_do_for_prefix_opd(tmp_path):
    load(tmp_path, BASE + "objective: {preset: prefix_opd}\nsampling: {horizon: {start: 64, end: 128, steps: 10}}\n")
