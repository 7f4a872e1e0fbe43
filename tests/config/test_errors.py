"""Every kind of mistake in one option: the path, the value, where it came from, what is allowed, what is near."""

from __future__ import annotations

import re

import pytest

from tests.config.recipes import BASE, PROMPTS, STUDENT, TASK, TEACHER, refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "optim: {lrr: 1}\n",
            ["optim.lrr: there is no such option", "given: 1 (recipe.yaml:6)", "did you mean optim.lr?"],
        ),
        ("lr: 1e-5\n", ["lr: there is no such option", "given: 1e-05 (recipe.yaml:6)", "did you mean optim.lr?"]),
        ("learner: {lr: 1}\n", ["did you mean optim.lr?"]),
        ("optim: {steps: 9}\n", ["did you mean optim.eps or run.steps?"]),
        ("model: m\n", ["did you mean student.model or teacher.model?"]),
        ("optimm: {lr: 1}\n", ["optimm: there is no such option", "did you mean optim?"]),
        ("optim.lr: 1\n", ["in a file this is written optim: {lr: ...}"]),
        ("wholly_else: 1\n", ["allowed: student, teacher, scorers, prompts, sampling, engine, objective"]),
        (
            "optim: {lr: fast}\n",
            ["optim.lr: this value does not fit", 'given: "fast"', "allowed: a number greater than 0"],
        ),
        ("optim: {lr: '1e-5'}\n", ['given: "1e-5"', "allowed: a number greater than 0"]),
        ("optim: {lr: true}\n", ["given: true"]),
        ("optim: {lr: -1}\n", ["given: -1", "allowed: a number greater than 0"]),
        ("optim: {lr: .nan}\n", ['given: ".nan"']),
        (
            "optim: {betas: [0.9]}\n",
            ["optim.betas: this", "given: [0.9]", "allowed: a list of 2 entries, each a number"],
        ),
        ("optim: {betas: [1, 2, 3]}\n", ["optim.betas: this", "given: [1, 2, 3]"]),
        ("optim: {betas: [1, x]}\n", ["optim.betas.1: this value does not fit", 'given: "x"']),
        ("optim: {schedule: cosin}\n", ["there is no such choice", "one of constant, linear, cosine", "mean cosine?"]),
        ("optim: 3\n", ["optim: this value does not fit", "allowed: a section with the options lr, betas"]),
        ("run: {steps: 10.5}\n", ["given: 10.5", "allowed: a whole number at least 1"]),
        ("run: {threads: 0}\n", ["allowed: a whole number at least 1 and at most 4096, or null"]),
        ("prompts: {shuffle: no}\n", ['given: "no"', "allowed: true or false"]),
        ("run: {folder: 7}\n", ["run.folder: this is text: put it in quotes", "given: 7 (recipe.yaml:6)"]),
        ("evals: {confidence: 1}\n", ["allowed: a number greater than 0 and less than 1"]),
        (
            "evals: {tasks: {name: a}}\n",
            ["evals.tasks: this value does not fit", "allowed: a list of entries, each a section"],
        ),
        (TASK.replace("exact", "exakt"), ["evals.tasks.0.grader.kind: there is no such kind", "did you mean exact?"]),
        (TASK.replace("kind: exact", "timeout: 1"), ["evals.tasks.0.grader.kind: this is required and not given"]),
        (TASK.replace("{kind: exact}", "exact"), ["this is a section: write {kind: exact}"]),
        (
            TASK.replace("kind: exact", "kind: exact, timeout: 0"),
            ["evals.tasks.0.grader.timeout: this", "greater than 0"],
        ),
        (
            TASK.replace("path: b.jsonl", "task: x"),
            ["evals.tasks.0.source.task: only kind reasoning_gym has this option"],
        ),
        ("student: Qwen/Qwen3\n", ["student: this is given twice"]),
    ],
)
def test_O_22_one_mistake(tmp_path, text, said):
    error = refused(tmp_path, BASE + text)
    for part in said:
        assert part in error
    assert not re.search(r"pydantic|https?://|function-after|tagged-union|\.jsonl\.|\.exact\.|Input should", error)


def test_a_model_named_where_a_section_belongs(tmp_path):
    error = refused(tmp_path, "student: Qwen/Qwen3\n" + TEACHER + PROMPTS)
    assert "student: this is a section, not a single value" in error and "did you mean student.model?" in error


def test_required_options_say_where_their_section_stands(tmp_path):
    assert "student: this is required and not given\n  allowed: a section" in refused(tmp_path, TEACHER + PROMPTS)
    error = refused(tmp_path, STUDENT + TEACHER + "prompts:\n  sources:\n    - kind: jsonl\n")
    assert "prompts.sources.0.path: this is required and not given\n  from: recipe.yaml:5\n  allowed: text" in error


def test_bad_rows_of_an_inline_source_are_named_once_each(tmp_path):
    error = refused(tmp_path, STUDENT + TEACHER + "prompts: {sources: [{kind: inline, rows: [a, 5, {b: 1}, 6]}]}\n")
    assert error.startswith("2 problems in the config\nprompts.sources.0.rows.1: this value does not fit")
    assert "prompts.sources.0.rows.3:" in error and "allowed: text or a mapping" in error
    empty = refused(tmp_path, STUDENT + TEACHER + "prompts: {sources: [{kind: inline, rows: []}]}\n")
    assert "prompts.sources.0.rows: this value does not fit\n  given: []" in empty and "at least 1" in empty


def test_all_problems_come_at_once_from_files_and_command_line(tmp_path):
    text = BASE + "optim:\n  lrr: 1\n  eps: no\nrun:\n  steps: 0\n"
    error = refused(tmp_path, text, "optim.lrr=2", "learner.chunk=3", "oops", "evals.tasks.0.samples=x")
    assert error.startswith("9 problems in the config\n")
    assert "given: 2 (command line: optim.lrr=2)" in error
    assert 'given: "no" (recipe.yaml:8)' in error
    assert "given: 0 (recipe.yaml:10)" in error
    assert "did you mean learner.chunk_tokens?" in error
    assert "oops: this has no value" in error
    assert "evals.tasks.0.name: this is required and not given" in error


def test_long_values_are_cut(tmp_path):
    error = refused(tmp_path, BASE + f"optim: {{lr: {'x' * 500}}}\n")
    assert "x" * 70 in error and "x" * 90 not in error
