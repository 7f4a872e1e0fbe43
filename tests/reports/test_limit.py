"""Words about a limit follow from its numbers."""

from __future__ import annotations

import pytest
from rich.console import Console

from opd.costs.roofline import Limit, Part
from opd.reports.limit import advice, brief, show_limit, speed_line

DECODE = Part("decode", "rollout", 1e9, 3.5e12, 30.0, "weights")
TRAINING = Part("training", "update", 1e12, 1e9, 10.0, "products")
NOTHING = Part("weights back", "rollout", 0.0, 0.0, 0.0, "products")
LIMIT = Limit((DECODE, NOTHING, TRAINING))


def test_the_largest_part_and_the_two_best_changes_are_named() -> None:
    said = advice(LIMIT, 8.0, [("a=1", 1.2), ("b=2", 1.04), ("c=3", 3.0), ("d=4", 1.1)])
    assert said == [
        "most of it: decode, 75.0 %, bound by reading weights for 8 rows at a time",
        "c=3 would allow 3 times the tokens a second",
        "a=1 would allow 1.2 times the tokens a second",
    ]
    assert "no single option" in advice(LIMIT, None, [("b=2", 1.04)])[1]
    assert "rows" not in advice(Limit((TRAINING,)), 8.0, [])[0]


def test_the_table_leaves_out_what_takes_no_time() -> None:
    console = Console(width=200, record=True)
    show_limit(LIMIT, tokens=400, steps=90, rows=8, console=console)
    printed = console.export_text()
    assert "3.5 TB" in printed and "memory (weights)" in printed and "weights back" not in printed
    assert "90 steps, at least 1:00:00" in printed and "10 answer tokens a second" in printed


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.00031, "0.31 ms"), (0.0452, "45.2 ms"), (12.34, "12.3 s"), (105, "1:45")]
)
def test_seconds_are_short(seconds: float, words: str) -> None:
    assert brief(seconds) == words


def test_a_run_in_one_line() -> None:
    parts = {"rollout": 1.0, "scoring": 2.0, "update": 1.0}
    limit = {"seconds_per_step": 4.0, "achieved": 0.5, "bottleneck": "head", "bound": "states", "parts": parts}
    summary = {"limit": limit, "seconds_by_phase": {"rollout": 50.0, "scoring": 20.0, "update": 10.0, "load": 99.0}}
    assert speed_line(summary) == (
        "speed: 0.5 of this machine's limit; most time: rollout, 62.5 % of it, at 0.2 of its limit; "
        "most of the limit: head, bound by reading and writing states"
    )  # 10 steps
    assert "--again" in str(speed_line({**summary, "limit": {**limit, "achieved": 1.2}}))
    assert speed_line({"limit": None}) is None and speed_line({}) is None
