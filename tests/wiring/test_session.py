"""What a run passes on from its config to its rooms, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import opd
from opd.errors import BadInput, TrainingDiverged
from opd.journal.reader import read_environment, read_evals, read_metrics, read_rollouts, read_summary
from opd.rollouts.engine import EmbeddedEngine
from opd.wiring import build
from tests import tiny

SHORT = {"prompts": ["What is 2 + 2?", "Sort: hgfe", "hi"], "sampling": {"max_tokens": 8, "samples_per_prompt": 2}}
TASK = {"name": "sums", "source": {"kind": "inline", "rows": [{"prompt": "1 + 1?", "answer": "2"}]}}
TASK["grader"] = {"kind": "exact"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1, scale=10.0)


def distill(models, folder: Path, **changes):
    run = {"folder": str(folder), "steps": 2, **changes.pop("run", {})}
    return opd.distill(*models, **{**SHORT, **changes}, run=run, quiet=True)


def test_every_rollout_names_the_weights_that_wrote_it(models, tmp_path: Path) -> None:
    run = distill(models, tmp_path / "run", run={"steps": 3})
    versions = [{row["policy_version"] for row in read_rollouts(run.folder, step)} for step in (1, 2, 3)]
    assert versions == [{0}, {1}, {2}]


def test_evals_meet_the_same_noise_at_every_step_and_another_under_another_seed(models, tmp_path: Path) -> None:
    ids, answers = [], []
    for seed in (0, 1):
        still = {"optim": {"lr": 1e-30}, "evals": {"tasks": [TASK], "every": 1}, "run": {"seed": seed}}
        run = distill(models, tmp_path / str(seed), **still)
        lines = [line for line in read_evals(run.folder) if line["model"] == "student"]
        assert [line["step"] for line in lines] == [0, 1, 2]
        ids += [line["answers"][0]["id"] for line in lines]
        answers.append({line["answers"][0]["answer"] for line in lines})
    assert len(set(ids)) == 1 and all(len(seen) == 1 for seen in answers), "weights that stand still answer the same"
    assert answers[0] != answers[1]


def test_each_model_takes_the_tasks_in_its_own_format_and_the_teacher_only_when_asked(
    models, tmp_path: Path, monkeypatch
) -> None:
    asked: dict[str, set[int]] = {}
    generate = EmbeddedEngine.generate

    def noted(self, prompts_P, params, *, tag):
        if tag.startswith("eval/"):
            asked.setdefault(self._model.name.split()[0], set()).add(len(prompts_P[0].ids))
        return generate(self, prompts_P, params, tag=tag)

    monkeypatch.setattr(EmbeddedEngine, "generate", noted)
    teacher = {"model": models[1], "format": {"system_prompt": "You are a teacher of many words."}}
    distill((models[0], teacher), tmp_path / "a", evals={"tasks": [TASK]})
    assert asked["teacher"].isdisjoint(asked["student"])
    run = distill(models, tmp_path / "b", evals={"tasks": [TASK], "teacher": False})
    assert {line["model"] for line in read_evals(run.folder)} == {"student"}
    assert read_summary(run.folder)["teacher"] is None


def test_the_final_model_has_the_type_of_its_source_and_all_ends(models, tmp_path: Path) -> None:
    module = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    module.save_pretrained(tmp_path / "half")
    tiny.tokenizer().save_pretrained(tmp_path / "half")
    ends = {"end_tokens": ["<|im_end|>", "<|endoftext|>"]}
    student = {"model": str(tmp_path / "half"), "format": ends, "device": "cpu", "dtype": "float32"}
    run = distill((student, {"model": models[1], "format": ends}), tmp_path / "run")
    final = AutoModelForCausalLM.from_pretrained(run.student)
    assert final.dtype == torch.bfloat16 and final.generation_config.eos_token_id == [2, 0]


def test_a_skipped_step_is_dumped_and_a_run_that_diverges_says_failed(models, tmp_path: Path, monkeypatch) -> None:
    norms = iter([torch.tensor(1.0), torch.tensor(float("inf"))])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: next(norms))
    with pytest.raises(TrainingDiverged):
        distill(models, tmp_path / "run", learner={"max_bad_steps": 1})
    dumped = json.loads((tmp_path / "run" / "dumps" / "step_000002_not-finite.json").read_text())
    assert dumped["rollouts"] and all(name.startswith("train/1/") for name in dumped["rollouts"])
    summary = read_summary(tmp_path / "run")
    assert summary["status"] == "failed" and summary["steps"] == 2


@pytest.mark.parametrize("broken", [False, True])
def test_graders_are_closed_however_the_run_ends(models, tmp_path: Path, monkeypatch, broken: bool) -> None:
    made, closed = [], []
    make = build.make_grader

    def noted(*args, **kwargs):
        grader = make(*args, **kwargs)
        close = grader.close
        grader.close = lambda: (closed.append(grader), close())
        made.append(grader)
        return grader

    monkeypatch.setattr(build, "make_grader", noted)
    if broken:
        with pytest.raises(BadInput):
            distill(models, tmp_path / "run", evals={"tasks": [TASK]}, sampling={"max_tokens": 10**7})
    else:
        distill(models, tmp_path / "run", evals={"tasks": [TASK]})
    assert made and closed == made


def test_threads_and_the_teachers_work_are_in_the_record(models, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run = distill(models, tmp_path / "run", run={"threads": 3})
    finally:
        torch.set_num_threads(before)
    assert read_environment(run.folder)["threads"] == 3
    assert read_metrics(run.folder)[0]["flops_teacher_scoring"] > 0
