"""A resolved config is complete, is JSON, and replays the same run."""

from __future__ import annotations

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.config.checks import ConfigWarning, check
from opd.config.loading import NOT_IN_HASH, config_hash, load_config, resolved
from opd.config.schema import Config
from tests.config.recipes import BASE, TASK, load, write

text = st.text(st.characters(codec="utf-8"), max_size=8)
words = st.text("abc", min_size=1, max_size=4)
positive = st.floats(1e-12, 1e12)
rows = st.lists(text | st.dictionaries(words, text | st.integers() | st.lists(st.booleans() | st.none())), min_size=1)


def optional(**fields):
    return st.fixed_dictionaries({}, optional=fields)


formats = optional(
    kind=st.sampled_from(["auto"]), system_prompt=st.none() | text, end_tokens=st.lists(text, max_size=2)
)
model = st.fixed_dictionaries({"model": text}, optional={"revision": st.none() | text, "format": formats})
source = st.one_of(
    st.fixed_dictionaries({"kind": st.just("inline"), "rows": rows}, optional={"weight": positive}),
    st.fixed_dictionaries({"kind": st.sampled_from(["jsonl", "parquet"]), "path": text}),
    st.fixed_dictionaries(
        {"kind": st.just("reasoning_gym"), "task": words}, optional={"settings": st.dictionaries(words, positive)}
    ),
)
term = st.fixed_dictionaries(
    {"name": words, "coefficient": positive},
    optional={
        "shape": st.fixed_dictionaries(
            {"kind": st.just("jsd"), "beta": st.floats(0.01, 0.99), "normalised": st.booleans()}
        )
    },
)
objective = st.one_of(
    st.fixed_dictionaries({"preset": st.sampled_from(["reverse_kl", "forward_kl", "tml"])}),
    st.fixed_dictionaries(
        {"preset": st.just("jsd"), "parameters": optional(beta=st.floats(0.01, 0.99), normalised=st.booleans())}
    ),
    st.fixed_dictionaries(
        {
            "behaviour": st.sampled_from(["student", "dataset"]),
            "terms": st.lists(term, min_size=1, max_size=3, unique_by=lambda term: term["name"]),
        },
        optional={"teacher_temperature": positive},
    ),
)
configs = st.fixed_dictionaries(
    {
        "student": model,
        "teacher": model,
        "prompts": st.fixed_dictionaries({"sources": st.lists(source, min_size=1, max_size=1)}),
    },
    optional={
        "objective": objective,
        "optim": optional(lr=positive, betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)),
        "run": optional(folder=text, seed=st.integers(0, 2**63 - 1), threads=st.none() | st.integers(1, 9)),
    },
)


@given(configs)
def test_resolved_configs_replay(raw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        config = check(Config.model_validate(raw))
        stored = json.loads(json.dumps(resolved(config)))
        again = load_config([], base=stored).config
    assert again == config
    assert check_quietly(Config(**stored)) == config
    assert resolved(again) == stored
    assert config_hash(again) == config_hash(config)


def check_quietly(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConfigWarning)
        return check(config)


def test_a_stored_config_is_a_config_file(tmp_path):
    config = load(tmp_path, BASE + TASK + "objective: {preset: jsd, parameters: {beta: 0.1}}\n").config
    stored = write(tmp_path, json.dumps(resolved(config), indent=2), "config.json")
    loaded = load_config([stored])
    assert loaded.config == config
    assert loaded.origins["objective.terms.0.shape.beta"] == str(stored)
    assert load_config([stored], ["optim.lr=3"]).config.optim.lr == 3


def test_resolved_holds_every_option_and_the_expanded_terms():
    raw = {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "prompts": {"sources": [{"kind": "inline", "rows": ["a"]}]},
    }
    unchecked = Config.model_validate(raw)
    data = resolved(unchecked)
    assert data["objective"]["preset"] == "reverse_kl"
    assert data["objective"]["behaviour"] == {"kind": "student"}
    assert data["objective"]["terms"][0]["shape"] == {"kind": "reverse_kl"}
    assert set(data) == set(Config.model_fields) and data["optim"]["lr"] == Config.model_fields["optim"].default.lr
    assert config_hash(unchecked) == config_hash(check(unchecked))


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("run.folder=x", True),
        ("run.log_every=7", True),
        ("run.existing=overwrite", True),
        ("run.seed=1", False),
        ("optim.lr=1", False),
    ],
)
def test_the_hash_changes_with_what_is_computed(tmp_path, override, same):
    assert (config_hash(load(tmp_path, BASE).config) == config_hash(load(tmp_path, BASE, override).config)) == same
    assert len(config_hash(load(tmp_path, BASE).config)) == 12
    assert len(NOT_IN_HASH) == 6


def test_the_hash_of_a_preset_is_that_of_the_config_it_was_stored_as(tmp_path):
    plain = load(tmp_path, BASE).config
    assert config_hash(plain) == config_hash(load(tmp_path, BASE + "objective: {preset: reverse_kl}\n").config)
