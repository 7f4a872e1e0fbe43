"""From a config to the counts of a step: who writes how much, who reads how much, in which type."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.loading import load_config
from opd.costs.roofline import Step
from opd.wiring.build import load_prompts, load_texts
from opd.wiring.roofline import changed
from opd.wiring.workload import Answers, planned_answers, workload
from tests import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1)


def config(models: tuple[str, str], **changes):
    rows = [{"prompt": "hi", "completion": "a b c"}, {"prompt": "Sort: hgfe", "completion": "e f g h i j k l"}]
    base = {
        "student": {"model": models[0]},
        "teacher": {"model": models[1]},
        "prompts": {"sources": [{"kind": "inline", "rows": rows}], "per_step": 6},
        "sampling": {"max_tokens": 8, "samples_per_prompt": 3},
    }
    return load_config([{**base, **changes}]).config


def made(given, answers: Answers | None = None, tokens: int | None = None) -> Step:
    texts = load_texts(given)
    prompts = load_prompts(given, texts.student)
    return workload(given, texts, prompts, answers or planned_answers(given, prompts, tokens))


@pytest.mark.filterwarnings("ignore:learner.updates_per_batch")
def test_the_student_writes_and_its_teacher_reads(models) -> None:
    given = config(models, engine={"slots": 4, "dtype": "bfloat16"}, learner={"updates_per_batch": 2})
    step = made(given)
    texts = load_texts(given)
    lengths = [len(p.ids) for p in load_prompts(given, texts.student).prompts()]
    assert step.text.prompts == 6 and step.text.answers == 18 and step.text.answer_tokens == 8
    assert step.text.prompt_tokens == pytest.approx(sum(lengths) / 2)
    writing, reading = step.writing["student"], step.scoring["teacher"]
    assert writing.passes == 5 * 7 and (writing.model.dtype, writing.model.stored) == ("bfloat16", "bfloat16")
    assert (step.student.dtype, step.student.stored) == ("float32", "float32")
    assert reading.whole and reading.text == step.text and step.updates == 2 and step.trainable is None
    assert step.looks == "none" and step.devices == (step.student.device,)
    assert made(given, tokens=3).text.answer_tokens == 3


def test_drawn_tokens_and_what_must_be_seen_first(models) -> None:
    step = made(config(models, objective={"preset": "tml"}))
    assert not step.scoring["teacher"].whole


def test_data_is_as_long_as_it_is_and_nobody_writes(models) -> None:
    given = config(models, objective={"preset": "sft"}, teacher=None)
    step = made(given)
    texts = load_texts(given)
    lengths = [min(8, len(p.completion_ids)) for p in load_prompts(given, texts.student).prompts()]
    assert step.text.answers == 6 and step.text.answer_tokens == pytest.approx(sum(lengths) / 2)
    assert not step.writing and not step.scoring


def test_a_teacher_that_writes_and_is_not_asked_afterwards(models) -> None:
    step = made(config(models, objective={"behaviour": "teacher", "terms": [{"kind": "data", "name": "a"}]}))
    assert step.writing.keys() == {"teacher"} and not step.scoring


def test_two_models_write_together_and_a_mixture_shares_the_prompts(models) -> None:
    mixed = {"behaviour": {"kind": "teacher_mixed"}, "terms": [{"name": "a", "target": "teacher"}]}
    step = made(config(models, objective=mixed))
    assert step.writing.keys() == {"student", "teacher"} and step.writing["teacher"].text.answers == 18
    shares = [{"writer": "student", "share": 0.5}, {"writer": "dataset", "share": 0.5}]
    step = made(config(models, objective={**mixed, "behaviour": {"kind": "mixture", "of": shares}}))
    assert step.text.answers == 3 * 3 + 3 and step.writing["student"].text.answers == 9
    only = {**mixed, "behaviour": {"kind": "mixture", "of": shares}}
    only["terms"] = [
        {"name": "a", "target": "teacher", "written_by": ["student"]},
        {"kind": "data", "name": "b", "written_by": ["dataset"]},
    ]
    step = made(config(models, objective=only))
    assert step.scoring["teacher"].text.answers == pytest.approx(9)


def test_the_answers_of_a_run_are_taken_as_they_were(models) -> None:
    step = made(config(models, engine={"slots": 4}), Answers(tokens=5, longest=8, number=36))
    assert step.text.answers == 36 and step.writing["student"].passes == 36 * 4 / 4
    assert made(config(models), Answers(tokens=5, longest=8, number=18)).writing["student"].passes == 7


def test_an_adapter_leaves_the_rest_frozen(models) -> None:
    pytest.importorskip("peft")
    given = config(models, student={"model": models[0], "lora": {"rank": 2}})
    step = made(given)
    assert step.trainable is not None and 0 < step.trainable < step.student.size.parameters / 2


def test_rows_of_a_head_that_no_token_has_are_not_counted(models, tmp_path: Path) -> None:
    wide = tiny.save(tmp_path / "wide", seed=0, vocab_size=1000)
    plain, padded = made(config(models)).student, made(config((wide, models[1]))).student
    assert padded.head == plain.head and padded.size.parameters > plain.size.parameters
    assert padded.weight_bytes == plain.weight_bytes
    assert padded.size.active_parameters == plain.size.active_parameters


def test_every_change_is_a_config_that_loads(models) -> None:
    """An option that is advised must exist, and be taken with its value."""
    scorers = {"other": {"model": models[1], "offload": "cpu"}}
    target = {"kind": "product", "weights": {"teacher": 0.5, "other": 0.5}}
    objective = {"behaviour": "student", "terms": [{"name": "a", "target": target}]}
    base = {
        "scorers": scorers,
        "objective": objective,
        "engine": {"slots": 4},
        "learner": {"tokens_per_micro_batch": 9},
    }
    given = config(models, **base)
    found = dict(changed(given, made(given)))
    assert set(found) == {
        "engine.slots=18",
        "engine.dtype=bfloat16",
        "student.dtype=bfloat16",
        "learner.tokens_per_micro_batch=18",
        "teacher.dtype=bfloat16",
        "scorers.other.dtype=bfloat16",
        "scorers.other.offload=none",
    }
    for option, other in found.items():
        assert load_config([given.model_dump(mode="json")], [option]).config == other
    assert "prompts.per_step=12" in dict(changed(config(models), made(config(models))))
