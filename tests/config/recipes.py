"""Small config files for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.loading import LoadedConfig, load_config
from opd.errors import ConfigError

STUDENT = "student: {model: small}\n"
TEACHER = "teacher: {model: big}\n"
PROMPTS = "prompts:\n  sources:\n    - {kind: jsonl, path: a.jsonl}\n"
BASE = STUDENT + TEACHER + PROMPTS  # five lines: whatever is put behind it begins on line 6
TASK = "evals: {tasks: [{name: held, source: {kind: jsonl, path: b.jsonl}, grader: {kind: exact}}]}\n"


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str) -> LoadedConfig:
    return load_config([write(folder, text)], overrides)


def refused(folder: Path, text: str, *overrides: str, name: str = "recipe.yaml") -> str:
    """What the error says, with the folder cut away: `recipe.yaml:6` is a whole origin."""
    with pytest.raises(ConfigError) as caught:
        load_config([write(folder, text, name)], overrides)
    return str(caught.value).replace(f"{folder}/", "")
