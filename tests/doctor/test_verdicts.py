"""Pairs whose right answer is known, each on three seeds: other weights, other problems, other noise."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config.loading import load_config
from opd.doctor.examine import Options, examine
from opd.doctor.findings import Report
from tests.doctor import cases

LOOK = Options(rollouts=32, updates=False)
MARKUP = {"format": {"plain_template": "user: {prompt}\nassistant:"}}
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2)))


def looked_at(folder: Path, student: Path, teacher: Path, **changes) -> Report:
    return examine(cases.recipe(folder / "recipe", student, teacher, **changes), LOOK)


def stops(report: Report) -> set[str]:
    return {finding.check for finding in report.findings if finding.level == "stop"}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_better_teacher_of_the_same_family_is_a_go(tmp_path, seed):
    report = looked_at(tmp_path, cases.STUDENT, cases.TEACHER, seed=seed)
    assert report.verdict == "go" and not stops(report)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_student_without_support_needs_sft_first(tmp_path, seed):
    student = cases.changed(tmp_path / "student", cases.STUDENT, cases.another_order, seed=seed)
    report = looked_at(tmp_path, student, cases.TEACHER, seed=seed)
    assert report.verdict == "cold_start" and stops(report) == {"support"}
    assert "objective.preset=seqkd" in report.changes


@pytest.mark.parametrize("seed", SEEDS)
def test_an_untrained_student_needs_sft_first(tmp_path, seed):
    student = cases.changed(tmp_path / "student", cases.STUDENT, cases.random_weights, seed=seed)
    assert looked_at(tmp_path, student, cases.TEACHER, seed=seed).verdict == "cold_start"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_foreign_teacher_is_to_be_replaced(tmp_path, seed):
    teacher = cases.changed(tmp_path / "teacher", cases.TEACHER, cases.another_order, seed=seed)
    assert looked_at(tmp_path, cases.STUDENT, teacher, seed=seed).verdict == "another_teacher"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_teacher_that_is_worse_than_the_student_is_to_be_replaced(tmp_path, seed):
    report = looked_at(tmp_path, cases.TEACHER, cases.STUDENT, seed=seed)
    assert report.verdict == "another_teacher" and "ability" in stops(report)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("graded", [True, False])
def test_A_10_a_teacher_that_reads_markup_it_never_saw_needs_another_format(tmp_path, seed, graded):
    report = looked_at(tmp_path, cases.STUDENT, cases.TEACHER, seed=seed, graded=graded, teacher_=MARKUP)
    assert report.verdict == "mend_template" and "format" in stops(report)
    assert "teacher.format.plain_template='{prompt}'" in report.changes
    assert report.shown, "the two prompts are shown side by side"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", [cases.random_weights, cases.permuted_head, cases.nearly_uniform])
def test_X_9_a_useless_teacher_is_to_be_replaced(tmp_path, seed, change):
    teacher = cases.changed(tmp_path / "teacher", cases.TEACHER, change, seed=seed)
    assert looked_at(tmp_path, cases.STUDENT, teacher, seed=seed).verdict == "another_teacher"


@pytest.mark.parametrize("seed", SEEDS)
def test_A_12_a_good_teacher_with_another_tokenizer_is_a_go(tmp_path, seed):
    teacher = cases.foreign(tmp_path / "teacher", cases.TEACHER, seed=seed)
    report = looked_at(tmp_path, cases.STUDENT, teacher, seed=seed)
    assert report.verdict == "go" and not stops(report)
    said = {finding.check: finding for finding in report.findings}
    assert said["alignment"].level == "ok" and said["alignment"].figures["same"] == 1
    assert said["ability"].level == "ok" and said["resolution"].figures["variance_ratio"] is not None


@pytest.mark.parametrize("seed", SEEDS)
def test_X_9_a_useless_teacher_with_another_tokenizer_is_to_be_replaced(tmp_path, seed):
    teacher = cases.foreign(tmp_path / "teacher", cases.TEACHER, cases.random_weights, seed=seed)
    assert looked_at(tmp_path, cases.STUDENT, teacher, seed=seed).verdict == "another_teacher"


@pytest.mark.slow
@pytest.mark.parametrize("graded", [True, False])
def test_A_10_markup_is_found_across_tokenizers(tmp_path, graded):
    teacher = cases.foreign(tmp_path / "teacher", cases.TEACHER)
    report = looked_at(tmp_path, cases.STUDENT, teacher, graded=graded, teacher_=MARKUP)
    assert report.verdict == "mend_template" and "format" in stops(report)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["shared_top_k", "span", "gold", "uld", "alm"])
def test_every_alignment_is_looked_at(tmp_path, preset):
    for who, verdict in ((None, "go"), (cases.random_weights, "another_teacher")):
        teacher = cases.foreign(tmp_path / f"teacher-{verdict}", cases.TEACHER, who)
        report = looked_at(tmp_path / verdict, cases.STUDENT, teacher, objective={"preset": preset})
        assert report.verdict == verdict


@pytest.mark.parametrize("seed", SEEDS)
def test_a_teacher_of_nan_is_found_when_it_is_loaded(tmp_path, seed):
    teacher = cases.changed(tmp_path / "teacher", cases.TEACHER, cases.not_a_number, seed=seed)
    report = looked_at(tmp_path, cases.STUDENT, teacher, seed=seed)
    assert report.verdict == "another_teacher" and stops(report) == {"teacher"}
    assert not any(finding.stage > 3 for finding in report.findings), "nothing is spent on it"


@settings(max_examples=4)
@given(seed=st.integers(0, 10_000), graded=st.booleans(), permuted=st.booleans())
def test_a_permuted_or_uniform_teacher_is_never_a_go(tmp_path_factory, seed, graded, permuted):
    folder = tmp_path_factory.mktemp("pair")
    change = cases.permuted_head if permuted else cases.nearly_uniform
    teacher = cases.changed(folder / "teacher", cases.TEACHER, change, seed=seed)
    report = looked_at(folder, cases.STUDENT, teacher, seed=seed, graded=graded)
    assert report.verdict != "go"


def test_the_same_config_gets_the_same_report(tmp_path):
    config = cases.recipe(tmp_path, cases.STUDENT, cases.TEACHER)
    first, second = (examine(config, Options(rollouts=8, updates=False)).record() for _ in range(2))
    for record in (first, second):
        del record["seconds"]
        for finding in record["findings"]:
            if finding["check"] == "memory":  # what is free changes while one looks
                finding["figures"], finding["said"], finding["means"] = None, None, None
    assert first == second
    assert not Path(config.run.folder).exists(), "nothing is written"


def test_config_lines_are_lines_that_a_config_takes(tmp_path):
    student = cases.changed(tmp_path / "student", cases.STUDENT, cases.another_order)
    told: dict[str, None] = {}
    for name, report in {
        "support": looked_at(tmp_path / "a", student, cases.TEACHER),
        "format": looked_at(tmp_path / "b", cases.STUDENT, cases.TEACHER, teacher_=MARKUP),
        "limit": looked_at(tmp_path / "c", cases.STUDENT, cases.TEACHER, sampling_={"max_tokens": 4}),
    }.items():
        assert report.changes, name
        told |= dict.fromkeys(report.changes)
    base = cases.recipe(tmp_path / "d", cases.STUDENT, cases.TEACHER).model_dump(mode="json", exclude={"objective"})
    for line in told:
        if "..." not in line:  # what only the user knows
            load_config([], [line], base={**base, "objective": {"preset": "reverse_kl"}})
