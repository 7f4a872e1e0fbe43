"""The limit of a step, by hand and as properties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.costs.ledger import Cost, forward
from opd.costs.roofline import Limit, Part, Placed, Rates, Reading, Step, Text, Writing, limit, token_passes
from opd.costs.size import ModelSize

# A head of 10 x 4 = 40 numbers, 60 in the body; attention of width 4 in 2 layers, a token caches 6 numbers in each.
SIZE = ModelSize(
    parameters=100,
    active_parameters=100,
    layers=2,
    attention_layers=2,
    hidden=4,
    vocab=10,
    attention_width=4,
    kv_width=6,
    tables=40,
)
STUDENT = Placed(size=SIZE, dtype="float32", stored="float32")
SLOW_PRODUCTS = Rates(products={"float32": 1.0, "bfloat16": 2.0}, memory=1e9, near=1e9, near_bytes=0)
SLOW_MEMORY = Rates(products={"float32": 1e9, "bfloat16": 1e9}, memory=1.0, near=1.0, near_bytes=0)
TEXT = Text(prompts=2, answers=6, prompt_tokens=5, answer_tokens=4)  # three answers to each prompt


def step(slots: int = 3, **changes) -> Step:
    passes = token_passes(TEXT.answers, TEXT.answer_tokens, slots)
    writing = {"student": Writing(model=STUDENT, text=TEXT, passes=passes)}
    return Step(**{"student": STUDENT, "text": TEXT, "writing": writing, **changes})


def part(made: Limit, name: str) -> Part:
    return next(part for part in made.parts if part.name == name)


def test_decode_by_hand():
    """Two waves of three answers; three tokens of each go through the model, at positions 5, 6, 7."""
    pairs = 6 * (6 + 7 + 8)
    flops = 2 * 100 * 18 + 4 * 2 * 4 * pairs
    weights, cache = 4 * 100 * (2 * 3), 4 * 2 * 6 * pairs
    bound = part(limit(step(), {"cpu": SLOW_MEMORY}), "decode")
    assert (bound.flops, bound.bytes, bound.seconds) == (flops, weights + cache, weights + cache)
    assert bound.bound == "cache", "6,048 bytes of cache, 2,400 of weights"
    assert part(limit(step(slots=1), {"cpu": SLOW_MEMORY}), "decode").bound == "weights"
    bound = part(limit(step(), {"cpu": SLOW_PRODUCTS}), "decode")
    assert bound.seconds == flops and bound.bound == "products"


def test_every_other_part_by_hand():
    teacher = Placed(size=replace(SIZE, parameters=200, active_parameters=200), dtype="bfloat16", stored="bfloat16")
    reading = Reading(model=teacher, text=TEXT, whole=True)
    made = limit(step(scoring={"teacher": reading}), {"cpu": SLOW_PRODUCTS})
    read, written = 2 * 5 + 6 * 3, 6 * 4
    pairs = 2 * 15 + 6 * (6 + 7 + 8)
    attention = 4 * 2 * 4 * pairs
    assert part(made, "prefill").flops == 2 * 60 * 10 + 2 * 40 * 2 + 4 * 2 * 4 * 2 * 15
    assert part(made, "prefill").bytes == 4 * 100 + 4 * 2 * 6 * 10
    assert part(made, "scoring (teacher)").flops == 2 * 160 * read + attention
    assert part(made, "scoring (teacher)").seconds == (2 * 160 * read + attention) / 2
    assert part(made, "scoring (teacher)").bytes == 2 * 160 + 2 * written * 4
    # 2 T V (3 D_s + D_t): the student's share at the rate of float32, the teacher's at twice that
    assert part(made, "head").flops == 2 * written * 10 * (3 * 4 + 4)
    assert part(made, "head").seconds == 2 * written * 10 * (3 * 4 + 4 / 2)
    states = 4 * 2 * written * 4 + 2 * written * 4  # ours in and their gradient out, the teacher's in
    assert part(made, "head").bytes == 4 * 40 + 2 * 40 + states + 4 * 40
    assert part(made, "training").flops == 3 * (2 * 60 * read + attention)
    assert part(made, "training").bytes == 4 * 60 * 2 + 4 * 100
    assert (part(made, "optimiser").bytes, part(made, "optimiser").flops) == (28 * 100, 0)
    assert part(made, "optimiser").seconds == 28 * 100 / 1e9 and part(made, "optimiser").bound == "states"
    assert part(made, "weights back").seconds == 0, "the sampler reads the trained parameters themselves"
    assert made.seconds == pytest.approx(sum(p.seconds for p in made.parts))
    assert made.bottleneck.name == "training"
    phases = made.by_phase()
    assert phases["scoring"] == part(made, "scoring (teacher)").seconds
    assert phases["rollout"] == part(made, "prefill").seconds + part(made, "decode").seconds
    assert sum(phases.values()) == pytest.approx(made.seconds)


def test_a_scorer_of_drawn_tokens_pays_for_its_own_head():
    whole = Reading(model=STUDENT, text=TEXT, whole=True)
    drawn = replace(whole, whole=False)
    rates = {"cpu": SLOW_PRODUCTS}
    first, second = (limit(step(scoring={"teacher": reading}), rates) for reading in (whole, drawn))
    moved = 2 * 24 * 40
    name = "scoring (teacher)"
    assert part(second, name).flops - part(first, name).flops == moved
    assert part(first, "head").flops - part(second, "head").flops == moved


def test_reading_is_what_the_ledger_counts_but_for_the_head_and_the_last_token():
    """One answer to each prompt, so that nothing is shared."""
    text = Text(prompts=3, answers=3, prompt_tokens=7, answer_tokens=5)
    body = replace(SIZE, active_parameters=60)
    expected = sum((forward(body, 7 + 4) for _ in range(3)), Cost(0.0, 0))
    made = limit(step(text=text, writing={}), {"cpu": SLOW_PRODUCTS})
    assert part(made, "training").flops == 3 * expected.flops


def test_a_sampler_of_another_type_has_its_weights_cast():
    half = replace(STUDENT, dtype="bfloat16", stored="bfloat16")
    writing = {"student": Writing(model=half, text=TEXT, passes=6)}
    made = limit(step(writing=writing), {"cpu": SLOW_MEMORY})
    assert part(made, "weights back").bytes == 100 * (4 + 2)
    assert part(made, "decode").bytes == part(limit(step(), {"cpu": SLOW_MEMORY}), "decode").bytes / 2


def test_frozen_weights_have_no_gradient_and_the_head_none_either():
    made = limit(step(trainable=8), {"cpu": SLOW_PRODUCTS})
    full = limit(step(), {"cpu": SLOW_PRODUCTS})
    assert part(full, "training").flops - part(made, "training").flops == 2 * (60 - 8) * 28
    assert part(made, "head").flops == 2 * 24 * 10 * (2 * 4) and part(made, "optimiser").bytes == 28 * 8


def test_updates_looks_and_micro_batches():
    rates = {"cpu": SLOW_PRODUCTS}
    scoring = {"teacher": Reading(model=STUDENT, text=TEXT, whole=True)}
    once, twice = (limit(step(updates=n, scoring=scoring), rates) for n in (1, 2))
    for name in ("scoring (teacher)", "head", "training", "optimiser"):
        assert part(twice, name).seconds == 2 * part(once, name).seconds
    batch, whole = (limit(step(looks=looks, scoring=scoring), rates) for looks in ("batch", "step"))
    assert part(batch, "head").flops == 2 * 24 * 10 * (4 * 4 + 2 * 4)
    assert part(batch, "training").flops == part(once, "training").flops == 3 / 4 * part(whole, "training").flops
    assert part(whole, "scoring (teacher)").flops == 2 * part(once, "scoring (teacher)").flops
    three = limit(step(micro_batch=10), rates)  # 28 tokens
    assert part(three, "training").bytes == 4 * 60 * 2 * 3 + 4 * 100 * 5, "gradients are read to be added to"


def test_the_link_brings_what_is_elsewhere():
    away = Reading(model=STUDENT, text=TEXT, whole=True, arrives=1e6)
    made = limit(step(scoring={"teacher": away}), {"cpu": replace(SLOW_MEMORY, link=0.5)})
    assert part(made, "scoring (teacher)").seconds == 2e6 and part(made, "scoring (teacher)").bound == "link"


def test_weights_that_stay_near_are_read_faster_and_the_cache_is_not():
    near = replace(SLOW_MEMORY, near=4.0, near_bytes=400)
    far, close = (part(limit(step(), {"cpu": rates}), "decode").seconds for rates in (SLOW_MEMORY, near))
    assert far - close == 2400 * (1 - 1 / 4)
    assert part(limit(step(), {"cpu": replace(near, near_bytes=399)}), "decode").seconds == far


def test_experts_are_read_as_rows_choose_them():
    """A quarter of the experts for each token: 4 x 24 weights in 2 layers, of which a token is multiplied with 48."""
    size = replace(SIZE, mlp_width=2, parameters=100 + 3 * 48, active_parameters=100)
    model = replace(STUDENT, size=size)
    assert model.read_bytes(1) == 400
    assert model.read_bytes(2) == pytest.approx(400 + 4 * 144 / 4)
    assert model.weight_bytes == 4 * 244


def test_quantised_weights_are_small_but_for_the_head():
    model = replace(STUDENT, dtype="bfloat16", stored="int8")
    assert model.weight_bytes == 60 + 2 * 40


def test_token_passes():
    assert token_passes(6, 4, 3) == 2 * 3 and token_passes(7, 4, 3) == 3 * 3 and token_passes(7, 1, 3) == 0
    assert token_passes(8, 3, 4, longest=20) == 19, "the longest answer alone takes so many"
    assert token_passes(80, 3, 4, longest=20) == 80 * 2 / 4


counts = st.integers(1, 300)


@given(slots=counts, more=counts, answers=counts, tokens=counts, experts=st.integers(0, 500), near=st.integers(0, 3000))
def test_more_slots_never_raise_the_limit(slots, more, answers, tokens, experts, near):
    size = replace(SIZE, mlp_width=2, parameters=100 + experts)
    model = replace(STUDENT, size=size)
    text = Text(prompts=1, answers=answers, prompt_tokens=9, answer_tokens=tokens)
    rates = Rates(products={"float32": 50.0}, memory=30.0, near=90.0, near_bytes=near)
    for longest in (None, tokens + 3):
        seconds = []
        for n in (slots, slots + more):
            passes = token_passes(answers, tokens, n, longest)
            writing = {"student": Writing(model=model, text=text, passes=passes)}
            seconds.append(limit(Step(student=model, text=text, writing=writing), {"cpu": rates}).seconds)
        assert seconds[1] <= seconds[0] * (1 + 1e-12)


@given(faster=st.floats(1, 10), which=st.sampled_from(["products", "memory"]))
def test_a_faster_machine_never_raises_the_limit(faster, which):
    rates = Rates(products={"float32": 50.0}, memory=30.0, near=30.0, near_bytes=0)
    quick = (
        replace(rates, products={"float32": 50 * faster}) if which == "products" else replace(rates, memory=30 * faster)
    )
    assert limit(step(), {"cpu": quick}).seconds <= limit(step(), {"cpu": rates}).seconds


def test_a_step_without_a_writer_or_answers_has_finite_parts():
    empty = Text(prompts=0, answers=0, prompt_tokens=0, answer_tokens=0)
    made = limit(Step(student=STUDENT, text=empty), {"cpu": SLOW_MEMORY})
    assert all(math.isfinite(p.seconds) for p in made.parts)
