"""A run that trains an adapter, from the config to a folder that others load."""

from __future__ import annotations

import io
from pathlib import Path

import peft
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import opd
from opd.config.loading import load_config
from opd.journal.reader import read_evals, read_metrics
from opd.wiring.dry_run import dry_run
from tests import tiny
from tests.models.adapted import logprobs
from tests.wiring.test_session import SHORT, TASK

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1)


def test_an_adapter_is_trained_exported_and_given_back_as_a_model(models, tmp_path: Path) -> None:
    """The same run twice, with both forms of the export; the adapter's folder is a teacher of the next run."""
    folders = {}
    for save in ("merged", "adapter"):
        student = {"model": models[0], "lora": {**LORA, "save": save}, "device": "cpu"}
        run = {"folder": str(tmp_path / save), "steps": 2}
        folders[save] = opd.distill(student, models[1], **SHORT, optim={"lr": 1e-2}, run=run, quiet=True).student
    merged = AutoModelForCausalLM.from_pretrained(folders["merged"])
    base = AutoModelForCausalLM.from_pretrained(models[0])
    before = logprobs(base)
    beside = logprobs(peft.PeftModel.from_pretrained(base, str(folders["adapter"])))
    torch.testing.assert_close(beside, logprobs(merged), atol=1e-5, rtol=1e-5)
    assert (beside - before).abs().max() > 1e-3
    full = opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "full"), "steps": 1}, quiet=True)
    ours, whole = (read_metrics(f)[0]["flops_student_training"] for f in (tmp_path / "merged", full.folder))
    assert 0.6 < ours / whole < 0.85, "frozen weights get no gradient"
    again = opd.distill(
        models[0], str(folders["adapter"]), **SHORT, run={"folder": str(tmp_path / "next"), "steps": 1}, quiet=True
    )
    assert read_metrics(again.folder)[0]["reverse_kl"] > 0


@pytest.mark.parametrize("bits", ["none", "int4"])
def test_a_student_and_its_own_base_in_another_context(models, tmp_path: Path, bits: str) -> None:
    """The teacher is the student with its adapter off, told more: no second model."""
    student = {"model": models[0], "lora": LORA, "quantisation": bits, "device": "cpu"}
    teacher = {"model": models[0], "weights": "adapter_off", "format": {"system_prompt": "Count twice."}}
    run = opd.distill(
        student,
        teacher,
        **SHORT,
        optim={"lr": 1e-2},
        evals={"tasks": [TASK]},
        run={"folder": str(tmp_path / "run"), "steps": 3},
        quiet=True,
    )
    lines = read_metrics(run.folder)
    assert lines[0]["reverse_kl"] > 1e-3 and lines[-1]["applied"] and lines[0]["flops_teacher_scoring"] > 0
    assert {line["model"] for line in read_evals(run.folder)} == {"student", "teacher"}
    assert (run.student / "adapter_config.json").is_file() == (bits == "int4")


def test_a_dry_run_tells_the_adapter_and_counts_no_second_model(models, tmp_path: Path) -> None:
    student = {"model": models[0], "lora": {"rank": 2}, "quantisation": "int8"}
    given = {
        "student": student,
        "teacher": {"model": models[0], "weights": "adapter_off", "format": {"system_prompt": "More."}},
        "prompts": {"sources": [{"kind": "inline", "rows": ["hi"]}]},
        "run": {"folder": str(tmp_path / "run")},
    }
    printed = []
    for name in ("off", "beside"):
        console = Console(width=200, record=True, file=io.StringIO())
        config = load_config([given | ({} if name == "off" else {"teacher": {"model": models[1]}})]).config
        dry_run(config, console)
        printed.append(console.export_text())
    for words in ("LoRA of rank 2, 2.05k float32", "14 layers: down_proj, gate_proj", "int8 weights", "adapter off"):
        assert words in printed[0], printed[0]
    assert "teacher weights" not in printed[0] and "teacher weights" in printed[1]
    assert "adapter master weights" in printed[0] and "student frozen weights" in printed[0]
