"""opd: on-policy distillation of language models.

import opd

run = opd.distill(student="Qwen/Qwen3-1.7B-Base", teacher="Qwen/Qwen3-8B", prompts="prompts.jsonl")
print(run.summary["gap_closed"], run.student)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "distill", "grade", "resume"]

if TYPE_CHECKING:
    from opd.wiring.grade import grade
    from opd.wiring.run import Run, distill, resume


def __getattr__(name: str) -> Any:
    """`import opd` stays light: torch comes with the first use of what needs it."""
    if name in ("distill", "resume", "Run"):
        return getattr(importlib.import_module("opd.wiring.run"), name)
    if name == "grade":
        return importlib.import_module("opd.wiring.grade").grade
    raise AttributeError(f"module 'opd' has no attribute {name!r}")
