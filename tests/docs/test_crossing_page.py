"""docs/across_tokenizers.md: its picture is what the script draws, its configs load, its numbers are right."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from opd.config.alignments import Alignment
from opd.config.loading import load_config
from opd.config.objective import Objective

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "across_tokenizers.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def maker() -> Any:
    sys.path.insert(0, str(DOCS))
    try:
        import make_crossing_figure  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(DOCS))
    return make_crossing_figure


def test_the_committed_picture_is_what_the_script_draws(maker: Any) -> None:
    """run `python docs/make_crossing_figure.py` when this fails, and look at what changed."""
    groups = maker.groups(maker.crossing())
    assert (DOCS / "figures" / "crossing.svg").read_text(encoding="utf-8") == maker.picture(groups)


def test_what_the_page_says_of_the_picture(maker: Any) -> None:
    groups = maker.groups(maker.crossing())
    ours, theirs = (
        sum(len(side) for side in sides) for sides in zip(*((g.ours, g.theirs) for g in groups), strict=True)
    )
    assert f"with {ours} tokens; below" in PAGE and f"that takes `½` apart, with {theirs}." in PAGE
    kinds = {(group.ours, group.theirs): group.kind for group in groups}
    assert kinds[("To", "gether"), ("␣Tog", "ether")] == "span"
    assert kinds[("␣47",), ("␣", "4", "7")] == "span" and kinds[("C3", "AF"), ("ï",)] == "span"
    assert kinds[("C2", "BD"), ("1", "⁄", "2")] == "alone"
    assert kinds[("<|im_end|>",), ("</s>",)] == "same"


def test_configs_load() -> None:
    whole = [block for block in BLOCKS if {"student", "prompts"} <= set(block)]
    assert len(whole) == 2
    for block in whole:
        assert load_config([block]).config.objective.terms
    for block in BLOCKS:
        Objective.model_validate(block["objective"])


def test_every_kind_is_there() -> None:
    for kind in get_args(Alignment):
        name = kind.model_fields["kind"].default
        assert f"**`{name}`**" in PAGE and f"| `{name}` |" in PAGE


def test_the_numbers_of_the_example() -> None:
    p, q = (-1.2, -0.3), (-0.9, -0.1)
    assert f"a = {sum(q):.1f} + {-sum(p):.1f} = {sum(q) - sum(p):.1f}`" in PAGE
    assert f"{math.exp(p[0]):.3f} times the student's" in PAGE and f"{math.exp(q[0]):.3f} times the teacher's" in PAGE
    a, b = math.exp(sum(p) / 100), math.exp(sum(q) / 100)
    assert f"= {a:.4f}`" in PAGE and f"= {b:.4f}`" in PAGE
    here, else_ = b / a - 1, (1 - b) / (1 - a) - 1  # the field of the forward KL is r - 1
    assert f"{a / 100:.6f} ({here:.4f} + {-else_:.4f}) = {a / 100 * (here - else_):.4f}`" in PAGE


def test_links_and_named_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGE) if "://" not in link]
    assert links and not [link for link in links if not (DOCS / link).exists()]
    named = re.findall(r"`((?:tests|docs)/[\w/.]+)`", PAGE)
    assert named and not [name for name in named if not (DOCS.parent / name).exists()]
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors
