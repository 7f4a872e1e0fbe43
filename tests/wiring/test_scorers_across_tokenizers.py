"""Scorers with other tokenizers in whole runs, from the config to the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import opd
from opd.config.schema import Scorer
from opd.journal.reader import read_events, read_metrics, read_rollouts
from opd.models.loading import load_frozen
from opd.text.tokenizer import load_tokenizer
from opd.wiring.score import score
from tests import crossing, tiny
from tests.serving.server import TOKEN, serving

MIXED = [
    {
        "kind": "inline",
        "name": "math",
        "rows": [{"prompt": "What is 2 + 2?", "hint": "even"}, {"prompt": "3 * 3?", "hint": "odd"}],
    },
    {"kind": "inline", "name": "code", "rows": ["Sort: hgfe", "hi"]},
    {"kind": "inline", "name": "own", "rows": ["jumps over", "the lazy dog"]},
]
ROUTED = {"kind": "routed", "routes": {"math": "teacher", "code": "words", "own": "same"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {"student": tiny.save(folder / "student", seed=0, scale=2.0), "same": tiny.save(folder / "same", seed=3)}
    made |= {name: crossing.save(folder / name, name, "llama", seed=1) for name in ("unigram", "byte_bpe_digits")}
    return made


def distill(models, folder: Path, objective: dict[str, Any], **sections: Any):
    run = {"folder": str(folder), "steps": 2, **sections.pop("run", {})}
    given = {
        "teacher": {"model": models["unigram"]},
        "prompts": {"sources": MIXED, "per_step": 6},
        "sampling": {"max_tokens": 8, "samples_per_prompt": 2},
        "optim": {"lr": 1e-2},
    }
    student = {"model": models["student"], **sections.pop("student", {})}
    given = {**given, **sections}
    return opd.distill(student, objective=objective, run=run, quiet=True, **given)


@pytest.mark.parametrize(
    "way",
    [
        {"support": "sampled", "alignment": "span"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"alignment": "gold"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_teachers_of_three_tokenizers_with_everything_else_in_one_run(models, tmp_path: Path, way) -> None:
    """Routed; a context of its own; on disk between steps, or in 4 bits; a student with an adapter; views too."""
    pytest.importorskip("peft")
    quantised = {}
    if "support" not in way:
        pytest.importorskip("bitsandbytes")
        quantised["quantisation"] = "int4"
    run = distill(
        models,
        tmp_path / "run",
        {"behaviour": "student", "terms": [{"name": "kl", "target": ROUTED, **way}]},
        teacher={"model": models["unigram"], "context": {"template": "{prompt} ({hint})"}, **quantised},
        scorers={"words": {"model": models["byte_bpe_digits"], "offload": "disk"}, "same": {"model": models["same"]}},
        student={"lora": {"rank": 4}},
        learner={"diagnostics_every": 1, "tokens_per_micro_batch": 60},
        views={"answers": 2, "every": 1},
    )
    assert run.summary["status"] == "done"
    for line in read_metrics(run.folder):
        assert np.isfinite(line["loss"]) and line["grad_norm"] > 0 and line["invalid_scores"] == 0
        for name in ("teacher", "words"):
            assert 0 < line[f"scorer/{name}/coverage"] <= 1 <= line[f"scorer/{name}/span_own_tokens"]
        assert "scorer/same/coverage" not in line
    (begin,) = (event for event in read_events(run.folder) if event["kind"] == "start")
    marks = begin["scorers"]
    assert len(marks["words"].split("-")) == len(marks["same"].split("-")) + 1, "also how tokens are joined"
    for rollout in read_rollouts(run.folder):
        if rollout["domain"] == "own":
            assert None not in rollout["teacher_logprobs"]


def test_answers_that_a_teacher_with_other_tokens_wrote_are_trained_in_the_students(models, tmp_path: Path) -> None:
    """SFT on a foreign teacher's own text: what it wrote, in ids that the student itself would have written."""
    term = {"kind": "data", "name": "sft"}
    run = distill(
        models,
        tmp_path / "run",
        {"behaviour": "teacher", "terms": [term]},
        sampling={"max_tokens": 12, "samples_per_prompt": 1},
    )
    tokenizer = load_tokenizer(models["student"])
    lines = list(read_rollouts(run.folder))
    assert len(lines) == 12
    for line in lines:
        assert line["behaviour"] == "teacher" and set(line["behaviour_logprobs"]) <= {None}
        assert 0 < len(line["response_ids"]) <= 12 and max(line["response_ids"]) < tokenizer.vocab_size
        if line["finish_reason"] == "stop":
            assert line["response_ids"][-1] == tokenizer.eos_id
    before, after = (load_file(Path(p) / "model.safetensors") for p in (models["student"], run.folder / "final"))
    assert any(not torch.equal(before[key], after[key]) for key in after)


SPAN = {"name": "kl", "support": "sampled", "alignment": "span", "importance": "ratio"}
LIKELY = {"name": "kl", "support": {"kind": "teacher_top_k", "k": 4}}


@pytest.mark.parametrize("of", ["data", pytest.param("run", marks=pytest.mark.slow)])
def test_answers_are_scored_by_a_teacher_with_other_tokens_and_trained_on_without_it(
    models, tmp_path: Path, of: str, monkeypatch
) -> None:
    """`opd score` asks what training asks: also about answers that are cut, and those that end."""
    quiet = {"views": {"answers": 0}}
    if of == "run":
        first = distill(models, tmp_path / "first", {"behaviour": "student", "terms": [SPAN]}, **quiet)
        answers, objective = first.folder, {"behaviour": {"kind": "cached", "run": str(first.folder)}, "terms": [SPAN]}
        said = score(answers, models["unigram"], out=tmp_path / "scores")
    else:
        answers = tmp_path / "data.jsonl"
        rows = [{"prompt": f"{n}?", "completion": text} for n, text in enumerate(crossing.TEXTS)]
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
        objective = {"behaviour": "dataset", "terms": [LIKELY]}
        quiet["prompts"] = {"sources": [{"kind": "jsonl", "path": str(answers), "name": "data"}], "per_step": 3}
        options = [f"student.model={models['student']}", "sampling.max_tokens=8"]
        said = score(answers, models["unigram"], out=tmp_path / "scores", top_k=4, options=options)
        assert 0 < said.cut < len(rows)
    assert said.answers == (24 if of == "run" else 6) and said.coverage == 1.0
    made = {}
    for name, cache in (("asked", None), ("kept", {"folder": str(tmp_path / "scores"), "only": True})):
        with monkeypatch.context() as patch:
            if cache is not None:
                patch.setattr("opd.wiring.scorers.load_frozen", None)  # no weights of a teacher are read
            teacher = {"model": models["unigram"], "cache": cache}
            run = distill(models, tmp_path / name, objective, teacher=teacher, **quiet)
        made[name] = load_file(run.folder / "final" / "model.safetensors"), read_metrics(run.folder)
    for mine, theirs in zip(made["asked"][1], made["kept"][1], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert mine["scorer/teacher/coverage"] == theirs["scorer/teacher/coverage"]
    for key, weight in made["asked"][0].items():
        assert (weight - made["kept"][0][key]).abs().max() < 1e-3


@pytest.mark.parametrize(
    "way",
    [{"alignment": "gold"}, pytest.param({"support": {"kind": "student_top_k", "k": 4}}, marks=pytest.mark.slow)],
    ids=str,
)
def test_X_4_a_served_teacher_with_other_tokens_teaches_what_a_local_one_does(
    models, tmp_path: Path, way, monkeypatch
) -> None:
    """It has more tokens than the student: it is tried out with its own, and its head is read by its own."""
    monkeypatch.setenv("OPD_TEACHER_TOKEN", TOKEN)
    sizes = [load_tokenizer(models[name]).vocab_size for name in ("student", "unigram")]
    assert sizes[0] < sizes[1]
    model = load_frozen(Scorer(model=models["unigram"]), sizes[1], role="teacher")
    objective = {"behaviour": "student", "terms": [{"name": "kl", **way}]}
    here = distill(models, tmp_path / "here", objective)
    with serving(model) as running:
        server = {"kind": "opd", "url": running.url, "timeout": 20, "patience": 20}
        there = distill(models, tmp_path / "there", objective, teacher={"model": models["unigram"], "server": server})
    for ours, theirs in zip(read_metrics(here.folder), read_metrics(there.folder), strict=True):
        for key in ("loss", "grad_norm", "scorer/teacher/coverage", "trained_tokens"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3), key
