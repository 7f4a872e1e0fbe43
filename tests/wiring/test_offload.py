"""A teacher kept in host memory comes to its device for everything it is asked, its own evaluation included."""

from __future__ import annotations

from pathlib import Path

import opd
from opd.rollouts.engine import EmbeddedEngine
from opd.teachers.residence import Resident
from tests import tiny

SHORT = {"prompts": ["What is 2 + 2?", "hi"], "sampling": {"max_tokens": 8, "samples_per_prompt": 2}}
TASK = {"name": "sums", "source": {"kind": "inline", "rows": [{"prompt": "1 + 1?", "answer": "2"}]}}
TASK["grader"] = {"kind": "exact"}


def test_an_offloaded_teacher_takes_the_tasks_on_its_own_device(tmp_path: Path, monkeypatch) -> None:
    models = tiny.save(tmp_path / "student", seed=0), tiny.save(tmp_path / "teacher", "llama", seed=1)
    seen: list[str] = []
    fetch, release, generate = Resident.fetch, Resident.release, EmbeddedEngine.generate
    monkeypatch.setattr(Resident, "fetch", lambda self: (seen.append("fetch"), fetch(self))[1])
    monkeypatch.setattr(Resident, "release", lambda self: (seen.append("release"), release(self))[1])
    note = lambda self, *a, tag, **k: (seen.append(self._model.name.split()[0]), generate(self, *a, tag=tag, **k))[1]  # noqa: E731
    monkeypatch.setattr(EmbeddedEngine, "generate", note)
    opd.distill(*models, **SHORT, evals={"tasks": [TASK]}, run={"folder": str(tmp_path / "r"), "steps": 1}, quiet=True)
    n = seen.index("teacher")
    assert seen[n - 1 : n + 2] == ["fetch", "teacher", "release"]
