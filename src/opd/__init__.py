"""opd: on-policy distillation of language models.

import opd

run = opd.distill(student="Qwen/Qwen3-1.7B-Base", teacher="Qwen/Qwen3-8B", prompts="prompts.jsonl")
print(run.summary["gap_closed"], run.student)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "distill"]

if TYPE_CHECKING:
    from opd.wiring.run import Run, distill


def __getattr__(name: str) -> Any:
    """`import opd` stays light: torch comes with the first use of what needs it."""
    if name in ("distill", "Run"):
        return getattr(importlib.import_module("opd.wiring.run"), name)
    raise AttributeError(f"module 'opd' has no attribute {name!r}")
