"""LoRA through peft: what is trained, what stays, and the base behind it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from opd.config.schema import Lora, Student
from opd.errors import ModelError
from opd.models.adapters import (
    adapter_notes,
    adapter_off_view,
    add_adapter,
    base_fingerprint,
    base_tensors,
    idle_experts,
    plan_adapter,
    untrained_targets,
)
from opd.models.loading import load_student
from opd.rollouts.engine import EmbeddedEngine
from opd.types import SamplingParams
from tests import rooms, tiny
from tests.models.adapted import adapted, batch, logprobs, move


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_new_adapter_changes_nothing_and_freezes_the_base(kind: str) -> None:
    plain, student = rooms.causal(kind), adapted(kind, moved=False)
    assert torch.equal(logprobs(student.module), logprobs(plain.module))
    trained = {name: p for name, p in student.module.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert student.trainable_count == sum(p.numel() for p in trained.values())
    assert student.parameter_count == plain.parameter_count + student.trainable_count
    planned = plan_adapter(tiny.model(kind), Lora())
    assert planned.parameters(4) == student.trainable_count
    ours, base = base_tensors(student.module), plain.module.state_dict()
    assert ours.keys() == base.keys() and all(torch.equal(ours[name], base[name]) for name in base)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_linear_layer_but_the_head_is_adapted_or_named(kind: str) -> None:
    """Also experts that transformers keeps as one parameter; a shared expert is what peft mistakes for an older
    model's experts, and says so here."""
    student = adapted(kind)
    assert student.adapter is not None
    module = tiny.model(kind)
    linear = {n for n, m in module.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"}
    experts = {n for n, p in module.named_parameters() if ".experts." in n}
    without = set(student.adapter.targets.without)
    assert student.adapter.layers.keys() == (linear | experts) - without
    assert without == {name for name in linear if "shared_expert." in name}
    assert bool(without) == (kind == "qwen3_next") == any("shared_expert" in note for note in adapter_notes(student))
    assert all(layer is not student.module.get_output_embeddings() for layer in student.adapter.layers.values())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_adapter_off_is_the_freshly_loaded_base_bit_for_bit(kind: str) -> None:
    """Through hidden states, the module's call and its generate; and the adapter is back afterwards."""
    plain, student = rooms.causal(kind), adapted(kind)
    view, before = adapter_off_view(student), logprobs(student.module)
    with torch.no_grad():
        assert torch.equal(view.hidden(*batch()), plain.hidden(*batch()))
    assert torch.equal(logprobs(view.module), logprobs(plain.module))
    ids = batch()[0][:1]
    written = [
        m.module.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True) for m in (view, plain, student)
    ]
    assert torch.equal(written[0], written[1]) and not torch.equal(before, logprobs(plain.module))
    assert torch.equal(logprobs(student.module), before)
    assert view.fingerprint() == base_fingerprint(student) == plain.fingerprint() != student.fingerprint()
    assert view.parameter_count == plain.parameter_count and view.head.weight_VD is student.head.weight_VD


def test_adapter_off_ends_with_an_exception_and_may_be_nested() -> None:
    student = adapted()
    view, before, base = adapter_off_view(student), logprobs(student.module), logprobs(rooms.causal().module)
    trained = [p.requires_grad for p in student.module.parameters()]
    with pytest.raises(IndexError):
        view.hidden(torch.tensor([[10**6]]), torch.ones(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="input_ids"):
        view.module()
    assert student.adapter is not None
    with student.adapter.off():
        assert torch.equal(logprobs(view.module), base)
        assert torch.equal(logprobs(student.module), base), "the inner block must not turn the outer one's adapter on"
    assert torch.equal(logprobs(student.module), before)
    assert [p.requires_grad for p in student.module.parameters()] == trained


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_the_engine_writes_as_the_base_while_the_student_writes_as_itself(path) -> None:
    """Both engines over one module, turn by turn, with new weights in between."""
    student, plain = adapted(), rooms.causal()
    params, asked = SamplingParams(max_tokens=8), rooms.prompts(rooms.prompt_format())
    engines = [EmbeddedEngine(m, seed=0, slots=3, path=path) for m in (adapter_off_view(student), student, plain)]
    for seed in (3, 4):
        view, itself, base = ([r.behaviour_logprobs for r in e.generate(asked, params, tag="t")] for e in engines)
        assert all((a == b).all() for a, b in zip(view, base, strict=True))
        assert not all(a.shape == b.shape and (a == b).all() for a, b in zip(itself, base, strict=True))
        move(student, seed)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_target_is_reached_by_a_backward_pass_and_nothing_else_is(kind: str) -> None:
    student = adapted(kind, moved=False)
    assert len(untrained_targets(student)) == len(student.adapter.layers)  # type: ignore[union-attr]
    student.hidden(*batch()).square().mean().backward()
    assert untrained_targets(student) == []
    outside = [n for n, p in student.module.named_parameters() if p.grad is not None and ".lora_" not in n]
    assert outside == []


def test_a_layer_and_experts_that_no_token_reached_are_named() -> None:
    student = adapted("qwen3_moe", moved=False)
    student.hidden(*(x[:1, :1] for x in batch())).square().mean().backward()  # one token: two of four experts
    names = {name for name in student.adapter.layers if ".experts." in name}  # type: ignore[union-attr]
    idle = idle_experts(student)
    assert idle.keys() == names and all(len(experts) == 2 for experts in idle.values())
    alone = {name for name in student.adapter.layers if name.endswith(("q_proj", "k_proj"))}  # type: ignore[union-attr]
    assert set(untrained_targets(student)) == alone, "a token that looks at itself alone moves no attention score"
    cut = adapted()
    hidden = cut.hidden(*batch())
    cut.module.model.layers[1].mlp.up_proj.lora_B["default"].weight.requires_grad_(False)
    hidden.square().mean().backward()
    assert untrained_targets(cut) == ["model.layers.1.mlp.up_proj"]
    assert untrained_targets(rooms.causal()) == [] and idle_experts(rooms.causal()) == {}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "qwen3_moe"])
def test_the_gradient_of_a_and_b_is_the_chain_rule_on_the_full_gradient(kind: str) -> None:
    """W = W0 + s B A gives dA = s B' dW and dB = s dW A'; dW from a whole model with the merged weights. Full rank."""
    student, rank = adapted(kind, rank=32), 32
    plain = rooms.causal(kind)
    assert student.adapter is not None
    with torch.no_grad():
        for name, tensor in plain.module.state_dict().items():
            added = student.adapter.added_to(name)
            tensor += 0 if added is None else added
    for model in (student, plain):
        model.hidden(*batch()).square().mean().backward()
    full = dict(plain.module.named_parameters())
    for name, layer in student.adapter.layers.items():
        a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        if name in student.adapter.targets.experts:
            gradient, count = full[name].grad, len(full[name])
            pairs = zip(a.unflatten(0, (count, rank)), b.unflatten(1, (rank, count)).unbind(2), gradient, strict=True)
            given = zip(a.grad.unflatten(0, (count, rank)), b.grad.unflatten(1, (rank, count)).unbind(2), strict=True)
        else:
            gradient = full[f"{name}.weight"].grad
            pairs, given = [(a, b, gradient.T if kind == "gpt2" else gradient)], [(a.grad, b.grad)]
        for (a_, b_, dw), (da, db) in zip(pairs, given, strict=True):
            torch.testing.assert_close(da, scale * b_.T @ dw, rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(db, scale * dw @ a_.T, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "gpt2", "qwen3_moe", "qwen3_next"])
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        student = adapted(kind)
        if checkpointing:
            student.module.activation_checkpointing_enable()
        student.hidden(*batch(32)).square().mean().backward()
        gradients.append(rooms.gradient(student))
    assert rooms.distance(*gradients) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_frozen_base_is_stored_in_the_compute_type(tmp_path: Path, dtype) -> None:
    spec = Student(model=tiny.save(tmp_path / "m"), dtype=dtype, device="cpu", lora=Lora(rank=2))
    student = load_student(spec, 300)
    kinds = {(".lora_" in name, p.dtype) for name, p in student.module.named_parameters()}
    assert kinds == {(True, torch.float32), (False, getattr(torch, dtype))}
    assert student.hidden(*batch()).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_base_in_bfloat16_has_float32_matrices_beside_it(kind: str) -> None:
    student = adapted(kind, dtype=torch.bfloat16)
    kinds = {(".lora_" in name, p.dtype) for name, p in student.module.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    products = set()
    q_proj = student.module.model.layers[0].self_attn.q_proj
    q_proj.lora_A["default"].register_forward_hook(lambda *call: products.add(call[-1].dtype))
    student.hidden(*batch()).float().square().mean().backward()
    assert products == {torch.bfloat16}, "in the compute type, as the base's own"
    assert {p.grad.dtype for p in student.module.parameters() if p.grad is not None} == {torch.float32}
    view, plain = adapter_off_view(student), rooms.causal(kind, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(view.hidden(*batch()), plain.hidden(*batch()))


def test_names_and_start_are_the_same_in_every_run() -> None:
    first, again = adapted(moved=False), adapted(moved=False)
    ours, theirs = (dict(m.module.named_parameters()) for m in (first, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    q_proj = "model.layers.0.self_attn.q_proj"
    assert {f"{q_proj}.lora_A.default.weight", f"{q_proj}.lora_B.default.weight"} <= ours.keys()
    assert first.adapter is not None
    layer = first.adapter.layers[q_proj]
    assert not layer.lora_B["default"].weight.any() and layer.lora_A["default"].weight.std() > 0.5 / math.sqrt(3 * 32)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(("q_proj",), 2), (("mlp.down_proj", "o_proj"), 4), (("model.layers.1.mlp.up_proj",), 1)],
)
def test_targets_are_the_ends_of_names(targets: tuple[str, ...], layers: int) -> None:
    student = adapted(targets=targets)
    assert student.adapter is not None and len(student.adapter.layers) == layers
    assert all(any(name.endswith(t) for t in targets) for name in student.adapter.layers)
    student.hidden(*batch()).square().mean().backward()
    assert untrained_targets(student) == []


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("qwen3", "c_attn", r"no linear layer of the model is called 'c_attn'. It has down_proj, gate_proj, k_proj"),
        ("qwen3", "proj", "no linear layer of the model is called 'proj'"),
        ("qwen3", "embed_tokens", "no linear layer"),
        ("llama", "lm_head", "'lm_head' is the output head"),
        ("qwen3_next", "shared_expert.up_proj", "these layers cannot have an adapter"),
    ],
)
def test_targets_that_name_nothing_or_the_head_are_refused(kind: str, target: str, said: str) -> None:
    model = rooms.causal(kind)
    with pytest.raises(ModelError, match=f"student.lora.targets: .*{said}"):
        add_adapter(model, Lora(targets=(target,)), base="base")
    assert model.adapter is None


def test_a_missing_peft_names_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'opd\[lora\]'"):
        add_adapter(rooms.causal(), Lora(), base="base")
