"""The benchmarks as modules: they are scripts, and find each other in their own folder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[2] / "bench"


def script(name: str) -> Any:
    """A module of bench/, e.g. "whole_step.run"."""
    before = sys.path[:]
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path[:] = before  # scripts add folders of their own
