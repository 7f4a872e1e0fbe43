"""However a run ends, its folder says so, and what was earned is kept."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import opd
from opd.errors import Interrupted, ServiceUnavailable, TrainingDiverged
from opd.journal.folder import RunFolder
from opd.journal.reader import read_summary
from opd.learner.learner import LocalLearner
from tests import tiny

SHORT = {"prompts": ["What is 2 + 2?", "hi"], "sampling": {"max_tokens": 8, "samples_per_prompt": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1, scale=10.0)


@pytest.mark.parametrize(
    "error", [ServiceUnavailable("the teacher is gone"), RuntimeError("CUDA out of memory")], ids=repr
)
def test_a_run_that_breaks_keeps_its_student_and_says_failed(models, tmp_path: Path, monkeypatch, error) -> None:
    whole = LocalLearner.update

    def update(self, rollouts_N, evidence):
        if self.step == 2:
            raise error
        return whole(self, rollouts_N, evidence)

    monkeypatch.setattr(LocalLearner, "update", update)
    with pytest.raises(type(error), match=str(error)):
        opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "run"), "steps": 5}, quiet=True)
    summary = read_summary(tmp_path / "run")
    assert summary["status"] == "failed" and summary["steps"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_a_student_that_cannot_be_saved_leaves_a_summary_that_says_failed(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("opd.wiring.session.save_model", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "run"), "steps": 1}, quiet=True)
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_ctrl_c_before_the_first_update_does_not_name_a_student(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("opd.wiring.session.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="nothing to keep"):
        opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "run"), "steps": 1}, quiet=True)
    assert not (tmp_path / "run" / "final").exists() and read_summary(tmp_path / "run")["status"] == "interrupted"


def test_a_second_sigterm_does_not_cut_the_save(models, tmp_path: Path, monkeypatch) -> None:
    whole = RunFolder.write_summary
    monkeypatch.setattr(
        RunFolder, "write_summary", lambda self, s: (signal.raise_signal(signal.SIGTERM), whole(self, s))
    )
    run = opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "run"), "steps": 1}, quiet=True)
    assert read_summary(run.folder)["status"] == "done"


def test_the_step_at_which_a_run_diverges_is_in_the_record(models, tmp_path: Path, monkeypatch) -> None:
    """Its metrics, its rollouts and its dump; the status says failed."""
    from opd.journal.reader import read_metrics, read_rollouts

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: float("nan"))
    run = {"folder": str(tmp_path / "run"), "steps": 9}
    with pytest.raises(TrainingDiverged, match="max_bad_steps = 2"):
        opd.distill(*models, **SHORT, learner={"max_bad_steps": 2}, run=run, quiet=True)
    lines = read_metrics(tmp_path / "run")
    assert [(line["step"], line["applied"]) for line in lines] == [(1, False), (2, False)]
    assert {r["step"] for r in read_rollouts(tmp_path / "run")} == {1, 2}
    assert len(list((tmp_path / "run" / "dumps").iterdir())) == 2
    assert read_summary(tmp_path / "run")["status"] == "failed"
