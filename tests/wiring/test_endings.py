"""However a run ends, its folder says so, and what was earned is kept."""

from __future__ import annotations

import pkgutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import opd
from opd.errors import Interrupted, OpdError, ServiceUnavailable, TrainingDiverged
from opd.journal.folder import RunFolder
from opd.journal.reader import read_events, read_metrics, read_summary
from opd.learner.learner import LocalLearner
from tests import tiny

SHORT = {"prompts": ["What is 2 + 2?", "hi"], "sampling": {"max_tokens": 8, "samples_per_prompt": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "student", seed=0), tiny.save(folder / "teacher", "llama", seed=1, scale=10.0)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ServiceUnavailable("the teacher is gone"), "interrupted"), (RuntimeError("a bug"), "failed")],
    ids=repr,
)
def test_a_run_that_breaks_keeps_its_student_and_can_go_on(models, tmp_path, monkeypatch, error, status) -> None:
    whole = LocalLearner.update

    def update(self, rollouts_N, evidence):
        if self.step == 2:
            raise error
        return whole(self, rollouts_N, evidence)

    monkeypatch.setattr(LocalLearner, "update", update)
    with pytest.raises(type(error), match=str(error)):
        opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "run"), "steps": 5}, quiet=True)
    summary = read_summary(tmp_path / "run")
    assert summary["status"] == status and summary["steps"] == 2 and summary["stopped_by"] == str(error)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    monkeypatch.setattr(LocalLearner, "update", whole)
    assert opd.resume(tmp_path / "run", quiet=True).summary["steps"] == 5
    assert [event["step"] for event in read_events(tmp_path / "run") if event["kind"] == "resume"] == [2]


@pytest.mark.parametrize("where", ["torch.optim.AdamW.step", "opd.journal.folder.RunFolder.log_step"])
def test_R_6_a_failure_in_the_middle_of_a_change_keeps_nothing_of_it(models, tmp_path, monkeypatch, where) -> None:
    """What is in memory then is neither the old student nor the new one: the last checkpoint counts."""
    owner, name = where.rpartition(".")[::2]
    owner = pkgutil.resolve_name(owner)
    whole, calls = getattr(owner, name), []

    def broken(self, *args, **kwargs):
        done = whole(self, *args, **kwargs)
        calls.append(done)
        if len(calls) == 3:
            raise RuntimeError("half-way")
        return done

    spec = {**SHORT, "optim": {"lr": 1e-2}, "checkpoints": {"every": 2}, "quiet": True}
    undisturbed = opd.distill(*models, **spec, run={"folder": str(tmp_path / "whole"), "steps": 4})
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="half-way"):
        patched.setattr(owner, name, broken)
        opd.distill(*models, **spec, run={"folder": str(tmp_path / "run"), "steps": 4})
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    assert not (run / "final").exists() and read_summary(run)["status"] == "failed"
    ended = opd.resume(run, quiet=True)
    weights = [(made.student / "model.safetensors").read_bytes() for made in (ended, undisturbed)]
    assert weights[0] == weights[1] and len(read_metrics(run)) == 4


def test_a_guard_that_is_told_to_stop_ends_the_run_resumable(models, tmp_path: Path) -> None:
    guards = {"policy_gap": {"action": "stop", "nats": 1e-30, "steps": 1}}
    with pytest.raises(Interrupted, match="guards; to go on"):
        opd.distill(*models, **SHORT, guards=guards, run={"folder": str(tmp_path / "run"), "steps": 40}, quiet=True)
    summary = read_summary(tmp_path / "run")
    (event,) = [event for event in read_events(tmp_path / "run") if event["kind"] == "guard"]
    assert summary["status"] == "interrupted" and event["message"] in summary["stopped_by"]
    assert event["step"] == summary["steps"] < 40
    opd.resume(tmp_path / "run", ["guards.policy_gap.action=off", f"run.steps={summary['steps'] + 1}"], quiet=True)
    assert read_summary(tmp_path / "run")["status"] == "done"


def test_a_student_that_cannot_be_saved_leaves_a_summary_that_says_failed(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("opd.wiring.session.save_model", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        opd.distill(*models, **SHORT, run={"folder": str(tmp_path / "run"), "steps": 1}, quiet=True)
    assert read_summary(tmp_path / "run")["status"] == "failed"


def test_ctrl_c_before_the_first_update_does_not_name_a_student(models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("opd.wiring.session.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="stopped after 0 of 1 steps; to go on"):
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


def test_a_run_that_diverged_in_its_last_step_is_not_done_when_it_is_taken_up_again(
    models, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", lambda *_: float("nan"))
    run = tmp_path / "run"
    with pytest.raises(TrainingDiverged):
        spec = {**SHORT, "learner": {"max_bad_steps": 2}, "run": {"folder": str(run), "steps": 2}}
        opd.distill(*models, **spec, quiet=True)
    with pytest.raises(OpdError, match="no step is left"):
        opd.resume(run, quiet=True)
    assert read_summary(run)["status"] == "failed"
    monkeypatch.undo()
    assert opd.resume(run, ["run.steps=3"], quiet=True).summary["status"] == "done"
    assert [line["applied"] for line in read_metrics(run)] == [False, False, True]


def test_guards_see_a_number_as_the_record_has_it(models, tmp_path: Path, monkeypatch) -> None:
    """JSON has no infinity. Else a run that was taken up again would be told of other things."""
    whole = LocalLearner.update

    def update(self, rollouts_N, evidence):
        made = whole(self, rollouts_N, evidence)
        return replace(made, metrics={**made.metrics, "policy_gap": float("inf")})

    monkeypatch.setattr(LocalLearner, "update", update)
    spec = {**SHORT, "guards": {"policy_gap": {"steps": 2}}, "quiet": True}
    opd.distill(*models, **spec, run={"folder": str(tmp_path / "whole"), "steps": 3})
    opd.distill(*models, **spec, run={"folder": str(tmp_path / "run"), "steps": 1})
    opd.resume(tmp_path / "run", ["run.steps=3"], quiet=True)
    told = [[e["step"] for e in read_events(tmp_path / run) if e["kind"] == "guard"] for run in ("whole", "run")]
    assert told[0] == told[1]
