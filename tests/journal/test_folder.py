from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.errors import ConfigError, DataError, OutOfSpace
from opd.journal.atomic import append_line, write_atomic
from opd.journal.folder import Existing, RunFolder, check, holds_results
from opd.journal.lock import Lock
from opd.journal.reader import (
    read_config,
    read_environment,
    read_evals,
    read_events,
    read_metrics,
    read_rollouts,
    read_summary,
    read_views,
)
from opd.journal.records import to_json
from tests.journal.parts import rollouts

CONFIG = {"student": {"model": "Qwen/Qwen3-0.6B"}, "run": {"folder": "x"}}


def create(path, existing: Existing = "refuse", config=CONFIG, **rest) -> RunFolder:
    return RunFolder.create(path, existing=existing, config=config, config_hash="c0ffee", **rest)


def decode(ids) -> str:
    return " ".join(map(str, ids))


def finished(path: Path) -> Path:
    with create(path) as run:
        run.log_step(1, 1, {"loss": 0.5})
        run.log_eval({"step": 0, "task": "sort", "mean": 0.5})
        run.log_event(1, "guard", "the answers grow", length=12.5)
        run.write_rollouts(1, rollouts(), decode)
        run.write_view(1, {"schema_version": 1, "title": "view"})
        run.dump(1, "loss", {"loss": 1.0})
        run.final.mkdir()
        (run.final / "model.safetensors").write_bytes(b"weights")
        run.write_summary({"schema_version": 1, "status": "done"})
    return path


def test_what_is_written_is_read_back(tmp_path):
    path = finished(tmp_path / "a" / "run")
    assert read_config(path) == CONFIG
    assert json.loads((path / "config.json").read_text()) == CONFIG, "config.json is the config and nothing else"
    assert read_environment(path)["config_hash"] == "c0ffee"
    assert read_metrics(path) == [{"schema_version": 1, "step": 1, "policy_version": 1, "loss": 0.5}]
    assert read_evals(path) == [{"schema_version": 1, "step": 0, "task": "sort", "mean": 0.5}]
    event = {"step": 1, "kind": "guard", "message": "the answers grow", "length": 12.5}
    assert read_events(path) == [{"schema_version": 1, **event}]
    assert read_views(path) == [(1, {"schema_version": 1, "title": "view"})]
    assert read_summary(path)["status"] == "done"


def test_environment_tells_versions_but_neither_host_nor_user(tmp_path):
    with create(tmp_path / "run", environment={"torch": "2.13", "threads": 2}) as run:
        text = (run.path / "environment.json").read_text()
    found = json.loads(text)
    assert found["torch"] == "2.13" and found["threads"] == 2 and found["python"].startswith("3.")
    assert os.uname().nodename not in text and str(Path.home()) + "/" not in text and str(tmp_path) not in text


def test_rollouts_by_step_and_all_in_order(tmp_path):
    with create(tmp_path / "run") as run:
        for step in (10, 2):
            written = rollouts()
            run.write_rollouts(step, written, decode)
        assert (run.path / "rollouts" / "step_000010.jsonl.gz").exists()
        assert [row["step"] for row in read_rollouts(run.path)] == [2] * 4 + [10] * 4
        rows = list(read_rollouts(run.path, 10))
        assert [row["id"] for row in rows] == [rollout.id for rollout in written]
        assert rows[0]["response"] == decode(written[0].response_ids)
        assert rows[0]["prompt"] == decode(written[0].prompt.ids)
        with pytest.raises(DataError, match=r"step 3.*steps 2 to 10"):
            list(read_rollouts(run.path, 3))


def test_same_rollouts_give_the_same_bytes(tmp_path):
    with create(tmp_path / "run") as run:
        first = run.write_rollouts(1, rollouts(), decode).read_bytes()
        assert run.write_rollouts(1, rollouts(), decode).read_bytes() == first
    assert first[4:8] == bytes(4), "no time of writing in the header"


def test_dump_keeps_what_went_wrong(tmp_path):
    with create(tmp_path / "run") as run:
        path = run.dump(12, "bad/../step", {"loss": float("nan"), "ids": np.arange(2)})
    assert path.parent == tmp_path / "run" / "dumps"
    assert json.loads(path.read_text()) == {"schema_version": 1, "step": 12, "loss": "NaN", "ids": [0, 1]}


# ---- whose folder it is -----------------------------------------------------------------------------------------


def test_foreign_folder_is_refused_and_left_alone_also_with_overwrite(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for existing in get_args(Existing):
        with pytest.raises(ConfigError, match=r"no run of opd \(thesis.tex\)"):
            create(tmp_path, existing)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "metrics.jsonl").write_text("of another program")
    assert holds_results(tmp_path) == []
    with pytest.raises(ConfigError, match="is a file"):
        create(tmp_path / "thesis.tex")


def test_existing_run_is_refused_and_the_error_says_what_to_type(tmp_path):
    path = finished(tmp_path / "run")
    for existing in ("refuse", "resume"):
        with pytest.raises(ConfigError, match=r"run\.existing=resume.*run\.existing=overwrite.*run\.folder=\.\.\."):
            create(path, existing)
    assert len(read_metrics(path)) == 1
    assert {"metrics.jsonl", "views", "final"} < set(holds_results(path))
    assert check(path, existing="resume", config={"student": {"model": str(path / "final")}}) > 0


def test_run_that_wrote_no_results_is_simply_started_again(tmp_path):
    with create(tmp_path / "run") as run:
        run.log_event(0, "start", "it starts")
    assert holds_results(tmp_path / "run") == holds_results(tmp_path) == holds_results(tmp_path / "nowhere") == []
    with create(tmp_path / "run", "resume", config={"second": 1}) as run:
        assert read_config(run.path) == {"second": 1} and read_events(run.path) == []


def test_run_that_started_and_ended_while_we_looked_is_not_written_over(tmp_path, monkeypatch):
    path = tmp_path / "run"
    real = Lock.take
    monkeypatch.setattr(Lock, "take", lambda folder: (monkeypatch.undo(), finished(path), real(folder))[2])
    with pytest.raises(ConfigError, match="already holds a run"):
        create(path, config={"second": 1})
    assert read_config(path) == CONFIG and read_metrics(path)
    create(path, "overwrite").close()


def test_run_is_reopened_as_it_is(tmp_path):
    path = finished(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name != "run.lock"}
    with RunFolder.reopen(path) as run:
        assert {p.name: p.read_bytes() for p in path.iterdir() if p.is_file() and p.name != "run.lock"} == before
        with pytest.raises(ConfigError, match="another process"):
            RunFolder.reopen(path)
        run.log_step(2, 2, {"loss": 0.25})
        run.write_config({"changed": 1}, "beef", {"torch": "9"})
    assert [row["step"] for row in read_metrics(path)] == [1, 2] and read_config(path) == {"changed": 1}
    environment = read_environment(path)
    assert environment and environment["config_hash"] == "beef" and environment["torch"] == "9"
    with pytest.raises(ConfigError, match="no run of opd"):
        RunFolder.reopen(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        RunFolder.reopen(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"needs about 1000000\.1 GB and .* GB are free"):
        RunFolder.reopen(path, needed_bytes=10**15)
    RunFolder.reopen(path).close()


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    path = finished(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").write_text("precious")
    (path / "notes.txt").write_text("mine")
    (path / "final" / "model.safetensors").unlink()
    (path / "final").rmdir()
    (path / "final").symlink_to(elsewhere)
    (path / "tracker.json").write_text("{}")
    (path / "tensorboard").mkdir()
    with create(path, "overwrite") as run:
        assert not read_metrics(run.path) and not read_evals(run.path) and read_summary(run.path) is None
        names = {p.name for p in path.iterdir()}
    assert names == {"run.lock", "config.json", "environment.json", "notes.txt"}
    assert (elsewhere / "model.safetensors").read_text() == "precious"
    assert not (path / "tracker.json").exists() and not (path / "tensorboard").exists()


def test_overwrite_never_deletes_the_model_that_the_new_run_starts_from(tmp_path, monkeypatch):
    path = finished(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    for model in (str(path / "final"), "run/final", "./run/../run/final/"):
        with pytest.raises(ConfigError, match=r"student\.model=.*would delete"):
            create(path, "overwrite", config={"student": {"model": model}})
    assert (path / "final" / "model.safetensors").exists()


# ---- before anything expensive ----------------------------------------------------------------------------------


def test_check_changes_nothing(tmp_path):
    free = check(tmp_path / "new" / "run", existing="refuse", config=CONFIG)
    assert free > 0 and not (tmp_path / "new").exists()


def test_too_little_space_is_an_error_with_both_figures(tmp_path):
    with pytest.raises(ConfigError, match=r"needs about 1000000\d*\.\d GB and [\d.]+ GB are free"):
        create(tmp_path / "run", needed_bytes=10**15)
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:  # root may write anywhere, except below something that is no folder
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot be written"):
            create(tmp_path / "file" / "run")
    else:
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(ConfigError, match="cannot be written"):
            create(tmp_path / "run")


# ---- torn, broken, newer ----------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(1, 60))
def test_torn_last_line_is_left_out_with_a_warning(tmp_path, cut):
    path = tmp_path / f"run{cut}"
    with create(path, "overwrite") as run:
        for step in (1, 2, 3):
            run.log_step(step, step, {"loss": 1 / step, "note": 1})
    file = path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    if cut == 1:  # only the line end is missing: the record is whole
        assert len(read_metrics(path)) == 3
    else:
        with pytest.warns(UserWarning, match=r"metrics\.jsonl:3: the last line is incomplete"):
            assert [row["step"] for row in read_metrics(path)] == [1, 2]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(1, 120_000))
def test_next_line_never_hangs_on_a_torn_one(tmp_path, cut):
    file = tmp_path / "events.jsonl"
    first, second = to_json({"n": 1}), to_json({"n": 2, "long": "x" * 100_000})
    file.write_bytes((first + second)[:-cut])
    append_line(file, to_json({"n": 3}))
    numbers = [json.loads(text)["n"] for text in file.read_bytes().splitlines()]
    left = max(0, len(first + second) - cut)
    whole = [
        n for n, end in ((1, len(first)), (2, len(first + second))) if left >= end - 1
    ]  # a line end may be missing
    assert numbers == [*whole, 3]


def test_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path):
    path = finished(tmp_path / "run")
    file = path / "metrics.jsonl"
    file.write_bytes(b"{broken\n" + file.read_bytes())
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not JSON"):
        read_metrics(path)


def test_record_of_a_newer_opd_is_refused(tmp_path):
    path = finished(tmp_path / "run")
    (path / "summary.json").write_text('{"schema_version": 99}')
    with pytest.raises(DataError, match="schema 99"):
        read_summary(path)


def test_reading_what_is_no_run(tmp_path):
    with pytest.raises(DataError, match="no run folder"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_summary(tmp_path / "nowhere")


def test_R_5_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, b"old")
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_IFMT(os.fstat(fd).st_mode)), real(fd))[1])
    write_atomic(path, b"new")
    assert synced == [stat.S_IFREG, stat.S_IFDIR], "the file before the rename, the folder after it"

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match=r"summary\.json does not fit: No space"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["summary.json"]


def test_journal_and_costs_import_no_torch():
    code = "import sys, opd.journal.folder, opd.journal.reader, opd.costs.ledger, opd.costs.memory; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(torch|transformers|pydantic|opd\.config)\b", loaded)
