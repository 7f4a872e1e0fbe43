"""The configs in the README are read without a complaint, and what it says of the objectives is so."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from opd.config.loading import load_config
from opd.config.presets import METHODS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_whole_configs_load():
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)]
    whole = [block for block in blocks if {"student", "prompts"} <= set(block)]
    assert len(whole) >= 2
    for block in whole:
        assert load_config([block]).config.objective.terms


def test_it_counts_the_methods():
    assert f"lists {len(METHODS)} of them" in README


def test_links_lead_somewhere():
    root = Path(__file__).parents[2]
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).is_file(), target
