"""The config that `opd init` writes: it loads, and the defaults it shows are the defaults."""

from __future__ import annotations

import re
from importlib.resources import files

from opd.config.loading import given, load_config
from opd.config.reading import read_file
from opd.config.schema_walk import ROOT, Option, option_at
from tests.config.recipes import write

STARTER = files("opd.cli").joinpath("starter.yaml").read_text(encoding="utf-8")


def leaves(data, path=()):
    if isinstance(data, dict | list) and data:
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*path, key))
    else:
        yield path, data


def default_at(path, data):
    section = ROOT if len(path) == 1 else option_at(path[:-1], data)
    assert isinstance(section, Option)
    value = data
    for key in path[:-1]:
        value = value[key]
    field = section.section(value).model_fields[path[-1]]
    return field.get_default(call_default_factory=True)


def test_it_loads_and_checks(tmp_path):
    config = load_config([write(tmp_path, STARTER)]).config
    assert (config.student.model, config.teacher.model) == ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B")


def test_three_lines_are_to_be_edited():
    assert [line.split()[0] for line in STARTER.splitlines() if "EDIT:" in line] == ["model:", "model:", "path:"]


def test_commented_options_are_the_defaults(tmp_path):
    active = read_file(write(tmp_path, STARTER, "as_written.yaml")).data
    uncommented = re.sub(r"^(\s*)#(?=\w+:)", r"\1", STARTER, flags=re.MULTILINE)
    path = write(tmp_path, uncommented, "all.yaml")
    load_config([path])
    everything = read_file(path).data
    spoken = {leaf for leaf, value in leaves(active) if value is not None}
    shown = {leaf: value for leaf, value in leaves(everything) if leaf not in spoken}
    assert len(shown) > 25
    for leaf, value in shown.items():
        assert default_at(leaf, everything) == value, f"{leaf}: the starter says {value}"


def test_the_defaults_that_are_named_in_words():
    data = given(load_config([{**_plain(STARTER)}]).config)
    for line in STARTER.splitlines():
        if found := re.match(r"\s+(\w+): (\S+)\s+# .*\bthe default is (\w+)", line):
            name, value, default = found.groups()
            holders = [p for p, _ in leaves(data) if p[-1] == name]
            assert holders and all(str(default_at(p, data)).lower() == default for p in holders), line
            assert value != default


def test_the_evals_block_in_the_comments_works(tmp_path):
    block = re.search(r"^#   evals:\n(?:#     .*\n)+", STARTER, flags=re.MULTILINE)
    assert block
    head, tail = STARTER.split("\nevals:\n")
    text = head + "\n" + re.sub(r"^#", "", block[0], flags=re.MULTILINE)
    text = text.replace("   evals:", "evals:") + tail[tail.index("\nrun:") :]
    config = load_config([write(tmp_path, text)]).config
    assert config.evals.every == 25 and config.evals.tasks[0].grader.kind == "math"


def _plain(text):
    import yaml

    return {key: value for key, value in yaml.safe_load(text).items() if value is not None}
