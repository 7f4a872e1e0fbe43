"""Stage 1: templates, ends and data, on real tokenizers and without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.loading import load_config
from opd.config.schema import Config
from opd.doctor import text
from opd.doctor.examine import Options, examine
from opd.doctor.findings import Finding
from opd.wiring.build import load_prompts
from tests import crossing, tiny

MUTE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
DEAF = "<|im_start|>user\n<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def config(
    folder: Path, *, rows=("hi", "ho"), teacher: dict | None = None, student: dict | None = None, seed=0, **changes
) -> Config:
    models = {who: tiny.save(folder / who, seed=2 * seed + n) for n, who in enumerate(("student", "teacher"))}
    return load_config(
        [],
        base={
            "student": {"model": models["student"], **(student or {})},
            "teacher": {"model": models["teacher"], **(teacher or {})},
            "prompts": {"sources": [{"kind": "inline", "rows": list(rows)}], "per_step": 2},
            "sampling": {"max_tokens": 8, "samples_per_prompt": 1},
            "objective": {"preset": "reverse_kl"},
            **changes,
        },
    ).config


def with_template(folder: Path, template: str) -> None:
    words = tiny.tokenizer()
    words.chat_template = template
    words.save_pretrained(folder)


def found(config: Config) -> dict[str, Finding]:
    return {finding.check: finding for finding in text.load(config)[1]}


def test_a_template_that_is_whole_is_not_remarked_upon(tmp_path):
    assert {finding.level for finding in found(config(tmp_path)).values()} == {"ok"}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_missing_generation_prompt_is_named(tmp_path, who, seed):
    made = config(tmp_path, seed=seed, rows=[f"{word} {seed}" for word in ("hi", "ho")])
    with_template(tmp_path / who, MUTE)
    finding = found(made)["template"]
    assert finding.asks == "mend_template" and who in finding.said and "<|im_start|>assistant" in finding.said
    assert examine(made, Options(updates=False)).verdict == "mend_template"


def test_a_template_that_leaves_the_question_out_is_named(tmp_path):
    made = config(tmp_path)
    with_template(tmp_path / "teacher", DEAF)
    assert "leaves the user's question out" in found(made)["template"].said


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_A_16_an_end_that_the_teacher_cannot_read_stops_before_weights_are_loaded(tmp_path, seed):
    end = "aeo"[seed]
    report = examine(config(tmp_path, seed=seed, teacher={"format": {"end_tokens": [end]}}))
    assert report.verdict == "mend_template" and {finding.stage for finding in report.findings} == {1}


def test_ends_that_cannot_be_exchanged_are_the_templates_fault(tmp_path):
    other = config(tmp_path / "a", teacher={"format": {"end_tokens": ["a"]}})
    assert found(other)["agreement"].asks == "mend_template"


def test_A_12_another_tokenizer_is_said_with_what_is_shared_and_is_no_reason_to_stop(tmp_path):
    made = config(tmp_path)
    crossing.save(tmp_path / "teacher", "unigram")
    finding = found(made)["agreement"]
    assert finding.level == "ok" and 0.3 < finding.figures["vocabulary"] < 1
    assert "teacher has another tokenizer" in finding.said and "reads as its own '<|im_end|>'" in finding.said
    assert text.load(made)[0] is not None


def test_what_no_run_can_do_across_tokenizers_is_the_configs_fault(tmp_path):
    terms = [{"name": "a"}, {"name": "b", "support": {"kind": "sampled"}, "alignment": "span"}]
    made = config(tmp_path, objective={"behaviour": "student", "terms": terms})
    crossing.save(tmp_path / "teacher", "unigram")
    texts, findings = text.load(made)
    stop = next(finding for finding in findings if finding.level == "stop")
    assert texts is None and stop.asks == "mend_config" and "another tokenizer" in stop.said


def test_an_alignment_that_nobody_needs_is_a_note(tmp_path):
    finding = found(config(tmp_path, objective={"preset": "span"}))["alignment"]
    assert finding.level == "note" and "each token is a span of its own" in finding.said


def test_an_end_that_only_one_side_knows_is_a_warning(tmp_path):
    ends = {"format": {"end_tokens": ["<|im_end|>", "<|endoftext|>"]}}
    assert found(config(tmp_path, teacher=ends))["agreement"].level == "warn"


def test_prompts_that_were_rendered_before_are_found(tmp_path):
    rendered = [f"<|im_start|>user\n{n}<|im_end|>\n<|im_start|>assistant\n" for n in range(4)]
    for rows, level in ((rendered, "stop"), ([*"abcdefg", rendered[0]], "note"), ("abc", None)):
        made = config(tmp_path / str(level), rows=rows)
        texts, _ = text.load(made)
        assert texts is not None
        forged = [
            f for f in text.prompt_findings(made, texts, load_prompts(made, texts.student), []) if f.check == "forged"
        ]
        assert [finding.level for finding in forged] == ([level] if level else [])


def test_repeated_prompts_are_found(tmp_path):
    made = config(tmp_path, rows=["hi"] * 6 + ["ho", "hu"])
    texts, _ = text.load(made)
    assert texts is not None
    findings = text.prompt_findings(made, texts, load_prompts(made, texts.student), [])
    assert [f.figures["different"] for f in findings if f.check == "repeats"] == [3]


def test_the_difference_of_two_prompts_is_shown(tmp_path):
    made = config(tmp_path, teacher={"format": {"system_prompt": "Think."}})
    texts, _ = text.load(made)
    assert texts is not None
    shown, findings = text.shown_difference(texts, load_prompts(made, texts.student))
    assert "Think." in "".join(shown.values()) and [finding.check for finding in findings] == ["rendering"]


def test_what_a_run_would_refuse_is_a_finding(tmp_path):
    made = config(tmp_path, student={"tokenizer": None})
    long = made.model_copy(update={"sampling": made.sampling.model_copy(update={"max_tokens": 10**6})})
    report = examine(long)
    assert report.verdict == "mend_config" and "sampling.max_tokens" in report.reasons[0].said
