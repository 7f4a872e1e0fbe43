"""`opd roofline` as a person runs it, and what a run says of its speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opd.costs.roofline import Rates
from opd.journal.reader import read_metrics, read_summary
from opd.models import rates
from tests.cli.test_train import opd, recipe, refused, world

__all__ = ["world"]

SLOW = Rates(products={"float32": 1e6, "bfloat16": 4e6}, memory=1e6, near=1e6, near_bytes=0)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch) -> list[int]:
    """How often the machine was measured; it is as slow as `SLOW`, and nothing is known of it at first."""
    found: list[int] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "measure", lambda device: (found.append(1), SLOW)[1])
    return found


@pytest.fixture
def no_weights(monkeypatch) -> None:
    monkeypatch.setattr("opd.wiring.scorers.load_frozen", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("no_weights")
def test_a_table_of_parts_and_what_would_move_them(world: Path, tmp_path: Path, capsys, measured) -> None:
    assert opd("roofline", *recipe(world, tmp_path)) == 0
    printed = capsys.readouterr().out
    for words in ("prefill", "decode", "scoring (teacher)", "head", "training", "optimiser", "most of it: "):
        assert words in printed
    assert "16 answers of 10 tokens (as long as they may get" in printed and "3 steps" in printed
    assert "student.dtype=bfloat16 would allow" in printed
    assert not (tmp_path / "run").exists() and len(measured) == 1
    assert opd("roofline", *recipe(world, tmp_path), "--answer-tokens", "4") == 0
    printed = capsys.readouterr().out
    assert "16 answers of 4 tokens to prompts" in printed and len(measured) == 1
    assert opd("roofline", *recipe(world, tmp_path), "--again") == 0 and len(measured) == 2
    assert "--answer-tokens" in refused(capsys, "roofline", *recipe(world, tmp_path), "--answer-tokens=11")


@pytest.mark.usefixtures("no_weights")
def test_json_has_the_numbers_of_the_table(world: Path, tmp_path: Path, capsys, measured) -> None:
    capsys.readouterr()
    assert opd("roofline", *recipe(world, tmp_path, engine__slots=1), "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["seconds_per_step"] == pytest.approx(sum(part["seconds"] for part in made["parts"]))
    assert made["seconds"] == 3 * made["seconds_per_step"]
    assert made["tokens_per_second"] == pytest.approx(160 / made["seconds_per_step"])
    assert made["answers"] == {"number": 16, "tokens": 10} and made["rates"]["cpu"]["memory"] == 1e6
    assert made["changes"]["engine.slots=16"] > 1 and "prompts.per_step=16" not in made["changes"]
    assert made["changes"]["student.dtype=bfloat16"] > made["changes"]["teacher.dtype=bfloat16"] > 1


@pytest.mark.usefixtures("no_weights")
def test_the_demo_has_a_limit(capsys, measured) -> None:
    from opd.lab.demo import run as demo

    models = Path(demo.__file__).parent / "models"
    items = [f"student.model={models / 'student'}", f"teacher.model={models / 'teacher'}", "sampling.max_tokens=10"]
    assert opd("roofline", *items, 'prompts.sources=[{"kind":"inline","rows":["hgfedcba"]}]', "--json") == 0
    assert json.loads(capsys.readouterr().out)["seconds_per_step"] > 0


def test_a_run_says_how_close_it_came_once_the_machine_is_known(world: Path, tmp_path: Path, capsys, measured) -> None:
    items = recipe(world, tmp_path, run__existing="overwrite", prompts__per_step=4)
    assert opd("train", *items) == 0
    assert read_summary(tmp_path / "run")["limit"] is None, "nobody measured, and the run was short"
    assert "speed:" not in capsys.readouterr().out
    assert opd("roofline", *items) == 0
    assert opd("train", *items) == 0
    summary = read_summary(tmp_path / "run")
    limit = summary["limit"]
    assert list(limit) == ["seconds_per_step", "achieved", "bottleneck", "bound", "parts"]
    assert list(limit["parts"]) == ["rollout", "scoring", "update"]
    assert sum(limit["parts"].values()) == pytest.approx(limit["seconds_per_step"])
    spent = sum(summary["seconds_by_phase"][phase] for phase in limit["parts"])
    assert limit["achieved"] == pytest.approx(3 * limit["seconds_per_step"] / spent)
    assert "speed: " in capsys.readouterr().out


def test_a_limit_that_cannot_be_told_is_a_warning_and_the_run_has_its_result(
    world: Path, tmp_path: Path, capsys, monkeypatch, measured
) -> None:
    def broken(*args, **options):
        raise RuntimeError("no such device")

    items = recipe(world, tmp_path)
    assert opd("roofline", *items) == 0
    monkeypatch.setattr("opd.wiring.achieved.workload", broken)
    assert opd("train", *items) == 0
    assert "limit is not known: RuntimeError('no such device')" in capsys.readouterr().err
    assert read_summary(tmp_path / "run")["limit"] is None


def test_the_limit_is_that_of_the_answers_that_were_written(world: Path, tmp_path: Path, capsys, measured) -> None:
    """Half as long as they might be: the limit is near that of `--answer-tokens` at their mean."""
    horizon = {"sampling__horizon": json.dumps({"start": 5, "end": 5, "steps": 1})}
    items = recipe(world, tmp_path, **horizon)
    assert opd("roofline", *items) == 0 and opd("train", *items) == 0
    limit = read_summary(tmp_path / "run")["limit"]
    assert max(line["response_length"] for line in read_metrics(tmp_path / "run")) == 5
    capsys.readouterr()
    assert opd("roofline", *items, "--answer-tokens=5", "--json") == 0
    five = json.loads(capsys.readouterr().out)
    assert limit["seconds_per_step"] == pytest.approx(five["seconds_per_step"], rel=0.05)


def test_a_long_run_measures_its_machine_and_a_failure_there_is_none_of_the_run(
    world: Path, tmp_path: Path, monkeypatch, measured
) -> None:
    monkeypatch.setattr("opd.wiring.session.LONG", 0.0)

    def fails(device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(rates, "measure", fails)
    items = recipe(world, tmp_path, run__existing="overwrite")
    assert opd("train", *items) == 0
    assert read_summary(tmp_path / "run")["limit"] is None
    monkeypatch.setattr(rates, "measure", lambda device: SLOW)
    assert opd("train", *items) == 0
    assert read_summary(tmp_path / "run")["limit"]["seconds_per_step"] > 0
