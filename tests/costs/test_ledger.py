from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from opd.costs.ledger import Cost, Ledger, forward, prefill_cost, sampling_cost, scoring_cost, training_cost
from opd.costs.size import ModelSize, model_size
from tests import tiny
from tests.journal.parts import rollouts
from tests.models.adapted import adapted

# Thinking Machines, "On-Policy Distillation": Qwen3-8B student, Qwen3-32B teacher, prefill and attention not counted.
STUDENT = ModelSize(parameters=8_190_000_000, active_parameters=8_190_000_000)
TEACHER = ModelSize(parameters=32_800_000_000, active_parameters=32_800_000_000)
TOKENS = 150 * 512 * 4 * 4096


def test_thinking_machines_flops_of_student_and_teacher():
    sampling = forward(STUDENT, TOKENS)
    student = sampling + Cost(3 * sampling.flops, TOKENS)
    assert student.flops == pytest.approx(8.24e19, rel=1e-3)
    assert forward(TEACHER, TOKENS).flops == pytest.approx(8.25e19, rel=1e-3)


def test_thinking_machines_ratios_are_choices_of_what_is_billed():
    """9x: the data set is sunk. 30x: its generation is billed. 18x: the teacher's scoring is free."""
    sft, opd = Ledger(), Ledger()
    sft.add("student_training", 1.5e21, 0)
    sft.add("data_generation", 3.4e21, 0)
    opd.add("student", 8.2e19, TOKENS)
    opd.add("teacher_scoring", 8.4e19, TOKENS)
    sunk = sft.total(without=["data_generation"]).flops
    assert sunk / opd.total().flops == pytest.approx(9.04, abs=0.005)
    assert sft.total().flops / opd.total().flops == pytest.approx(29.5, abs=0.05)
    assert sunk / opd.total(without=["teacher_scoring"]).flops == pytest.approx(18.3, abs=0.05)


def test_total_refuses_a_part_that_was_never_added():
    with pytest.raises(KeyError, match="teacher_scoring"):
        Ledger().total(without=["teacher_scoring"])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_a_pass_in_pieces_costs_what_it_costs_at_once(first, a, b):
    size = ModelSize(parameters=7, active_parameters=5, attention_layers=3, attention_width=11)
    assert forward(size, a, first) + forward(size, b, first + a) == forward(size, a + b, first)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma3"])
def test_counted_operations_are_those_pytorch_counts(kind):
    model = tiny.model(kind, attn_implementation="eager")
    tokens = 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randint(4, 290, (1, tokens)), use_cache=False)
    size = model_size(model.config.to_dict(), sum(p.numel() for p in model.parameters()))
    ours = forward(size, tokens).flops
    # PyTorch computes the half of the attention that causality throws away, and counts it.
    wasted = 4 * size.attention_layers * size.attention_width * (tokens * tokens - tokens * (tokens + 1) // 2)
    # A norm's weights are in N, though a token is multiplied with them element by element.
    norms = 2 * tokens * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert counter.get_total_flops() == ours + wasted - norms


def test_prompts_are_prefilled_once_and_read_by_the_teacher_every_time():
    size = ModelSize(parameters=10, active_parameters=10, attention_layers=1, attention_width=2)
    made = rollouts(prompts=3, samples=4, tokens=5, prompt_tokens=7)
    assert prefill_cost(made, size).tokens == 3 * 7
    assert sampling_cost(made, size).tokens == 12 * 5
    assert scoring_cost(made, size).tokens == 12 * 12
    # with one sample each, prefill and sampling together are one reading
    one = rollouts(prompts=3, samples=1, tokens=5, prompt_tokens=7)
    assert prefill_cost(one, size) + sampling_cost(one, size) == scoring_cost(one, size)
    assert training_cost(made, size) == Cost(3 * scoring_cost(made, size).flops, 12 * 12)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_frozen_weights_get_no_gradient_and_cost_none(kind):
    """What PyTorch counts of a step that trains an adapter: a third less than one that trains everything, nearly."""
    student = adapted(kind, rank=2)
    model = student.module
    model.set_attn_implementation("eager")
    made = rollouts(prompts=1, samples=1, tokens=60, prompt_tokens=4)
    ids = torch.randint(4, 290, (1, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    size = model_size(model.config.to_dict(), student.parameter_count)
    ours = training_cost(made, size, student.trainable_count)
    full = training_cost(made, size)
    assert ours.tokens == full.tokens == 64 and 0.65 * full.flops < ours.flops < 0.75 * full.flops
    # PyTorch computes all of the attention, three times; nothing below the lowest adapter gets a gradient.
    wasted = 3 * 4 * size.attention_layers * size.attention_width * (64 * 64 - 64 * 65 // 2)
    assert counter.get_total_flops() == pytest.approx(ours.flops + wasted, rel=0.04)
    assert training_cost(made, size, size.active_parameters) == full


def test_parts_add_up_and_come_out_flat():
    ledger = Ledger()
    ledger.add("student_sampling", 10.0, 3)
    ledger.add_cost("student_sampling", Cost(5.0, 1))
    ledger.add("teacher_scoring", 1.0, 4)
    with ledger.seconds("sampling"):
        pass
    metrics = ledger.metrics()
    assert metrics["flops_student_sampling"] == 15.0 and metrics["tokens_student_sampling"] == 4
    assert ledger.total() == Cost(16.0, 8) and "seconds_sampling" in metrics


def test_nested_phases_are_not_counted_twice(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    ledger = Ledger()
    for _ in range(2):
        with ledger.seconds("training"):
            clock[0] += 3
            with pytest.raises(RuntimeError), ledger.seconds("scoring"):
                clock[0] += 5
                raise RuntimeError
            clock[0] += 1
    assert ledger.seconds_by_phase == {"training": 8.0, "scoring": 10.0}
    assert sum(ledger.seconds_by_phase.values()) == ledger.elapsed == 18.0
