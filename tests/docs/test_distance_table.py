"""docs/distance.md: the committed numbers are what the script makes, a row for every vetted preset."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from opd.config.presets import METHODS

DOCS = Path(__file__).parents[2] / "docs"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-\d+)?")


@pytest.fixture(scope="module")
def maker() -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        import make_distance_table  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(DOCS))
    return make_distance_table


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "distance.md").read_text(encoding="utf-8")


def last_digit(number: str) -> float:
    digits, _, power = number.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def test_the_committed_table_is_what_the_script_makes(maker: Any, page: str) -> None:
    """run `python docs/make_distance_table.py` when this fails, and look at what changed."""
    made = maker.page()
    assert NUMBER.sub("#", page) == NUMBER.sub("#", made)
    for there, now in zip(NUMBER.findall(page), NUMBER.findall(made), strict=True):
        assert abs(float(there) - float(now)) < 1.5 * last_digit(there), f"{there} is {now} now"


def test_every_vetted_preset_has_a_row(maker: Any) -> None:
    named = {row.preset.partition(",")[0] for row in maker.ROWS}
    assert named == {name for name, method in METHODS.items() if method.status == "vetted"}


def test_what_the_page_says_about_first_order(maker: Any, page: str) -> None:
    """Half the distance is half the error, except where the normalisers of states stay."""
    (errors,) = [line for line in page.splitlines() if line.startswith("| error |")]
    far, *nearer = [float(cell) for cell in NUMBER.findall(errors)]
    for more, less in itertools.pairwise(nearer):
        assert more / less == pytest.approx(2, rel=0.15)
    assert far > nearer[0]
    rows = {row.preset: row for row in maker.ROWS}
    close = {n: maker.near(maker.models(n, other), rows["exopd"].target, 500 + n, 0.01) for n, other in maker.SEEDS}
    assert float(maker.compared(rows["exopd"], close)[1]) > 0.9
