"""The trained student on disk: two forms that say the same, and a swap that a kill cannot lose."""

from __future__ import annotations

import os
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from opd.config.schema import Lora, Student
from opd.errors import OutOfSpace
from opd.models import saving
from opd.models.causal import CausalLM
from opd.models.loading import load_student
from opd.models.saving import export_form, recover, save_model
from tests import rooms, tiny
from tests.models.adapted import logprobs, move


def student_of(folder: Path, kind: str, **settings) -> CausalLM:
    torch.manual_seed(0)
    spec = Student(model=tiny.save(folder / "base", kind), device="cpu", lora=Lora(rank=4, alpha=8), **settings)
    student = load_student(spec, 300)
    move(student)
    return student


def save(student: CausalLM, folder: Path, **options) -> None:
    options = {"dtype": torch.float32, "end_ids": (2, 0), **options}
    save_model(student, tiny.tokenizer(), folder, **options)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_merged_and_adapter_exports_say_what_the_student_says(tmp_path: Path, kind: str) -> None:
    student = student_of(tmp_path, kind)
    live = {name: p.detach().clone() for name, p in student.module.state_dict().items()}
    ours = logprobs(student.module)
    save(student, tmp_path / "merged")
    save(student, tmp_path / "adapter", form="adapter")
    after = student.module.state_dict()
    assert live.keys() == after.keys() and all(torch.equal(live[name], after[name]) for name in live)
    assert student.module.generation_config.eos_token_id == 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logprobs(base)
    beside = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logprobs(merged), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logprobs(beside), ours, atol=1e-5, rtol=1e-5)
    assert (plain - ours).abs().max() > 0.1
    assert not list(tmp_path.glob("*/README.md"))
    for folder in ("merged", "adapter"):
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == [2, 0]
        assert AutoTokenizer.from_pretrained(tmp_path / folder).get_vocab() == tiny.tokenizer().get_vocab()
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == (str(tmp_path / "base"), None)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32} and sum(map(torch.numel, stored.values())) == (
        student.trainable_count
    )


def test_a_merged_export_in_bfloat16_is_the_sum_rounded_once(tmp_path: Path) -> None:
    student = student_of(tmp_path, "qwen3")
    save(student, tmp_path / "merged", dtype=torch.bfloat16)
    assert student.adapter is not None
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, layer in student.adapter.layers.items():
        added = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert torch.equal(stored[f"{name}.weight"], (base[f"{name}.weight"] + added).to(torch.bfloat16))
    assert torch.equal(stored["lm_head.weight"], base["lm_head.weight"].to(torch.bfloat16))


def test_an_adapter_names_the_revision_of_its_base(tmp_path: Path) -> None:
    student = student_of(tmp_path, "qwen3", revision="v1.2")
    save(student, tmp_path / "adapter", form="adapter")
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).revision == "v1.2"


@pytest.mark.parametrize(
    ("lora", "bits", "form"),
    [
        (None, "none", "merged"),
        ("auto", "none", "merged"),
        ("merged", "none", "merged"),
        ("adapter", "none", "adapter"),
        ("auto", "int4", "adapter"),
        ("adapter", "int8", "adapter"),
    ],
)
def test_W_02_quantised_weights_are_never_merged_into(lora: str | None, bits, form: str) -> None:
    spec = Student(model="m", quantisation=bits, lora=None if lora is None else Lora(save=lora))  # type: ignore[arg-type]
    assert export_form(spec) == form


# ---- a kill at any moment ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing may clean up after it that a SIGKILL would not."""


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("final"))


def tell(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["lm_head.weight"][0, 0])


@pytest.mark.parametrize("recovers", [True, False])
@pytest.mark.parametrize("moment", range(6))
def test_a_kill_at_any_moment_of_the_swap_leaves_the_old_or_the_new_model(
    tmp_path: Path, monkeypatch, moment: int, recovers: bool
) -> None:
    student, final = rooms.causal(), tmp_path / "final"
    weight = student.module.lm_head.weight

    def write(value: float) -> None:
        with torch.no_grad():
            weight[0, 0] = value
        save(student, final)

    write(1.0)
    calls = iter(range(100))

    def dying(real):
        def call(*args):
            if next(calls) == moment:
                raise Killed
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", dying(os.replace))
        patch.setattr(saving, "discard", dying(saving.discard))
        patch.setattr(saving, "sync", lambda path: None)
        patch.setattr(saving.shutil, "rmtree", lambda *a, **k: None)  # a killed process cleans nothing up
        try:
            write(2.0)
            survived = True
        except Killed:
            survived = False
    assert survived == (moment > 4), there(tmp_path)
    assert tell(final if final.is_dir() else tmp_path / "final.old") == (1.0 if moment < 3 else 2.0)
    if recovers:
        recover(final)
        assert tell(final) == (1.0 if moment < 3 else 2.0)
    write(3.0)  # leftovers do not stand in the way
    assert there(tmp_path) == ["final"] and tell(final) == 3.0


def test_recover_leaves_a_whole_folder_alone(tmp_path: Path) -> None:
    recover(tmp_path / "final")
    assert there(tmp_path) == []
    for name in ("final", "final.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "who").write_text(name)
    recover(tmp_path / "final")
    assert there(tmp_path) == ["final"] and (tmp_path / "final" / "who").read_text() == "final"


def test_a_disk_that_is_full_keeps_the_old_model(tmp_path: Path, monkeypatch) -> None:
    student, final = rooms.causal(), tmp_path / "final"
    save(student, final)
    before = {path.name: path.read_bytes() for path in final.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student.module, "save_pretrained", full)
    with pytest.raises(OutOfSpace):
        save(student, final)
    assert there(tmp_path) == ["final"]
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


def test_every_file_is_on_the_disk_before_it_is_swapped_in(tmp_path: Path, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(saving, "sync", lambda path: done.append(path.name))
    replace = os.replace
    monkeypatch.setattr(saving.os, "replace", lambda a, b: (done.append(f"> {b.name}"), replace(a, b)))
    save(rooms.causal(), tmp_path / "final")
    first = done.index("> final")
    assert set(done[:first]) == {path.name for path in (tmp_path / "final").iterdir()} | {"final.tmp"}
    assert done[first + 1 :] == [tmp_path.name]
