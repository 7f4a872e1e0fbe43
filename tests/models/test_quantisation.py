"""Weights in 8 and 4 bits, on the CPU as on CUDA: frozen, right in both directions, and an adapter beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.config.schema import Lora, Scorer, Student
from opd.errors import ModelError
from opd.models.adapters import adapter_off_view, base_fingerprint, untrained_targets
from opd.models.causal import CausalLM
from opd.models.loading import check_loadable, load_frozen, load_student
from opd.models.saving import save_model
from opd.rollouts.engine import EmbeddedEngine
from opd.types import SamplingParams
from tests import rooms, tiny
from tests.models.adapted import batch, logprobs, move
from tests.rollouts.reference import recomputed

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # blocks of 64, as real layers have


def quantised(folder: Path, bits, kind: str = "qwen3", **model) -> CausalLM:
    torch.manual_seed(0)
    source = tiny.save(folder / "base", kind, **model)
    return load_student(Student(model=source, device="cpu", lora=Lora(rank=4), quantisation=bits), 300)


def dequantised(folder: Path, student: CausalLM) -> CausalLM:
    """The base again, with the numbers that the few bits stand for."""
    plain = CausalLM(
        AutoModelForCausalLM.from_pretrained(folder / "base").eval(),
        vocab_size=300, compute_dtype=torch.float32, name="plain",
    )  # fmt: skip
    layers = {n.replace(".base_layer", ""): layer for n, layer in student.module.named_modules()}
    with torch.no_grad():
        for name, layer in plain.module.named_modules():
            packed = layers.get(name)
            if isinstance(packed, bitsandbytes.nn.Linear4bit):
                whole = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
            elif isinstance(packed, bitsandbytes.nn.Linear8bitLt):
                whole = packed.weight.data.float() * packed.state.SCB[:, None] / 127
            else:
                continue
            layer.weight.copy_(
                whole if whole.shape == layer.weight.shape and type(layer) is torch.nn.Linear else whole.T
            )
    return plain


@pytest.mark.parametrize("kind, model", [("qwen3", WIDE), ("gpt2", {}), ("qwen3", {})], ids=["wide", "gpt2", "narrow"])
def test_four_bits_compute_what_they_stand_for_forwards_and_backwards(tmp_path: Path, kind: str, model: dict) -> None:
    """On a CPU with AVX512-BF16 bitsandbytes would repack the weights in the first forward pass: gradients would be
    98 % off without a word, and reading the state would break the model."""
    student = quantised(tmp_path, "int4", kind, **model)
    plain = dequantised(tmp_path, student)
    move(student)
    view = adapter_off_view(student)
    for _ in range(2):
        assert torch.equal(logprobs(view.module), logprobs(plain.module))
        mark = base_fingerprint(student)  # reads the state
    assert student.fingerprint() != mark == view.fingerprint()
    embedded = plain.module.get_input_embeddings()(batch()[0]).detach()
    gradients = []
    for model_ in (view, plain):
        given = embedded.clone().requires_grad_(True)
        model_.module(inputs_embeds=given).logits.square().mean().backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_eight_bits_are_near_what_they_stand_for(tmp_path: Path) -> None:
    """Activations are quantised as well, so that near is all there is."""
    student = quantised(tmp_path, "int8")
    plain = dequantised(tmp_path, student)
    assert 0 < (logprobs(student.module) - logprobs(plain.module)).abs().max() < 0.05


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_a_quantised_student_trains_its_adapter_alone_and_writes_by_its_own_forward(tmp_path: Path, bits) -> None:
    student = quantised(tmp_path, bits)
    fmt = rooms.prompt_format()
    before = {n: t.clone() for n, t in student.module.state_dict().items() if ".lora_" not in n}
    engine = EmbeddedEngine(student, seed=0, slots=4, path="auto")
    assert engine.path == "generic"
    with pytest.raises(ModelError, match=r"q_proj of layer 0 is a bitsandbytes\..*quantised"):
        EmbeddedEngine(student, seed=0, slots=4, path="lean")
    params, asked = SamplingParams(max_tokens=6), rooms.prompts(fmt)
    made = engine.generate(asked, params, tag="t")
    learner = rooms.learner(student, optim={"lr": 0.05})
    teacher = rooms.teacher(adapter_off_view(student), fmt)
    zero = learner.update(made, teacher.evidence(made))
    assert zero.metrics["grad_norm"] < 1e-6, "the student is its base as long as B is zero"
    learner.update(made, rooms.teacher(rooms.causal(seed=7), fmt).evidence(made))
    after = {n: t for n, t in student.module.state_dict().items() if ".lora_" not in n}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    engine.load(learner.weights())
    for rollout in engine.generate(asked, params, tag="t"):
        exact = recomputed(student, rollout, params)
        np.testing.assert_allclose(rollout.behaviour_logprobs, exact, atol=1e-4)
    student.hidden(*batch()).square().mean().backward()
    assert untrained_targets(student) == []


def test_W_02_the_adapter_of_a_quantised_student_is_saved_alone(tmp_path: Path) -> None:
    student = quantised(tmp_path, "int4")
    move(student)
    options = {"dtype": torch.float32, "end_ids": (2,)}
    save_model(student, tiny.tokenizer(), tmp_path / "final", form="adapter", **options)
    beside = peft.PeftModel.from_pretrained(dequantised(tmp_path, student).module, str(tmp_path / "final"))
    torch.testing.assert_close(logprobs(beside), logprobs(student.module), atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="is quantised"):
        save_model(student, tiny.tokenizer(), tmp_path / "merged", form="merged", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "final"]


def test_a_packed_weight_counts_what_it_stands_for(tmp_path: Path) -> None:
    student = quantised(tmp_path, "int4")
    assert student.parameter_count - student.trainable_count == rooms.causal().parameter_count


def test_a_teacher_in_four_bits_scores_on_the_cpu(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m")
    teacher = load_frozen(Scorer(model=source, quantisation="int4", device="cpu"), 300, role="teacher")
    assert not any(p.requires_grad for p in teacher.module.parameters())
    gap = (logprobs(teacher.module) - logprobs(AutoModelForCausalLM.from_pretrained(source))).abs().mean()
    assert 0 < gap < 0.2


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_experts_that_bitsandbytes_does_not_reach_are_told(tmp_path: Path, bits) -> None:
    source = tiny.save(tmp_path / "m", "qwen3_moe")
    module = AutoModelForCausalLM.from_pretrained(source)
    reached = sum(p.numel() for n, p in module.named_parameters() if "_proj" in n and ".experts." not in n)
    share = f"{reached / sum(p.numel() for p in module.parameters()):.0%}"
    with pytest.warns(RuntimeWarning, match=rf"teacher\.quantisation: {bits} reaches {share} of the numbers"):
        load_frozen(Scorer(model=source, quantisation=bits, device="cpu"), 300, role="teacher")


@pytest.mark.parametrize("spec", [Scorer, Student])
def test_quantisation_names_its_extra(tmp_path: Path, monkeypatch, spec) -> None:
    source = tiny.save(tmp_path / "m")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"pip install 'opd\[quantisation\]'"):
        check_loadable(spec(model=source, quantisation="int4"), "model")
