"""docs/benchmarks.md holds what bench/results/latest.json says, and that file has the shape that others rely on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.bench.scripts import BENCH, script

page = script("page")
LATEST = BENCH / "results" / "latest.json"
RATIO = {"ours", "peer", "ratio_median", "ratio_low", "ratio_high", "pairs"}
KERNEL = RATIO | {"ours_mb", "peer_mb", "loss_error", "peer_loss_error", "gradient_error", "peer_gradient_error"}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(LATEST.read_text()) if LATEST.exists() else {}


def section(results: dict[str, Any], *path: str) -> dict[str, Any]:
    """What was measured there; a test of something that is not there yet has nothing to say."""
    found: Any = results
    for key in path:
        if key not in found:
            pytest.skip(f"{'.'.join(path)} has not been measured")
        found = found[key]
    return found


def fits(found: dict[str, Any], keys: set[str]) -> None:
    if "status" in found:
        assert found["status"] == "not_measured" and found["reason"]
        return
    assert keys <= found.keys()
    assert found["ratio_low"] <= found["ratio_median"] <= found["ratio_high"] and found["pairs"] >= 1
    assert found["ours"] > 0 and found["peer"] > 0


def test_the_committed_page_is_what_the_committed_results_make(results: dict[str, Any]) -> None:
    """run `python bench/page.py` when this fails"""
    there = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(there, results) == there


@pytest.mark.parametrize("case", page.SAYS)
@pytest.mark.parametrize("precision", page.PRECISIONS)
def test_shape_of_whole_step(results: dict[str, Any], case: str, precision: str) -> None:
    fits(section(results, "whole_step", case, precision), RATIO)


@pytest.mark.parametrize("peer", page.STEP_PEERS)
@pytest.mark.parametrize("case", page.STEP_CASES)
@pytest.mark.parametrize("precision", page.PRECISIONS)
def test_shape_of_other_trainers(results: dict[str, Any], peer: str, case: str, precision: str) -> None:
    fits(section(results, "peers", peer, case, precision), RATIO)


@pytest.mark.parametrize("part", page.PARTS)
def test_shape_of_smaller_parts(results: dict[str, Any], part: str) -> None:
    fits(section(results, "parts", *part.split(".")), RATIO)


@pytest.mark.parametrize("peer", page.PEERS)
@pytest.mark.parametrize("dtype", page.DTYPES)
def test_shape_of_kernel_and_memory(results: dict[str, Any], peer: str, dtype: str) -> None:
    found = section(results, "kernel", peer, dtype)
    fits(found, KERNEL)
    if "status" not in found:
        peaks = section(results, "memory", "kernel", dtype)
        assert peaks["ours"] == found["ours_mb"] and found["peer_mb"] in peaks.values()


@pytest.mark.parametrize("precision", page.PRECISIONS)
def test_shape_of_efficiency(results: dict[str, Any], precision: str) -> None:
    found = section(results, "efficiency", precision)
    if "status" in found:
        return
    for one in (found["own_shapes"], found["peak_rate"], *found["parts"].values()):
        assert 0 < one["low"] <= one["share"] <= one["high"]
    assert set(found["parts"]) == {"decode", "scoring", "update"}


def test_cases_are_called_what_they_are() -> None:
    assert {name: case.says for name, case in script("whole_step.cases").CASES.items()} == page.SAYS


def test_a_page_shows_what_was_measured_and_says_what_was_not() -> None:
    found = {"ours": 2.0, "peer": 6.0, "ratio_median": 3.0, "ratio_low": 2.5, "ratio_high": 3.5, "pairs": 5}
    made = {"whole_step": {"v408": {"fp32": found | {"ours_mb": 1234.4, "peer_mb": 99.6}}}}
    made["whole_step"]["v32k"] = {"best": {"status": "not_measured", "reason": "no environment"}}
    empty = "".join(f"{name}\n<!-- {name} -->\n<!-- end -->\n" for name in page.BLOCKS)
    text = page.filled(empty, made)
    assert "| v408: 8 x 128 new tokens, V = 408 | fp32 | 6.00 | 2.00 | 3.00 (2.50 to 3.50) | 100 | 1,234 |" in text
    assert "| v32k: 8 x 128 new tokens, V = 32,768 | best | not measured: no environment |" in text
    assert "not measured: nobody has run it yet" in text
    assert page.filled(text, made) == text, "filling a page again changes nothing"


def test_every_row_of_a_table_has_as_many_cells_as_its_head(results: dict[str, Any]) -> None:
    tables = [made for name, make in page.BLOCKS.items() for found in (results, {}) if (made := make(found))[0] == "|"]
    assert len(tables) >= 7
    for made in tables:
        assert len({line.count("|") for line in made.splitlines()}) == 1, made


@pytest.mark.parametrize("name", ["whole_step", "nobody"])
def test_a_block_too_few_or_too_many_is_an_error(name: str) -> None:
    blocks = [block for block in page.BLOCKS if block != name] + (["nobody"] if name == "nobody" else [])
    with pytest.raises(ValueError, match="add or take away its markers"):
        page.filled("".join(f"<!-- {block} -->\n<!-- end -->\n" for block in blocks), {})
