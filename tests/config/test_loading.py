"""Merging, overrides, kinds, and where values come from."""

from __future__ import annotations

import json

import pytest

from opd.config.loading import changeable, given, json_schema, load_config
from opd.config.slots import Sampled
from opd.errors import ConfigError
from tests.config.recipes import BASE, TASK, load, refused, write


def test_later_files_win_sections_merge_and_lists_are_replaced(tmp_path):
    first = write(tmp_path, BASE + "optim: {lr: 1e-3, betas: [0.5, 0.6]}\n", "first.yaml")
    second = write(
        tmp_path, '[optim]\nbetas = [0.7, 0.8]\n[[prompts.sources]]\nkind = "parquet"\npath = "b"\n', "2.toml"
    )
    config = load_config(
        [first, second], ["run.seed=3"], base={"optim": {"lr": 1, "eps": 1e-6}, "run": {"seed": 1}}
    ).config
    assert (config.optim.lr, config.optim.betas, config.optim.eps, config.run.seed) == (1e-3, (0.7, 0.8), 1e-6, 3)
    assert [source.kind for source in config.prompts.sources] == ["parquet"]


def test_a_mapping_among_the_files_counts_in_its_place(tmp_path):
    recipe = write(tmp_path, BASE + "run: {seed: 1, steps: 7}\n")
    loaded = load_config([recipe, {"run": {"seed": 2}, "student": {"format": {"end_tokens": ("a",)}}}])
    assert (loaded.config.run.seed, loaded.config.run.steps) == (2, 7)
    assert loaded.config.student.format.end_tokens == ("a",)
    assert loaded.origins["run.seed"] == "arguments"


def test_every_form_of_override(tmp_path):
    loaded = load(
        tmp_path,
        BASE + TASK,
        "optim.lr=1e-4",
        "--run.seed",
        "3",
        "--run.steps=7",
        "optim.betas=[0.9,0.99]",
        "evals.tasks.0.samples=4",
        "evals.tasks.0.sampling.temperature=0.5",
        "student.format.chat_template_kwargs={enable_thinking: false}",
        "prompts.sources.1={kind: reasoning_gym, task: chain_sum}",
        "prompts.sources.1.settings.min_terms=2",
        "teacher.revision=null",
    )
    config = loaded.config
    assert (config.optim.lr, config.run.seed, config.run.steps, config.optim.betas) == (1e-4, 3, 7, (0.9, 0.99))
    assert (config.evals.tasks[0].samples, config.evals.tasks[0].sampling.temperature) == (4, 0.5)
    assert config.student.format.chat_template_kwargs == {"enable_thinking": False}
    assert config.prompts.sources[1].settings == {"min_terms": 2}
    assert config.teacher.revision is None


def test_a_run_without_any_file():
    overrides = ["student.model=s", "teacher.model=t", "prompts.sources.0.kind=jsonl", "prompts.sources.0.path=7"]
    config = load_config([], overrides).config
    assert (config.student.model, config.prompts.sources[0].path) == ("s", "7")


@pytest.mark.parametrize(
    ("value", "read"),
    [("1234", "1234"), ("{prompt}", "{prompt}"), ("[a", "[a"), ("true", "true"), ('"{prompt}\\n"', "{prompt}\n")],
)
def test_text_options_take_the_text_of_an_override(tmp_path, value, read):
    assert load(tmp_path, BASE, f"student.tokenizer={value}").config.student.tokenizer == read


def test_overrides_replace_whole_sections(tmp_path):
    text = BASE + "objective: {preset: jsd, parameters: {beta: 0.1}}\n"
    assert load(tmp_path, text, "objective={preset: tml}").config.objective.terms[0].support == Sampled()
    assert load(tmp_path, text, "objective.parameters={}").config.objective.terms[0].shape.beta == 0.5


def test_changing_the_kind_drops_what_only_the_old_kind_has(tmp_path):
    task = TASK.replace("kind: exact", "kind: numeric, tolerance: 0.1, timeout: 2")
    loaded = load(tmp_path, BASE + task, "evals.tasks.0.grader.kind=exact", "prompts.sources.0.kind=parquet")
    grader = loaded.config.evals.tasks[0].grader
    assert (grader.kind, grader.timeout) == ("exact", 2)
    assert loaded.config.prompts.sources[0].path == "a.jsonl"
    said = refused(tmp_path, BASE + task, "evals.tasks.0.grader={kind: exact, tolerance: 0.1}")
    assert "evals.tasks.0.grader.tolerance: only kind numeric has this option" in said
    said = refused(tmp_path, BASE + task, "evals.tasks.0.grader.kind=exact", "evals.tasks.0.grader.tolerance=1")
    assert "given: 1 (command line: evals.tasks.0.grader.tolerance=1)" in said


def test_a_section_whose_lines_are_all_comments_is_the_section_with_defaults(tmp_path):
    first = write(tmp_path, BASE + "optim:\n  lr: 1e-3\nevals:\n  tasks:\n    # - none yet\n", "first.yaml")
    config = load_config([first, write(tmp_path, "optim:\n  # lr: 5\nsampling:\nrun: {seed: 1}\n")]).config
    assert config.optim.lr == 1e-3
    assert (
        load(tmp_path, BASE.replace("teacher: {model: big}", "teacher:"), "objective.preset=sft").config.teacher is None
    )


def test_origins_are_exact_and_complete(tmp_path):
    recipe = write(tmp_path, BASE + "optim:\n  lr: 1e-4\nobjective:\n  preset: jsd\n")
    second = write(tmp_path, "[run]\nseed = 4\n", "second.toml")
    loaded = load_config([recipe, second], ["run.steps=5", "--optim.eps", "1e-7"])
    origins = {path: origin.replace(f"{tmp_path}/", "") for path, origin in loaded.origins.items()}
    assert origins["student.model"] == "recipe.yaml:1"
    assert origins["prompts.sources.0.path"] == "recipe.yaml:5"
    assert origins["optim.lr"] == "recipe.yaml:7"
    assert origins["objective.terms.0.shape.beta"] == origins["objective.behaviour.kind"] == "recipe.yaml:9"
    assert origins["run.seed"] == "second.toml:2"
    assert origins["run.steps"] == origins["optim.eps"] == "command line"
    assert origins["optim.betas"] == origins["evals.tasks"] == origins["objective.student_temperature"] == "default"
    assert origins["student.revision"] == "default"


def test_a_replaced_value_has_the_origin_of_what_replaced_it(tmp_path):
    text = BASE + "sampling:\n  top_k: 1\nobjective:\n  preset: jsd\n  parameters:\n    beta: 0.1\n"
    assert load(tmp_path, text).origins["objective.parameters.beta"].endswith("recipe.yaml:11")
    loaded = load(tmp_path, text, "objective.parameters={beta: 0.2}")
    assert loaded.origins["objective.parameters.beta"] == "command line"


def test_given_shows_what_was_said_and_reads_back(tmp_path):
    config = load(tmp_path, BASE + "objective: {preset: tml}\noptim: {lr: 1e-4}\n").config
    said = given(config)
    assert said["objective"] == {"preset": "tml"} and said["optim"] == {"lr": 1e-4} and "run" not in said
    assert load_config([said]).config == config


def test_json_schema_refuses_unknown_keys_and_is_json():
    schema = json.loads(json.dumps(json_schema()))
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"student", "prompts"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", "optim.lr: this has no value\n  from: command line"),
        ("--optim.lr", "--optim.lr: this has no value"),
        ("optim..lr=1", "optim..lr=1: this names no option"),
        ("=1", "=1: this names no option"),
        ("prompts.sources.3.path=x", "prompts.sources has 1 entries: a number from 0 to 1 is needed after it"),
        ("prompts.sources.first.path=x", "prompts.sources has 1 entries"),
        ("optim.betas=[0.9", "optim.betas: this is not valid YAML"),
        ("optim.betas=[1, *a]", "optim.betas: anchors and aliases"),
        ("optim={lr: 1, lr: 2}", "optim: this is given twice"),
        ("optim.lr.x=3", 'optim.lr: this value does not fit\n  given: {"x": 3} (command line: optim.lr.x=3)'),
        ("optim=null", "optim: this value does not fit\n  given: null (command line: optim=null)"),
    ],
)
def test_overrides_that_cannot_be_used(tmp_path, override, said):
    assert said in refused(tmp_path, BASE, override)


def test_arguments_that_are_not_data():
    with pytest.raises(ConfigError, match=r"student\.model: object is not plain data"):
        load_config([], base={"student": {"model": object()}})
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config([], ["student.model=\ud800"])


@pytest.mark.parametrize(
    ("option", "may"),
    [
        ("run.steps", True),
        ("views.every", True),
        ("teacher.device", True),
        ("scorers.maths.device", True),
        ("scorers.maths.offload", True),
        ("scorers.maths.model", False),
        ("scorers.maths.weights", False),
        ("teacher.temperature", False),
        ("objective.preset", False),
    ],
)
def test_what_may_change_when_a_run_goes_on(option, may):
    assert changeable(option) == may


def test_scorers_of_any_name_are_set_and_merged(tmp_path):
    text = BASE + "scorers: {reference: {model: a, offload: cpu}}\nobjective: {preset: exopd}\n"
    config = load(tmp_path, text, "scorers.reference.model=b").config
    assert (config.scorers["reference"].model, config.scorers["reference"].offload) == ("b", "cpu")
    made = load(
        tmp_path, BASE + "objective: {preset: exopd}\n", "scorers.reference.weights=past", "scorers.reference.every=7"
    )
    assert (made.config.scorers["reference"].weights, made.config.scorers["reference"].every) == ("past", 7)
    assert made.origins["scorers.reference.every"] == "command line"


def test_mixtures_are_read_from_every_kind_of_file(tmp_path):
    mixture = (
        "objective: {preset: gkd, behaviour: {kind: mixture, of: [{writer: student, share: 0.25}, {writer: "
        "{kind: teacher}, share: 0.75}]}}\n"
    )
    config = load(tmp_path, BASE + mixture).config
    assert [part.share for part in config.objective.behaviour.of] == [0.25, 0.75]
    config = load(tmp_path, BASE + mixture, "objective.behaviour.of.0.writer=dataset").config
    assert config.objective.behaviour.of[0].writer.kind == "dataset"
