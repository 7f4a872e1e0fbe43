"""The script that measures a step on a device, at a size that runs on the host; and what a part does that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import gpu_step
from opd.errors import ModelError

SHARED = {"status": "not_measured"}


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> dict[str, Any]:
    out = folder / "out.json"
    given = ["gpu_step.py", "--tiny", "--runs", "2", "--warm-up", "1", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", given)
    try:
        gpu_step.main()
    finally:
        found = json.loads(out.read_text())
    return found


def test_every_part_is_measured_and_merged_into_the_figures_that_are_there(monkeypatch, tmp_path: Path) -> None:
    whole = tmp_path / "results" / "latest.json"
    whole.parent.mkdir()
    whole.write_text(json.dumps({"kernel": 1, "gpu": "older"}))
    found = run(monkeypatch, tmp_path, "--merge", str(whole))
    assert json.loads(whole.read_text()) == {"kernel": 1, "gpu": found}
    tiny = found["tiny"]
    assert tiny["decode"]["path"] == "lean" and tiny["decode"]["pairs"] == 2
    assert tiny["decode"]["ratio_low"] <= tiny["decode"]["ratio_median"] <= tiny["decode"]["ratio_high"]
    for part in ("scoring", "training"):
        assert 0 < tiny[part]["mfu_of_measured_products"]["median"] < 1
        assert tiny[part]["mfu_of_data_sheet"]["status"] == "not_measured"
    rows = gpu_step.TINY["tiny"].answer_tokens
    assert tiny["step"]["response_tokens_per_second"]["high"] == pytest.approx(rows / tiny["step"]["seconds"]["low"])
    parts = sum(part["median"] for part in tiny["step"]["parts"].values())
    assert parts == pytest.approx(tiny["step"]["seconds"]["median"], rel=0.3)
    for key in ("step_against_trl", "step_against_trl_vllm"):
        assert tiny[key] == {**SHARED, "reason": "no interpreter with TRL was named (--trl-python)"}


def test_an_environment_without_vllm_is_a_reason() -> None:
    found = gpu_step.against_trl(sys.executable, gpu_step.TINY["tiny"], [1.0], 1, 0, vllm=True)
    assert found == {**SHARED, "reason": "the environment of TRL has no vLLM"}


def test_a_part_without_memory_is_not_measured_and_the_rest_goes_on(monkeypatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(gpu_step, "scoring", full)
    tiny = run(monkeypatch, tmp_path)["tiny"]
    reason = "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"
    assert tiny["scoring"] == {**SHARED, "reason": reason}
    assert tiny["training"]["seconds"]["runs"] == tiny["step"]["seconds"]["runs"] == 2


def test_a_part_that_fails_is_written_down_and_ends_in_an_error(monkeypatch, tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise ModelError("no such thing")

    monkeypatch.setattr(gpu_step, "decode", broken)
    with pytest.raises(SystemExit, match="tiny: decode"):
        run(monkeypatch, tmp_path)
    tiny = json.loads((tmp_path / "out.json").read_text())["tiny"]
    assert tiny["decode"] == {**SHARED, "reason": "ModelError: no such thing"}
    assert "seconds" in tiny["step"]


def test_useful_work_is_the_weights_of_the_body_at_every_token_and_the_head_at_answers() -> None:
    work = gpu_step.Work(
        gpu_step.TINY["tiny"].student, gpu_step.TINY["tiny"].teacher, rows=3, prompt_tokens=5, new_tokens=2
    )
    model = gpu_step.causal(work.student, torch.device("cpu"), torch.float32, name="x", trained=False)
    body = sum(p.numel() for name, p in model.module.named_parameters() if "proj" in name)
    head = work.student.vocab * work.student.hidden
    attended = 3 * sum(range(1, 8)) * work.student.layers * work.student.heads * work.student.head_dim
    expected = 2 * body * 3 * 7 + 2 * head * 3 * 2 + 4 * attended
    assert gpu_step.useful_flops(work, model) == pytest.approx(expected, rel=0.01)  # norms are all that differs


def test_a_ratio_is_theirs_by_ours() -> None:
    made = gpu_step.compared([1.0, 2.0, 1.0], [3.0, 5.0, 4.0], 10, "them")
    assert made["ratio_median"] == 3.0 and made["pairs"] == 3
    assert (made["ratio_low"], made["ratio_high"]) == (2.5, 4.0)
    np.testing.assert_allclose([made["ours"]["median"], made["peer"]["median"]], [10.0, 2.5])
