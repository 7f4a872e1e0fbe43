"""`opd.distill` from Python, interruptions, and models with different ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import opd
from opd.errors import ConfigError
from opd.journal.reader import read_events, read_metrics, read_rollouts, read_summary
from tests import tiny

SHORT = {"prompts": ["What is 2 + 2?", "Sort: hgfe", "hi"], "sampling": {"max_tokens": 8, "samples_per_prompt": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1, scale=10.0)


def test_distill_returns_the_run_and_arguments_win_over_files(models, tmp_path: Path, capsys) -> None:
    (tmp_path / "base.toml").write_text('[optim]\nlr = 0.5\nclip_norm = 2.0\n[run]\nfolder = "elsewhere"\n')
    run = opd.distill(
        *models,
        **SHORT,
        config=tmp_path / "base.toml",
        optim={"lr": 1e-3},
        run={"folder": str(tmp_path / "run"), "steps": 2},
        quiet=True,
    )
    assert capsys.readouterr().out == ""
    assert run.folder == tmp_path / "run" and run.summary == read_summary(run.folder)
    assert [line["lr"] for line in read_metrics(run.folder)] == [1e-3, 1e-3]
    assert AutoModelForCausalLM.from_pretrained(run.student).config.model_type == "qwen3"


def test_a_step_of_rows_that_no_term_reads_is_skipped_not_the_end(models, tmp_path: Path) -> None:
    """One prompt a step, and the term reads every other one."""
    rows = tuple({"prompt": f"{n} + 2?", "part": "b" if n % 2 else "a"} for n in range(4))
    source = {"kind": "inline", "rows": rows, "columns": {"domain": "part"}}
    run = opd.distill(
        *models,
        prompts={"sources": [source], "per_step": 1, "shuffle": False},
        sampling=SHORT["sampling"],
        objective={"behaviour": "student", "terms": [{"name": "of_a", "domains": ["a"]}]},
        run={"folder": str(tmp_path / "run"), "steps": 4},
        quiet=True,
    )
    metrics = read_metrics(run.folder)
    assert [line["applied"] for line in metrics] == [True, False, True, False]
    assert [line["trained_tokens"] > 0 for line in metrics] == [True, False, True, False]
    told = [event["message"] for event in read_events(run.folder) if event["kind"] == "bad_step"]
    assert len(told) == 2 and all("of_a: reads none of the answers" in line for line in told)
    assert read_summary(run.folder)["status"] == "done"


def test_distill_refuses_what_it_does_not_know(models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sampling"):
        opd.distill(*models, prompts=["a"], smapling={"max_tokens": 3})


def test_A_16_a_base_student_learns_its_own_end_from_a_chat_teacher(tmp_path: Path) -> None:
    """The field's headline pair: the student ends in <|endoftext|> (0), the teacher in <|im_end|> (2).

    The teacher wants to stop at once, always: with the ends exchanged the student learns to write its own end, and
    never the teacher's.
    """
    student = tiny.save(tmp_path / "student", chat=False, seed=0, scale=1.0)
    teacher = tiny.save(tmp_path / "teacher", "gpt2", chat=True, seed=1)
    module = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():  # all states become one vector, and the end's row of the head points along it
        module.transformer.ln_f.weight.zero_()
        module.transformer.ln_f.bias.copy_(module.get_output_embeddings().weight[2] * 50)
    module.save_pretrained(teacher)
    run = opd.distill(
        student,
        teacher,
        **SHORT,
        optim={"lr": 3e-2},
        run={"folder": str(tmp_path / "run"), "steps": 15},
        quiet=True,
    )
    first, last = (list(read_rollouts(run.folder, step)) for step in (1, 15))
    at_once = [sum(r["response_ids"] == [0] for r in rows) / len(rows) for rows in (first, last)]
    assert at_once[0] < 0.05 and at_once[1] > 0.25
    theirs = [sum(2 in r["response_ids"] for r in rows) / len(rows) for rows in (first, last)]
    assert theirs[1] <= max(theirs[0], 0.05)


def test_ctrl_c_keeps_what_was_earned_and_exits_75(models, tmp_path: Path) -> None:
    code = f"""
import opd.cli.main as cli, sys
sys.argv = ["opd", "train", "student.model={models[0]}", "teacher.model={models[1]}",
            'prompts.sources=[{{"kind": "inline", "rows": ["a", "b"]}}]', "prompts.per_step=2", "run.steps=100000",
            "run.threads=1", "sampling.max_tokens=4", "run.folder={tmp_path / "run"}"]
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and b"stopped after" in err and b"Traceback" not in err
    summary = read_summary(tmp_path / "run")
    assert summary["status"] == "interrupted" and summary["steps"] >= 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_paths_chats_and_preset_names_are_taken_from_python(models, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    run = opd.distill(
        Path(models[0]),
        Path(models[1]),
        prompts=[chat, "hi", {"prompt": "Sort: hgfe", "answer": "efgh"}],
        objective="tml",
        sampling={"max_tokens": 4},
        run={"folder": str(tmp_path / "run"), "steps": 1},
        quiet=True,
    )
    assert run.summary["preset"] == "tml"
    assert {r["prompt_id"].split("#")[0] for r in read_rollouts(run.folder)} == {f"prompts/{n}" for n in range(3)}


def test_answers_that_are_cut_are_told(models, tmp_path: Path, capsys) -> None:
    rows = [{"prompt": "a", "completion": "a long answer of many tokens"}, {"prompt": "b", "completion": "b"}]
    run = {"folder": str(tmp_path / "run"), "steps": 1}
    opd.distill(models[0], prompts=rows, objective="sft", sampling={"max_tokens": 3}, run=run)
    assert "1 of 2 answers are longer than sampling.max_tokens = 3" in " ".join(capsys.readouterr().out.split())
