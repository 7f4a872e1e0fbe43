"""Which student of a run is the best one."""

from __future__ import annotations

import pytest

from opd.config.schema import Config
from opd.costs.ledger import Ledger
from opd.wiring.exams import Exams


class _Prepared:
    class spec:
        name = "sums"


@pytest.mark.parametrize(
    ("means", "best"),
    [
        ({0: 0.2, 2: 0.5, 4: 0.5}, 2),  # of equal ones the earlier
        ({0: 0.5, 2: 0.5}, 2),  # but not the untrained one: it is there already
        ({0: 0.6, 2: 0.5, 4: 0.4}, 0),  # nobody is better than the untrained one
        ({0: 0.1, 2: None, 4: 0.0}, 0),
    ],
)
def test_the_best_student(means: dict[int, float | None], best: int) -> None:
    known = [{"step": step, "model": "student", "task": "sums", "mean": mean} for step, mean in means.items()]
    known.append({"step": 3, "model": "teacher", "task": "sums", "mean": 1.0})
    exams = Exams(Config.model_construct(), [_Prepared], None, None, Ledger(), known)  # type: ignore[arg-type]
    record = exams.best()
    assert record is not None and record["step"] == best
