"""The commands around a run: init, eval, config, and what the command line itself says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import opd as package
from tests import tiny
from tests.cli.test_train import opd, refused


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny.save(tmp_path_factory.mktemp("eval") / "model", seed=0)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(6)))
    return path


def test_version_and_help(capsys) -> None:
    assert opd("--version") == 0
    assert capsys.readouterr().out.strip() == package.__version__
    assert opd("--help") == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("init", "train", "eval", "config", "demo"))
    assert opd("train", "--help") == 0
    assert "recipe.yaml" in capsys.readouterr().out


def test_a_command_that_does_not_exist_names_the_nearest(capsys) -> None:
    assert opd("trian") == 2
    assert "train" in capsys.readouterr().err


def test_init_writes_a_recipe_that_is_read_and_keeps_what_is_there(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert opd("init") == 0
    text = (tmp_path / "recipe.yaml").read_text()
    assert "student:" in text and "teacher:" in text
    assert "recipe.yaml" in refused(capsys, "init")
    (tmp_path / "recipe.yaml").write_text("mine")
    assert opd("init", "--force") == 0 and (tmp_path / "recipe.yaml").read_text() == text
    assert "nowhere" in refused(capsys, "init", "nowhere/recipe.yaml")
    assert opd("config", "show", "recipe.yaml") == 0


def test_config_show_and_schema(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("student: {model: s}\nteacher: {model: t}\nprompts:\n  sources: [{kind: jsonl, path: p.jsonl}]\n")
    assert opd("config", "show", str(recipe), "--resolved", "optim.lr=2e-5") == 0
    full = json.loads(capsys.readouterr().out)
    assert full["optim"]["lr"] == 2e-5 and full["objective"]["terms"][0]["shape"]["kind"] == "reverse_kl"
    assert opd("config", "show", str(recipe), "--origins", "optim.lr=2e-5") == 0
    printed = capsys.readouterr().out
    assert f"{recipe}:1" in printed and "optim.lr: command line" in printed
    assert opd("config", "schema") == 0
    assert json.loads(capsys.readouterr().out)["properties"].keys() >= {"student", "teacher", "objective"}


def test_eval_takes_a_file(model: str, problems: Path, capsys) -> None:
    items = [f"task={problems}", "grader=numeric", "samples=2", "max_tokens=6", "run.threads=1"]
    assert opd("eval", model, *items) == 0
    captured = capsys.readouterr()
    assert "problems" in captured.out and "6 x 2" in captured.out
    assert "held out" not in captured.out + captured.err, "nothing is trained here"
    assert opd("eval", model, *items[:2], "max_tokens=6", "temperature=0") == 0


def test_eval_takes_the_tasks_of_a_recipe(model: str, problems: Path, tmp_path: Path, capsys) -> None:
    tasks = [
        {"name": name, "grader": {"kind": "numeric"}, "source": {"kind": "jsonl", "path": str(problems), "name": name}}
        for name in ("one", "two")
    ]
    config = {"student": {"model": "other"}, "teacher": {"model": "t"}, "evals": {"tasks": tasks}}
    config |= {"prompts": {"sources": [{"kind": "inline", "rows": ["a"]}]}, "sampling": {"max_tokens": 4}}
    (tmp_path / "r.json").write_text(json.dumps(config))
    assert opd("eval", model, str(tmp_path / "r.json")) == 0
    printed = capsys.readouterr().out
    assert "one" in printed and "two" in printed
    assert opd("eval", model, str(tmp_path / "r.json"), "task=two") == 0
    assert "one" not in capsys.readouterr().out.replace("student", "")
    assert "one, two" in refused(capsys, "eval", model, str(tmp_path / "r.json"), "task=three")


def test_eval_of_a_reasoning_gym_task(model: str, capsys) -> None:
    pytest.importorskip("reasoning_gym")
    assert opd("eval", model, "task=reasoning_gym:chain_sum", "max_tokens=4", "evals.tasks.0.source.size=4") == 0
    assert "4 x 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("items", "named"),
    [
        ([], "needs something to take"),
        (["task=problems.jsonl"], "grader"),
        (["task=gone.jsonl", "grader=exact"], "gone.jsonl"),
        (["task=reasoning_gym:chain_some"], "chain_sum"),
    ],
)
def test_eval_says_what_is_missing(model: str, capsys, items: list[str], named: str) -> None:
    assert named in refused(capsys, "eval", model, *items)


def test_the_folder_of_a_run_is_not_its_model(problems: Path, tmp_path: Path, capsys) -> None:
    for name in ("run.lock", "metrics.jsonl"):
        (tmp_path / name).touch()
    assert f"{tmp_path}/final" in refused(capsys, "eval", str(tmp_path), f"task={problems}", "grader=numeric")


def test_ctrl_c_outside_a_run_exits_75_without_a_traceback(capsys, monkeypatch) -> None:
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("opd.config.loading.load_config", stop)
    assert opd("train", "student.model=x") == 75
    assert capsys.readouterr().err == "opd: stopped\n"
