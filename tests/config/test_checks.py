"""Combinations without a valid meaning, one by one: what is refused, with which reason and which way out."""

from __future__ import annotations

import warnings

import pytest

from opd.config.behaviours import DatasetWrites, StudentWrites
from opd.config.checks import ConfigWarning, check
from opd.config.naming import source_name
from opd.config.schema import Config
from opd.errors import ConfigError
from tests.config.recipes import BASE, PROMPTS, STUDENT, TASK, load, refused

SAMPLED = "objective: {behaviour: student, terms: [{name: a, support: sampled, importance: ratio}]}\n"
NO_TEACHER = STUDENT + PROMPTS


def terms(behaviour: str, *each: str) -> str:
    return f"objective: {{behaviour: {behaviour}, terms: [{', '.join(f'{{{term}}}' for term in each)}]}}\n"


# ---- presets and terms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["reverse_kl", "forward_kl", "jsd", "tml"])
def test_presets_are_expanded(tmp_path, preset):
    objective = load(tmp_path, BASE + f"objective: {{preset: {preset}}}\n").config.objective
    assert objective.behaviour == StudentWrites() and [term.name for term in objective.terms] == [preset]


def test_the_default_is_the_reverse_kl_preset(tmp_path):
    assert load(tmp_path, BASE).config.objective.terms[0].name == "reverse_kl"


def test_a_given_behaviour_wins_over_the_preset(tmp_path):
    objective = load(tmp_path, BASE + "objective: {preset: reverse_kl, behaviour: dataset}\n").config.objective
    assert objective.behaviour == DatasetWrites()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "objective: {student_temperature: 2}\n",
            ["objective: neither a preset nor terms", "one of reverse_kl, forward"],
        ),
        ("objective: {preset: revers_kl}\n", ["objective.preset: there is no 'revers_kl'", "did you mean reverse_kl?"]),
        (
            "objective: {preset: tml, parameters: {beta: 1}}\n",
            ["objective.parameters.beta: preset 'tml' takes discount"],
        ),
        ("objective: {preset: jsd, parameters: {beta: 5}}\n", ["objective.parameters.beta: preset 'jsd' refuses it"]),
        (terms("student", "name: a").replace("terms", "parameters: {b: 1}, terms"), ["parameters belong to a preset"]),
        (
            "objective: {preset: reverse_kl, terms: [{name: reverse_kl, coefficient: 2}]}\n",
            ["objective.terms.0.coefficient: preset 'reverse_kl' means 1.0 here", "given: 2.0 (recipe.yaml:6)"],
        ),
        (
            "objective: {preset: reverse_kl, terms: [{name: reverse_kl}, {name: b}]}\n",
            ["objective.terms: preset 'reverse_kl' has 1 terms", "given: 2 terms", "objective={preset: reverse_kl}"],
        ),
        (terms("student", "name: a", "name: a, coefficient: 2"), ["2 terms have the name 'a'"]),
        (terms("student", "name: a, coefficient: 0"), ["objective.terms.0.coefficient: a term with coefficient 0"]),
    ],
)
def test_objectives_that_say_too_little_or_too_much(tmp_path, text, said):
    error = refused(tmp_path, BASE + text)
    for part in said:
        assert part in error


def test_equal_terms_beside_their_preset_are_fine(tmp_path):
    load(tmp_path, BASE + "objective: {preset: reverse_kl, terms: [{name: reverse_kl}], behaviour: student}\n")


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantised_models_run_on_the_cpu_too(tmp_path, bits):
    load(tmp_path, BASE.replace("big", f"big, device: cpu, quantisation: {bits}"))
    load(tmp_path, BASE.replace("small", f"small, device: cpu, quantisation: {bits}, lora: {{rank: 4}}"))


def test_quantised_weights_need_an_adapter(tmp_path):
    error = refused(tmp_path, BASE.replace("small", "small, quantisation: int4"))
    assert error.startswith("student.quantisation: quantised weights are frozen") and "student.lora: {}" in error


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_W_02_merging_into_quantised_weights_is_refused(tmp_path, bits):
    text = BASE.replace("small", f"small, quantisation: {bits}, lora: {{save: merged}}")
    assert refused(tmp_path, text).startswith(f"student.lora.save: merging into weights of {bits} would round")
    for save in ("auto", "adapter"):
        load(tmp_path, text.replace("merged", save))


# ---- sampling ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["sampling: {temperature: 0.9}\n", "student_temperature"])
def test_T_01_T_04_sampled_terms_need_one_temperature(tmp_path, change):
    text = BASE + (
        SAMPLED + change if "sampling" in change else SAMPLED.replace("{be", "{student_temperature: 0.9, be")
    )
    text = text.replace("{student_temperature", "{teacher_temperature: 0.9, student_temperature")
    error = refused(tmp_path, text)
    assert error.startswith("sampling.temperature: objective.terms.0 compares the distribution that was sampled from")
    assert "given: 0.9 (recipe.yaml:7)" in error or "given: 1.0 (default)" in error


def test_T_01_T_04_equal_temperatures_are_fine(tmp_path):
    both = SAMPLED.replace("{be", "{student_temperature: 0.9, teacher_temperature: 0.9, be")
    load(tmp_path, BASE + both + "sampling: {temperature: 0.9}\n")


@pytest.mark.parametrize("cut", ["top_p: 0.99", "top_k: 100"])
def test_T_06_T_07_cut_tails_are_refused_for_sampled_terms(tmp_path, cut):
    error = refused(tmp_path, BASE + SAMPLED + f"sampling: {{{cut}}}\n")
    assert error.startswith(f"sampling.{cut.partition(':')[0]}: objective.terms.0 averages over the student's whole")
    load(tmp_path, BASE + f"sampling: {{{cut}}}\n")


def test_the_arg_max_is_for_evals_only(tmp_path):
    error = refused(tmp_path, BASE + "sampling: {temperature: 0}\n")
    assert error.startswith("sampling.temperature: training samples from the student, and the arg max is one answer")
    load(tmp_path, BASE + TASK, "evals.tasks.0.sampling.temperature=0")
    load(tmp_path, NO_TEACHER + TASK + "objective: {preset: sft}\nsampling: {temperature: 0}\n")


def test_stale_samples_need_a_ratio(tmp_path):
    text = BASE + SAMPLED.replace("ratio", "none") + "learner: {updates_per_batch: 2}\n"
    error = refused(tmp_path, text)
    assert error.startswith("learner.updates_per_batch: from the second update on") and "importance: ratio" in error
    load(tmp_path, BASE + SAMPLED + "learner: {updates_per_batch: 2}\n")


# ---- the rest ----------------------------------------------------------------------------------------------------


def test_E_03_evals_without_tasks_are_refused(tmp_path):
    error = refused(tmp_path, BASE + "evals: {every: 10}\n")
    assert error.startswith("evals.every: nothing reads it: evals.tasks is empty\n  given: 10 (recipe.yaml:6)")
    for option in ("teacher: false", "confidence: 0.9", "workers: 3"):
        assert "nothing reads it" in refused(tmp_path, BASE + f"evals: {{{option}}}\n")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["evals.tasks.1={name: held, source: {kind: jsonl, path: c}, grader: {kind: exact}}"],
            "evals.tasks.1: 2 ent",
        ),
        (
            ["evals.tasks.0.samples=4", "evals.tasks.0.sampling.temperature=0"],
            "evals.tasks.0.samples: sampling.temperature",
        ),
        (
            ["evals.tasks.0.sampling.samples_per_prompt=2"],
            "evals.tasks.0.sampling.samples_per_prompt: nothing reads it",
        ),
        (
            ["prompts.sources.1={kind: parquet, path: x/a.parquet}"],
            "prompts.sources.1: 2 entries have the name 'a'",
        ),
        (["optim.final_lr_fraction=0.1"], "optim.final_lr_fraction: nothing reads it: optim.schedule is constant"),
        (["optim.warmup_steps=101"], "optim.warmup_steps: the warm-up is longer than the run, run.steps is 100"),
        (["teacher.format.plain_template=Q:"], "teacher.format.plain_template: the prompt has no place in it"),
        (
            ["student.format.kind=chat", "student.format.plain_template=Q: {prompt}"],
            "student.format.plain_template: nothing reads it: student.format.kind is chat",
        ),
        (
            ["student.format.kind=plain", "student.format.chat_template_kwargs.a=1"],
            "student.format.chat_template_kwargs: nothing reads it: student.format.kind is plain",
        ),
    ],
)
def test_options_that_nothing_would_read(tmp_path, overrides, said):
    error = refused(tmp_path, BASE + TASK, *overrides)
    assert error.startswith(said) and "command line" in error


def test_defaults_written_out_are_never_refused(tmp_path):
    load(tmp_path, BASE + "optim: {schedule: constant, final_lr_fraction: 0.0}\nevals: {every: 0, teacher: true}\n")


def test_names_of_sources():
    sources = [
        {"kind": "jsonl", "path": "x/train.v2.jsonl.gz"},
        {"kind": "reasoning_gym", "task": "chain_sum"},
        {"kind": "inline", "rows": ["a"]},
        {"kind": "dataset", "path": "org/maths", "name": "mine"},
    ]
    config = Config.model_validate({"student": {"model": "s"}, "prompts": {"sources": sources}})
    assert [source_name(source) for source in config.prompts.sources] == ["train.v2", "chain_sum", "inline", "mine"]


# ---- prices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SAMPLED.replace("ratio", "ratio, reduction: sequence_mean"), "sequence_mean on a sampled term is biased"),
        ("objective: {preset: reverse_kl, teacher_temperature: 2}\n", "is not at the optimum"),
        ("learner: {updates_per_batch: 2}\n", "states that an older student visited"),
    ],
)
def test_what_has_a_price_warns(tmp_path, text, said):
    with pytest.warns(ConfigWarning, match=said):
        load(tmp_path, BASE + text)


@pytest.mark.parametrize("preset", ["reverse_kl", "forward_kl", "jsd", "tml"])
def test_presets_warn_of_nothing(tmp_path, preset):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, BASE + f"objective: {{preset: {preset}}}\n")


def test_check_works_without_origins_and_is_stable():
    raw = {"student": {"model": "s"}, "prompts": {"sources": [{"kind": "inline", "rows": ["a"]}]}}
    with pytest.raises(ConfigError, match=r"^teacher\.model: this is required"):
        check(Config.model_validate(raw))
    config = check(Config.model_validate(raw | {"teacher": {"model": "t"}}))
    assert check(config) == config


def test_terms_without_a_preset_are_on_the_students_own_answers(tmp_path) -> None:
    raw = {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "prompts": {"sources": [{"kind": "jsonl", "path": "p"}]},
    }
    config = check(Config.model_validate({**raw, "objective": {"terms": [{"name": "a"}]}}))
    assert config.objective.behaviour == StudentWrites()
    with pytest.raises(ConfigError, match="cross-entropy has gradient zero"):
        check(Config.model_validate({**raw, "objective": {"terms": [{"name": "a", "kind": "data"}]}}))


def test_the_mean_ratio_of_an_answer_is_told_to_be_biased() -> None:
    raw = {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "prompts": {"sources": [{"kind": "jsonl", "path": "p"}]},
    }
    term = {"name": "a", "support": "sampled", "importance": {"kind": "ratio", "level": "sequence"}}
    with pytest.warns(ConfigWarning, match="geometric mean"):
        check(Config.model_validate({**raw, "objective": {"terms": [term]}}))


def test_all_combinations_are_reported_at_once(tmp_path):
    error = refused(tmp_path, BASE + SAMPLED + "sampling: {top_p: 0.9, top_k: 5}\nevals: {every: 1}\n")
    assert error.startswith("3 problems in the config\n")


def test_a_student_in_float16_is_refused(tmp_path):
    message = refused(tmp_path, BASE.replace(STUDENT, STUDENT.replace("}", ", dtype: float16}")))
    assert "student.dtype: gradients of a mean over many tokens" in message


def test_a_task_that_is_trained_on_and_a_teacher_that_is_the_student_are_told() -> None:
    rows = {"kind": "jsonl", "path": "p.jsonl"}
    task = {"name": "t", "source": {**rows, "name": "other"}, "grader": {"kind": "exact"}}
    base = {"student": {"model": "s"}, "teacher": {"model": "t"}, "prompts": {"sources": [rows]}}
    with pytest.warns(ConfigWarning, match="rows that are trained on"):
        check(Config.model_validate({**base, "evals": {"tasks": [task]}}))
    with pytest.warns(ConfigWarning, match="the same model"):
        check(Config.model_validate({**base, "teacher": {"model": "s"}}))
    gym = {"kind": "reasoning_gym", "task": "chain_sum"}
    fresh = {"name": "t", "source": {**gym, "seed": 1, "name": "held"}, "grader": {"kind": "reasoning_gym"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(Config.model_validate({**base, "prompts": {"sources": [gym]}, "evals": {"tasks": [fresh]}}))
        check(Config.model_validate({**base, "teacher": {"model": "s", "format": {"system_prompt": "Think."}}}))
