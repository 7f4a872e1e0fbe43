"""Every shipped recipe is read without a complaint, and says whether it was run."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.config.loading import load_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe(path: Path) -> None:
    assert load_config([path]).config.objective.terms
    text = path.read_text()
    assert "Published:" in text and ("Not run by us" in text or "Run by us" in text)


def test_there_are_recipes() -> None:
    assert RECIPES
