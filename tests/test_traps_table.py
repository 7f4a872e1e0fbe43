"""`docs/traps.md` names a test for every trap of its groups, and the tests are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "traps.md"
TRAPS = """
    O-1 O-2 O-3 O-4 O-5 O-6 O-7 O-8 O-9 O-10 O-11 O-12 O-13 O-14 O-15 O-16 O-17 O-18 O-19 O-20 O-21 O-22
    O-23 O-24 O-25 O-26 O-27
    A-1 A-2 A-3 A-4 A-5 A-6 A-7 A-8 A-9 A-10 A-11 A-12 A-13 A-14 A-15 A-16 A-17 A-18
    T-1 T-2 T-3 T-4 T-5 T-6 T-7 T-8 T-9 T-10 T-11
    M-1 M-2 M-3 M-4 M-5 M-6 M-7 M-8 M-9 M-10 M-11 M-12 M-13 M-14 M-15
    X-1 X-2 X-3 X-4 X-5 X-6 X-7 X-8 X-9 X-10 X-11 X-12 X-13 X-14 X-15 X-16 X-17
    W-1 W-2 W-5
"""
IDS = tuple(TRAPS.split())
NOT_YET = {"W-3", "W-4"}  # of answers older than the student: some tests, and no row yet
MOST_WITHOUT = len(IDS) // 10  # traps that cannot occur, and have a sentence instead of a test
ROW = re.compile(r"^\| ([OATMXW]-\d+) \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
NAMED = [(trap, name) for trap, _, where in ROWS for name in re.findall(r"`([^`]+)`", where)]


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def ids_in(name: str) -> set[str]:
    """Of a test's name: T_07 and T_7 are both T-7."""
    return {f"{group}-{int(number)}" for group, number in re.findall(r"(?<![A-Za-z])([A-Z])_(\d+)(?=_)", name)}


def test_every_trap_has_one_row_in_order() -> None:
    assert tuple(trap for trap, _, _ in ROWS) == IDS


@pytest.mark.parametrize(("trap", "name"), NAMED, ids=[f"{trap}: {name.partition('::')[2]}" for trap, name in NAMED])
def test_the_test_is_there_and_carries_the_id(trap: str, name: str) -> None:
    file, _, test = name.partition("::")
    assert test in functions(TESTS / file), f"{file} has no {test}"
    assert trap in ids_in(test), f"{test} does not carry {trap}"


def test_few_rows_have_a_sentence_instead() -> None:
    without = [(trap, where) for trap, _, where in ROWS if "`" not in where]
    assert len(without) <= MOST_WITHOUT
    assert all(where.startswith("cannot occur: ") for _, where in without), without


def test_ids_in_names_are_ids_of_the_list() -> None:
    """A typing error in a name would be a trap that nobody knows."""
    names = {test for path in TESTS.rglob("test_*.py") for test in functions(path)}
    found = {trap for name in names for trap in ids_in(name) if trap[0] in "OATMXW"} - NOT_YET
    assert found == set(IDS) - {trap for trap, _, where in ROWS if "`" not in where}
