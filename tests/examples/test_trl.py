"""opd's loss inside TRL's GKDTrainer, in an environment made of examples/requirements-trl.txt."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "examples" / "requirements-trl.txt"
SINGLE = 1e-6  # a token's weight travels as float32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What inside_trl.py measured. Needs a package index."""
    home = tmp_path_factory.mktemp("trl")
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "-r", REQUIREMENTS, "-c", ROOT / "constraints.txt"]
    _run([python, *install])
    path = os.pathsep.join(str(folder) for folder in (ROOT / "src", ROOT / "examples", ROOT))
    settings = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    printed = _run([python, ROOT / "tests" / "examples" / "inside_trl.py"], env=settings)
    return json.loads(printed.splitlines()[-1])


def _run(command: list[Any], **options: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1200, **options)
    assert done.returncode == 0, f"{command[:4]} failed:\n{done.stderr[-4000:]}"
    return done.stdout


def test_it_was_run_with_the_versions_that_the_example_names(found: dict[str, Any]) -> None:
    said = (ROOT / "examples" / "own_loss_in_trl.py").read_text()
    assert f"TRL {found['trl']}" in said and f"transformers {found['transformers']}" in said
    assert f"trl=={found['trl']}\n" in REQUIREMENTS.read_text()


@pytest.mark.parametrize("what", ["jsd", "jsd_by_count"])
def test_with_gkds_own_divergence_the_gradient_is_gkd_trainers(what: str, found: dict[str, Any]) -> None:
    """On data whose prompts and answers have different lengths, and with a token count from outside."""
    assert found["prompts_differ"] and found["answers_differ"]
    assert found[what]["size"] > 1e-3
    assert found[what]["loss"] < SINGLE and found[what]["gradient"] < SINGLE


def test_the_top_k_form_is_the_naive_formulas(found: dict[str, Any]) -> None:
    assert found["top_k"]["size"] > 1e-3
    assert found["top_k"]["loss"] < SINGLE and found["top_k"]["gradient"] < SINGLE


@pytest.mark.parametrize("how", ["data", "student", "accumulated"])
def test_training_goes_where_gkd_trainer_goes(how: str, found: dict[str, Any]) -> None:
    made = found[f"train_{how}"]
    assert made["moved"] > 0.1 and made["apart"] < 1e-4 * made["moved"]
    assert made["losses"] == pytest.approx(made["their_losses"], rel=1e-5)


def test_on_policy_steps_are_divided_by_the_tokens_of_the_data(found: dict[str, Any]) -> None:
    """As the example's text says of TRL; when this fails TRL counts otherwise, and the text is to be changed."""
    counted = found["counted"]
    assert counted["divisor"] == counted["data"] and counted["divisor"] != counted["written"]
