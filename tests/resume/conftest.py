"""Tiny models and prompts, for runs in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save(folder / "student", "qwen3", seed=0)
    tiny.save(folder / "teacher", "llama", seed=1, scale=10.0)
    rows = [{"prompt": f"What is {i} + {j}?", "answer": str(i + j)} for i in range(6) for j in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
