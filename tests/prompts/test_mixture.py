"""Batches as a pure function of settings and step: shares, epochs, resuming, and what is left out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.errors import DataError
from opd.prompts.mixture import PromptStream, epoch_order, integer_shares, interleave
from opd.types import Prompt, Row

fuzz = settings(max_examples=60, deadline=None)
WEIGHTS = st.lists(st.one_of(st.integers(1, 50), st.floats(0.1, 10).map(lambda x: round(x, 1))), min_size=1, max_size=6)


def rows(name: str, size: int, completion: str | None = "yes") -> list[Row]:
    return [Row(id=f"{name}/{n}", domain=name, prompt="x" * (n + 1), completion=completion) for n in range(size)]


def render(row: Row) -> Prompt:
    answer = None if row.completion is None else np.array([7, 2])
    return Prompt(row=row, ids=np.arange(len(row.prompt)), completion_ids=answer)


def stream(sources, **changes) -> PromptStream:
    options = {"per_step": 4, "max_prompt_tokens": 1000, "shuffle": True, "seed": 0, "need_completion": False}
    return PromptStream(sources, render, **{**options, **changes})


def drawn(made: PromptStream, steps: int) -> list[str]:
    return [prompt.id.partition("#")[0] for step in range(steps) for prompt in made.batch(step)]


# ---- shares ---------------------------------------------------------------------------------------------------------


@fuzz
@given(weights=WEIGHTS, per_step=st.integers(1, 9))
def test_every_prefix_has_its_shares_to_within_one_prompt(weights, per_step):
    made = stream([(rows(f"s{n}", 3), weight) for n, weight in enumerate(weights)], per_step=per_step)
    ids = drawn(made, 300 // per_step)
    of_source = np.array([int(id.split("/")[0][1:]) for id in ids])
    for n, weight in enumerate(weights):
        had = np.cumsum(of_source == n)
        due = np.arange(1, len(ids) + 1) * weight / sum(weights)
        assert np.abs(had - due).max() < 1 + 1e-6


@fuzz
@given(weights=WEIGHTS)
def test_a_window_is_within_two_prompts_and_a_period_is_exact(weights):
    shares = integer_shares(weights)
    pattern, before = interleave(shares)
    assert np.bincount(pattern, minlength=len(shares)).tolist() == shares
    for n, share in enumerate(shares):
        drift = np.cumsum(np.tile(pattern == n, 2)) - np.arange(1, 2 * len(pattern) + 1) * share / len(pattern)
        assert drift.max() - drift.min() < 2
        assert before[pattern == n].tolist() == list(range(share))


def test_integer_shares():
    assert integer_shares([1.0, 1.0]) == [1, 1]
    assert integer_shares([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert integer_shares([1e-3, 2.5]) == [1, 2500]
    assert integer_shares([5.0]) == [1]
    third = integer_shares([1 / 3, 2 / 3])
    assert sum(third) <= 100_000 and abs(third[0] / sum(third) - 1 / 3) < 1e-5
    assert min(integer_shares([1e-9, 1.0, 1.0])) == 1


# ---- epochs ---------------------------------------------------------------------------------------------------------


@fuzz
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    per_step=st.integers(1, 5),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_no_row_comes_again_before_its_epoch_is_over(sizes, weights, per_step, shuffle, seed):
    sources = [(rows(f"s{n}", size), weights[n]) for n, size in enumerate(sizes)]
    ids = drawn(stream(sources, per_step=per_step, shuffle=shuffle, seed=seed), 60)
    for n, size in enumerate(sizes):
        mine = [id for id in ids if id.startswith(f"s{n}/")]
        whole = len(mine) // size * size
        for start in range(0, whole, size):
            assert len(set(mine[start : start + size])) == size
        if not shuffle:
            assert mine == [f"s{n}/{place % size}" for place in range(len(mine))]


@given(size=st.integers(1, 200), seed=st.integers(0, 2**62), epoch=st.integers(0, 10**6))
def test_an_epochs_order_is_a_permutation(size, seed, epoch):
    order = epoch_order(size, seed, "sums", epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_an_epochs_order_depends_on_everything_and_never_changes():
    base = epoch_order(50, 0, "sums", 0).tolist()
    others = [epoch_order(50, *arguments).tolist() for arguments in [(1, "sums", 0), (0, "sorts", 0), (0, "sums", 1)]]
    assert all(other != base for other in others)
    # A stored value: an order that changed between versions would break every run that is resumed.
    assert epoch_order(8, 0, "sums", 0).tolist() == [4, 3, 2, 5, 7, 6, 0, 1]


def test_A_18_every_place_of_an_epoch_sees_every_row():
    places = Counter(int(epoch_order(5, 0, "sums", epoch)[2]) for epoch in range(2000))
    assert min(places.values()) > 330 and max(places.values()) < 470  # 400 expected, standard deviation 18


# ---- resuming -------------------------------------------------------------------------------------------------------


@fuzz
@given(step=st.integers(0, 10**6), weights=st.lists(st.integers(1, 9), min_size=2, max_size=2))
def test_R_01_a_batch_depends_on_the_step_alone(step, weights):
    sources = [(rows("a", 11), weights[0]), (rows("b", 6), weights[1])]
    fresh, used = stream(sources), stream(sources)
    used.batch(0), used.batch(step + 3)
    assert [p.id for p in fresh.batch(step)] == [p.id for p in used.batch(step)]


def test_another_source_leaves_the_order_of_the_first_alone():
    alone = drawn(stream([(rows("a", 20), 1)]), 10)
    mixed = [id for id in drawn(stream([(rows("a", 20), 1), (rows("b", 3), 1)]), 20) if id.startswith("a/")]
    assert mixed == alone


def test_seeds_differ():
    first, second = (drawn(stream([(rows("a", 20), 1)], seed=seed), 5) for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second)


@fuzz
@given(size=st.integers(1, 6), per_step=st.integers(1, 20), step=st.integers(0, 50))
def test_X_12_ids_in_a_batch_are_unique(size, per_step, step):
    batch = stream([(rows("a", size), 1)], per_step=per_step).batch(step)
    assert len({prompt.id for prompt in batch}) == per_step
    assert {prompt.id.partition("#")[0] for prompt in batch} <= {f"a/{n}" for n in range(size)}


def test_a_repeated_row_differs_in_its_id_only():
    one, two, three = stream([(rows("a", 1), 1)], per_step=3).batch(0)
    assert (one.id, two.id, three.id) == ("a/0", "a/0#2", "a/0#3")
    assert two.row.prompt == one.row.prompt and two.ids is one.ids and two.domain == one.domain


# ---- what is left out -----------------------------------------------------------------------------------------------


def test_A_18_over_long_prompts_are_dropped_whole_and_counted():
    made = stream([(rows("a", 10), 1), (rows("b", 3), 1)], max_prompt_tokens=4, per_step=8)
    assert made.dropped == {"a": 6, "b": 0}
    assert len(made) == 7 and made.longest == 4
    assert sorted(prompt.id for prompt in made.prompts()) == ["a/0", "a/1", "a/2", "a/3", "b/0", "b/1", "b/2"]
    assert set(drawn(made, 4)) == {"a/0", "a/1", "a/2", "a/3", "b/0", "b/1", "b/2"}


def test_all_prompts_filtered_away():
    long = [row for row in rows("b", 9) if len(row.prompt) > 5]
    with pytest.raises(DataError, match=r"b: all 4 prompts .*max_prompt_tokens=5: they have 6 to 9 tokens"):
        stream([(rows("a", 3), 1), (long, 1)], max_prompt_tokens=5)


def test_O_20_needed_completions_must_be_there():
    mixed = [*rows("a", 2), *rows("a", 3, completion=None)[2:]]
    assert len(stream([(mixed, 1)])) == 3
    with pytest.raises(DataError, match=r"row a/2 has no completion.*columns\.completion"):
        stream([(mixed, 1)], need_completion=True)


def test_prompts_without_tokens_are_refused():
    with pytest.raises(DataError, match="row a/0: its prompt has no tokens"):
        stream([([Row(id="a/0", domain="a", prompt="")], 1)])
