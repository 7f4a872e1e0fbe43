"""Files as data: the rules of YAML 1.2, lines, and files that give no data."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.config.loading import load_config
from opd.config.reading import MAX_BYTES, MAX_DEPTH, Unreadable, plain, read_file, read_value, scalar
from opd.errors import ConfigError
from tests.config.recipes import BASE, load, refused, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("12:30:00", "12:30:00"),
        ("2026-11-21", "2026-11-21"),
        ("1_000", "1_000"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    assert scalar(text) == value and type(scalar(text)) is type(value)


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**39), 10**39), st.booleans()))
def test_scalars_that_python_prints_are_read_back(value):
    text = str(value)
    assert scalar(text) == value and type(scalar(text)) is type(value)


def test_lr_without_a_dot_is_a_number_and_words_stay_words(tmp_path):
    loaded = load(tmp_path, BASE + "optim: {lr: 1e-5}\nrun: {folder: no}\nengine: {slots: 8}\n")
    assert loaded.config.optim.lr == 1e-5
    assert loaded.config.run.folder == "no"


@pytest.mark.parametrize("name", ["recipe.yaml", "recipe.yml", "recipe.toml", "recipe.json"])
def test_the_same_config_in_every_notation(tmp_path, name):
    text = {
        "toml": 'student.model = "s"\nteacher.model = "t"\n[[prompts.sources]]\nkind = "jsonl"\npath = "a"\n'
        "[optim]\nlr = 1e-4\n",
        "json": '{"student": {"model": "s"}, "teacher": {"model": "t"}, "optim": {"lr": 1e-4},'
        '"prompts": {"sources": [{"kind": "jsonl", "path": "a"}]}}',
    }.get(
        name.partition(".")[2],
        "student: {model: s}\nteacher: {model: t}\nprompts: {sources: [{kind: jsonl, path: a}]}\noptim:\n  lr: 1e-4\n",
    )
    config = load_config([write(tmp_path, text, name)]).config
    assert (config.student.model, config.teacher.model, config.optim.lr) == ("s", "t", 1e-4)
    assert config.prompts.sources[0].path == "a"


def test_yaml_lines_are_those_of_the_keys(tmp_path):
    layer = read_file(
        write(tmp_path, "# c\nstudent:\n  model:\n    long\nevals:\n  tasks:\n  - name: a\n  - name: b\n")
    )
    lines = {path: int(origin.rpartition(":")[2]) for path, origin in layer.origins.items() if path}
    assert lines[("student",)] == 2
    assert lines[("student", "model")] == 3
    assert lines[("evals", "tasks", 0, "name")] == 7
    assert lines[("evals", "tasks", 1)] == 8


def test_toml_lines(tmp_path):
    text = (
        '# c\nstudent.model = "s"\n\n[optim]  # rates\nlr = 1\n"eps" = 2\n'
        '[run]\nfolder = """\nseed = 3\n"""\nsteps = 4\n'
        '[[evals.tasks]]\nname = "a"\n[evals.tasks.grader]\nkind = "exact"\n[[evals.tasks]]\nname = "b"\n'
    )
    layer = read_file(write(tmp_path, text, "r.toml"))
    lines = {path: int(origin.rpartition(":")[2]) for path, origin in layer.origins.items() if path}
    assert lines == {
        ("student", "model"): 2,
        ("optim",): 4,
        ("optim", "lr"): 5,
        ("optim", "eps"): 6,
        ("run",): 7,
        ("run", "folder"): 8,
        ("run", "steps"): 11,
        ("evals", "tasks"): 12,
        ("evals", "tasks", 0): 12,
        ("evals", "tasks", 0, "name"): 13,
        ("evals", "tasks", 0, "grader"): 14,
        ("evals", "tasks", 0, "grader", "kind"): 15,
        ("evals", "tasks", 1): 16,
        ("evals", "tasks", 1, "name"): 17,
    }


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.yaml", "", "r.yaml: this file is empty"),
        ("r.yaml", "# only words\n", "r.yaml: this file is empty"),
        ("r.toml", "", "r.toml: this file is empty"),
        ("r.json", "{}", "r.json: this file is empty"),
        ("r.yaml", "- a\n- b\n", "a config is a mapping of sections (student: ...), not a list"),
        ("r.yaml", "words\n", "not a single value"),
        ("r.json", "[1]", "not a list"),
        ("r.yaml", "a: 1\nb: [1\nc: 2\n", "r.yaml:3: this is not valid YAML"),
        ("r.yaml", "a:\n\tb: 1\n", "r.yaml:2: this is not valid YAML"),
        ("r.yaml", "a: 1\n---\nb: 2\n", "r.yaml:2: a second document begins here"),
        ("r.yaml", "a: 1\nb: !!python/name:os.system x\n", "r.yaml:2: the tag tag:yaml.org,2002:python/name:os.system"),
        ("r.yaml", "!x a: 1\n", "r.yaml:1: the tag !x is not read"),
        ("r.yaml", "a: &x [1]\nb: *x\n", "r.yaml:1: anchors and aliases"),
        ("r.yaml", "a: 1\nb: *x\n", "r.yaml:2: anchors and aliases"),
        ("r.yaml", "&k a: 1\n", "r.yaml:1: anchors and aliases"),
        ("r.yaml", "? [a]\n: 1\n", "r.yaml:1: a key must be text"),
        ("r.yaml", "a: " + "[" * 2000, f"nested deeper than {MAX_DEPTH} levels"),
        ("r.toml", "a = " + "[" * 60 + "]" * 60, f"nested deeper than {MAX_DEPTH} levels"),
        ("r.json", '{"a": ' + "[" * 60 + "]" * 60 + "}", f"nested deeper than {MAX_DEPTH} levels"),
        ("r.toml", "a = \n", "r.toml: this is not valid TOML"),
        ("r.toml", "a = 2026-11-21\n", "a: date is not plain data"),
        ("r.toml", "a = nan\n", "a: a finite number is needed"),
        ("r.json", '{"a": NaN}', "a: a finite number is needed"),
        ("r.json", '{"a": 1', "r.json: this is not valid JSON"),
        ("r.yaml", "a: \x07\n", "r.yaml: this is not valid YAML"),
        ("r.txt", "a: 1\n", "r.txt: a config file ends in .yaml, .yml, .toml, .json"),
    ],
)
def test_files_that_give_no_data(tmp_path, name, text, said):
    assert said in refused(tmp_path, text, name=name)


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    os.symlink(tmp_path / "loop.yaml", tmp_path / "loop.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (MAX_BYTES[".yaml"] + 1))
    names = ["absent.yaml", "folder.yaml", "loop.yaml", "bytes.yaml", "large.yaml"]
    with pytest.raises(ConfigError) as caught:
        load_config([tmp_path / name for name in names])
    text = str(caught.value).replace(f"{tmp_path}/", "")
    assert text.startswith("5 problems in the config\n")
    assert "absent.yaml: this file does not exist" in text
    assert "folder.yaml: this is a folder, not a config file" in text
    assert "loop.yaml: this file cannot be read: Too many levels of symbolic links" in text
    assert "bytes.yaml: this is not UTF-8 text (byte 3)" in text
    assert f"large.yaml: a .yaml config holds at most {MAX_BYTES['.yaml']} bytes" in text


def test_keys_given_twice_name_both_lines(tmp_path):
    said = refused(tmp_path, BASE + "optim:\n  lr: 1e-5\n  eps: 1e-8\n  lr: 1e-4\n")
    assert "optim.lr: this is given twice: recipe.yaml:7 and recipe.yaml:9" in said
    toml = 'student.model = "s"\n[optim]\nlr = 1\neps = 2\nlr = 3\n'
    said = refused(tmp_path, toml, name="r.toml")
    assert said.startswith("optim.lr: this is given twice: r.toml:3 and r.toml:5")
    assert "optim: this is given twice: r.toml:1 and r.toml:3" in refused(
        tmp_path, "[optim]\n[run]\n[optim]\n", name="r.toml"
    )
    assert "b: this is given twice in one section of r.json" in refused(
        tmp_path, '{"a": {"b": 1, "b": 2}}', name="r.json"
    )


def test_a_repeated_key_does_not_hide_other_problems(tmp_path):
    said = refused(tmp_path, BASE + "run: {seed: 1, seed: 2, stepz: 3}\n")
    assert "2 problems" in said and "run.seed: this is given twice" in said and "did you mean run.steps?" in said


@given(st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab", max_size=3), st.lists))
def test_plain_data_is_left_as_it_is(value):
    assert plain(value, "here") == value


def test_other_objects_are_refused():
    with pytest.raises(Unreadable, match="object is not plain data"):
        plain({"a": (1, object())}, "here")
    with pytest.raises(Unreadable, match="key 3 is not text"):
        plain({"a": {3: 1}}, "here")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[0.9, 1e-3]", [0.9, 1e-3]),
        ("{a: [x, no]}", {"a": ["x", "no"]}),
        ('"1"', "1"),
        ("'a''b'", "a'b"),
        ("a: b", "a: b"),
        ("x # y", "x # y"),
        ("-1", -1),
        ("null", None),
    ],
)
def test_values_of_overrides(text, value):
    assert read_value(text, "command line") == value
