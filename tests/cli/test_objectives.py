"""`opd objectives`: a table, JSON alone on standard output, one in full with a config that loads; without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from opd.cli.objectives import written_out
from opd.config.catalogue import described, example
from opd.config.loading import load_config
from opd.config.objective import Objective
from opd.config.presets import METHODS, expand
from tests.cli.test_train import opd, refused


def test_the_table_names_every_method(capsys) -> None:
    assert opd("objectives") == 0
    printed = capsys.readouterr().out
    for name, method in METHODS.items():
        assert f"│ {name} " in printed and method.status in printed
    assert "8 N_student + 2 N_teacher FLOPs a token" in printed


def test_json_is_alone_on_stdout_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['opd', 'objectives', '--json']\n"
        "from opd.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'vllm', 'ray', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    entries = json.loads(done.stdout)
    assert [entry["name"] for entry in entries] == list(METHODS)
    for entry in entries:
        assert list(entry) == ["name", "formula", "source", "status", "evidence", "cost", "terms"]
        assert entry["status"] in ("vetted", "experimental") and entry["terms"] and entry["formula"]


@pytest.mark.parametrize("name", ["tml", "mopd", "sdpo", "gkd_rl", "lsm", "distillm2", "sft"])
@pytest.mark.filterwarnings("ignore::opd.config.checks.ConfigWarning")
def test_show_prints_a_config_that_loads(name: str, capsys, tmp_path) -> None:
    assert opd("objectives", "show", name) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name} ({METHODS[name].status})\n") and METHODS[name].source in printed
    text = printed.partition("a config that runs it\n\n")[2]
    assert text == example(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    config = load_config([path]).config
    assert config.objective.preset == name
    assert all(f"    - {{name: {term.name}, " in printed for term in config.objective.terms)


@pytest.mark.parametrize("name", list(METHODS))
def test_what_is_written_out_is_the_preset(name: str) -> None:
    preset = expand(name, METHODS[name].example)
    text = "objective:\n" + "\n".join(f"  {line}" for line in written_out(described(name)))
    objective = Objective.model_validate(yaml.safe_load(text)["objective"])
    assert (objective.behaviour, objective.terms) == (preset.behaviour, preset.terms)


def test_show_says_what_a_row_has(capsys) -> None:
    for name, columns in (("gkd", "prompt, completion"), ("opsd", "prompt, solution"), ("tml", "prompt")):
        assert opd("objectives", "show", name) == 0
        assert f"a row of the data has\n  {columns}\n" in capsys.readouterr().out
    assert opd("objectives", "show", "grpo") == 0
    assert "  prompt, and what the grader of `rewards` needs\n" in capsys.readouterr().out


def test_show_says_who_must_be_there(capsys) -> None:
    assert opd("objectives", "show", "compass") == 0
    printed = capsys.readouterr().out
    assert "weak: yours: a model (reads, drawn tokens)" in printed
    assert "reference: the preset's: {weights: initial} (reads, drawn tokens)" in printed
    assert opd("objectives", "show", "seqkd") == 0
    assert "teacher: yours: a model (writes)" in capsys.readouterr().out


def test_a_method_that_does_not_exist_is_answered_with_those_that_do(capsys) -> None:
    assert "reverse_kl" in refused(capsys, "objectives", "show", "revers_kl")
