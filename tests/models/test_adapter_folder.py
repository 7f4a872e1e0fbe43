"""A model that is given as a PEFT adapter folder: its base, merged."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from opd.config.schema import Lora, Model, Scorer, Student
from opd.errors import ModelError
from opd.models.loading import (
    check_loadable,
    generation_end_ids,
    load_frozen,
    load_student,
    read_config,
    saved_dtype,
    tokenizer_source,
)
from opd.models.saving import save_model
from tests import tiny
from tests.models.adapted import logprobs, move


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter folder, and what the student that it was saved from says."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    student = load_student(Student(model=tiny.save(folder / "base"), device="cpu", lora=Lora(rank=4)), 300)
    move(student)
    save_model(student, tiny.tokenizer(), folder / "adapter", dtype=torch.float32, end_ids=(2, 0), form="adapter")
    return folder, logprobs(student.module)


@pytest.fixture
def adapter(made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0] / "adapter", tmp_path / "adapter"))


def edit(adapter: Path, **values) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_adapter_folder_is_its_base_with_the_adapter_merged(made, role: str) -> None:
    folder, said = made
    source = str(folder / "adapter")
    if role == "student":
        spec: Model = Student(model=source, device="cpu")
        model = load_student(Student(model=source, device="cpu"), 300)
    else:
        spec = Scorer(model=source, device="cpu")
        model = load_frozen(Scorer(model=source, device="cpu"), 300, role="teacher")
    check_loadable(spec, role)
    torch.testing.assert_close(logprobs(model.module), said, atol=1e-5, rtol=1e-5)
    assert not any(".lora_" in name or ".base_layer" in name for name in model.module.state_dict())
    assert {p.requires_grad for p in model.module.parameters()} == {role == "student"}
    assert generation_end_ids(spec, role) == (2, 0), "the adapter's own generation config comes first"
    assert read_config(spec, role).hidden_size == 32 and saved_dtype(spec) == torch.float32
    assert tokenizer_source(spec) == (source, None)


def test_the_tokenizer_is_the_bases_where_the_adapter_has_none(made, adapter: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).unlink()
    (adapter / "generation_config.json").unlink()
    spec = Student(model=str(adapter))
    assert tokenizer_source(spec) == (str(made[0] / "base"), None)
    assert generation_end_ids(spec, "student") == (2,)
    edit(adapter, base_model_name_or_path="someone/base", revision="v2")
    assert tokenizer_source(spec) == ("someone/base", "v2")
    assert tokenizer_source(Student(model="a/b", revision="r")) == ("a/b", "r")
    assert tokenizer_source(Student(model="a/b", revision="r", tokenizer="c/d")) == ("c/d", None)


def test_a_new_adapter_may_be_trained_on_a_merged_one_but_not_saved_without_it(made) -> None:
    source = str(made[0] / "adapter")
    student = load_student(Student(model=source, device="cpu", lora=Lora(rank=2)), 300)
    torch.testing.assert_close(logprobs(student.module), made[1], atol=1e-5, rtol=1e-5)
    assert {n for n, p in student.module.named_parameters() if p.requires_grad} and student.adapter is not None
    with pytest.raises(ModelError, match=r"student\.lora\.save: .* is an adapter itself"):
        load_student(Student(model=source, device="cpu", lora=Lora(rank=2, save="adapter")), 300)


def test_an_adapter_is_not_merged_into_few_bits(made) -> None:
    source = str(made[0] / "adapter")
    with pytest.raises(ModelError, match=r"teacher\.quantisation: .* would round it away"):
        check_loadable(Scorer(model=source, quantisation="int4"), "teacher")
    with pytest.raises(ModelError, match=r"student\.quantisation: .* would round it away"):
        load_student(Student(model=source, device="cpu", quantisation="int8", lora=Lora()), 300)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: (a / "adapter_config.json").write_text("{}"), "names no base_model_name_or_path"),
        (lambda a: (a / "adapter_config.json").write_text("{"), "names no base_model_name_or_path"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "names no base_model_name_or_path"),
        (lambda a: edit(a, base_model_name_or_path=None), "gives None as its base_model_name_or_path"),
        (lambda a: edit(a, base_model_name_or_path="./nowhere"), r"there is no folder '\./nowhere'"),
        (lambda a: edit(a, base_model_name_or_path=str(a)), "another adapter names it as its base"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), r"no adapter_model\.safetensors"),
    ],
)
def test_S_03_adapters_that_cannot_be_used_are_told_before_weights_are_read(adapter: Path, spoil, said: str) -> None:
    spoil(adapter)
    with pytest.raises(ModelError, match=rf"teacher\.model: .*{said}"):
        check_loadable(Scorer(model=str(adapter)), "teacher")


def test_an_adapter_of_another_model_is_told(adapter: Path, tmp_path: Path) -> None:
    edit(adapter, base_model_name_or_path=tiny.save(tmp_path / "other", "gpt2"))
    with pytest.raises(ModelError, match=r"teacher\.model: the adapter in .* does not fit its base"):
        load_frozen(Scorer(model=str(adapter), device="cpu"), 300, role="teacher")


def test_an_adapter_names_its_extra(adapter: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'opd\[lora\]'"):
        check_loadable(Scorer(model=str(adapter)), "teacher")


@pytest.mark.parametrize("targets", [("nothing",), ("lm_head",)])
def test_targets_are_checked_before_weights_are_read(made, tmp_path: Path, targets) -> None:
    base = Path(shutil.copytree(made[0] / "base", tmp_path / "base"))
    (base / "model.safetensors").unlink()
    check_loadable(Student(model=str(base), lora=Lora()), "student")
    with pytest.raises(ModelError, match=r"student\.lora\.targets"):
        check_loadable(Student(model=str(base), lora=Lora(targets=targets)), "student")
