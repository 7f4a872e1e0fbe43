"""What an import costs, and what it must not bring."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import opd", ("torch", "transformers", "datasets", "pydantic")),
        ("import opd.config.loading, opd.journal.reader, opd.costs.ledger, opd.grading.graders", ("torch",)),
        ("import opd.cli.main", ("torch", "transformers")),
        ("import opd.objectives.kernels.tiled", ("transformers", "rich", "yaml", "opd.models", "opd.text")),
    ],
)
def test_imports_stay_light(statement: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys; {statement}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_promised_names_are_there() -> None:
    import opd

    assert callable(opd.distill) and opd.Run.__name__ == "Run" and opd.__version__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = opd.no_such_name
