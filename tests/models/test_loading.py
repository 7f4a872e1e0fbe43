"""Loading real checkpoints: dtypes, messages, and code that must not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opd.config.schema import Scorer, Student
from opd.errors import ModelError
from opd.models.causal import CausalLM
from opd.models.loading import generation_end_ids, load_frozen, load_student, pick_device, saved_dtype
from opd.models.saving import save_model
from opd.objectives.head import head_logits
from tests import tiny


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_body_and_head_give_the_models_own_logits(kind: str) -> None:
    """The split is checked at load for every architecture; here it is checked on a padded batch as well."""
    module = tiny.model(kind)
    model = CausalLM(module, vocab_size=290, compute_dtype=torch.float32, name=kind)
    ids = torch.randint(0, 290, (2, 12), generator=torch.Generator().manual_seed(0))
    ones, positions = torch.ones_like(ids), torch.arange(12).expand(2, 12)
    with torch.no_grad():
        ours = head_logits(model.hidden(ids, ones, positions).flatten(0, 1), model.head)
        theirs = module(input_ids=ids).logits[..., :290].flatten(0, 1)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("Gemma2Config", {"final_logit_softcapping": 3.0}),
        ("GraniteConfig", {"logits_scaling": 4.0}),
        ("CohereConfig", {}),
    ],
)
def test_heads_that_cap_or_scale_their_logits(kind: str, settings: dict) -> None:
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, kind)(vocab_size=64, num_key_value_heads=2, **shape, **settings)
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config).eval()
    model = CausalLM(module, vocab_size=64, compute_dtype=torch.float32, name=kind)  # raises when the split is wrong
    assert model.head.softcap is not None or model.head.scale != 1.0


def test_a_head_that_is_not_understood_is_an_error_not_a_wrong_gradient() -> None:
    module = tiny.model("llama")
    module.get_output_embeddings().register_forward_hook(lambda _, __, out: out * 1.1)
    with pytest.raises(ModelError, match="does something between"):
        CausalLM(module, vocab_size=300, compute_dtype=torch.float32, name="odd")


def test_student_has_float32_weights_whatever_it_computes_in(tmp_path: Path) -> None:
    module = tiny.model("qwen3").to(torch.bfloat16)
    module.config.dtype = torch.bfloat16
    module.save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    spec = Student(model=str(tmp_path / "m"), dtype="bfloat16", device="cpu")
    student = load_student(spec, 300)
    assert {p.dtype for p in student.module.parameters()} == {torch.float32}
    ids = torch.tensor([[1, 2, 3]])
    hidden = student.hidden(ids, torch.ones_like(ids), torch.arange(3)[None])
    assert hidden.dtype == torch.bfloat16
    assert saved_dtype(spec) == torch.bfloat16
    teacher = load_frozen(Scorer(model=str(tmp_path / "m"), dtype="bfloat16", device="cpu"), 300, role="teacher")
    assert {p.dtype for p in teacher.module.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.module.parameters())
    taken = load_frozen(spec, 300, role="student")  # as `opd eval` does: no master weights where nothing is trained
    assert {p.dtype for p in taken.module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_student_loads_in_transformers_as_it_was(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Tied (gpt2) and untied heads; written in the dtype of the checkpoint it came from."""
    source = tiny.save(tmp_path / "source", kind, tie_word_embeddings=kind == "gpt2")
    student = load_student(Student(model=source, device="cpu"), 300)
    save_model(student, tiny.tokenizer(), tmp_path / "final", dtype=dtype, end_ids=(2, 0))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert again.dtype == dtype and again.generation_config.eos_token_id == [2, 0]
    for a, b in zip(student.module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.to(dtype), b)
    assert student.module.config.dtype != torch.bfloat16, "saving must not change the live model"


def test_tied_tensors_are_stored_once_and_counters_keep_their_type(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "gpt2", tie_word_embeddings=True)
    student = load_student(Student(model=source, device="cpu"), 300)
    student.module.transformer.register_buffer("count", torch.tensor([2**24 + 1]))
    save_model(student, tiny.tokenizer(), tmp_path / "final", dtype=torch.bfloat16, end_ids=(2,))
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert stored["transformer.count"].item() == 2**24 + 1
    wide = [name for name, tensor in stored.items() if tensor.shape == (300, 32)]
    assert wide == ["transformer.wte.weight"]


def test_end_tokens_come_from_the_generation_config(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m")
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert generation_end_ids(Student(model=source), "student") == (2, 0)
    path.unlink()
    assert generation_end_ids(Student(model=source), "student") == (2,)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere-at-all"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match=r"student\.model: there is no folder"):
        load_student(Student(model=name), 10)


def test_a_hub_name_without_a_hub_says_so() -> None:
    with pytest.raises(ModelError, match=r"teacher\.model: 'nobody/nothing'.*(hub|cache)"):
        load_frozen(Scorer(model="nobody/nothing"), 10, role="teacher")


def test_a_folder_without_a_checkpoint_and_broken_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_student(Student(model=str(tmp_path)), 10)
    source = tiny.save(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_student(Student(model=source), 300)


def test_S_03_weights_in_pickle_are_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m")
    module = AutoModelForCausalLM.from_pretrained(source)
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_student(Student(model=source), 300)


def test_S_05_code_that_comes_with_a_model_does_not_run_unasked(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m")
    proof = tmp_path / "ran"
    (tmp_path / "m" / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "evil", "architectures": ["M"]}
    path.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}))
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        load_student(Student(model=source), 300)
    assert not proof.exists()
    with pytest.raises(ModelError):  # asked to, it runs: the option reaches the loader
        load_student(Student(model=source, trust_remote_code=True), 300)
    assert proof.exists()


def test_a_tokenizer_larger_than_the_head_is_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", vocab_size=256)
    with pytest.raises(ModelError, match="300 tokens but its output layer has only 256 rows"):
        load_student(Student(model=source), 300)


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelError, match="is not a device"):
        pick_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="torch sees 0 CUDA devices"):
            pick_device("cuda")


def test_apple_gpus_are_not_picked_since_tokens_are_drawn_in_float64(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ModelError, match="float64"):
        pick_device("mps")


def test_fingerprint_tells_models_apart() -> None:
    marks = [
        CausalLM(tiny.model(seed=s), vocab_size=300, compute_dtype=torch.float32, name="m").fingerprint()
        for s in (0, 0, 1)
    ]
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gemma3", "qwen3_next"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(tmp_path: Path, kind: str) -> None:
    """Also behind the engine, which leaves the module in eval mode; gpt2 has dropout, which must stay off."""
    source = tiny.save(tmp_path / "m", kind)
    ids = torch.arange(1, 65)[None]
    kept, gradients = [], []
    for checkpointing in (False, True):
        student = load_student(Student(model=source, device="cpu", gradient_checkpointing=checkpointing), 300)
        student.module.eval()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            states = student.hidden(ids, torch.ones_like(ids), torch.arange(64)[None])
        kept.append(sum(saved))
        states.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.module.parameters() if p.grad is not None]))
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_a_checkpoint_with_weights_missing_is_refused_not_filled_with_random_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny.save(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"3 of its weights are not in the checkpoint.*layers\.1\.mlp"):
        load_frozen(Scorer(model=source, device="cpu"), 300, role="teacher")
