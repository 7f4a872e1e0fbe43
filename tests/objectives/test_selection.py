"""The largest share of a step's tokens, whatever the order in which its answers come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.config.slots import Selection
from opd.objectives.selection import TokenLook, ranks, select


def step(seed: int, values: int):
    """Five answers; few different values make ties."""
    rng = np.random.default_rng(seed)
    masks, looks = {}, {}
    for key in "abcde":
        n = int(rng.integers(0, 6))
        masks[key] = rng.random(n) < 0.8
        drawn = rng.integers(0, values, size=(2, n)).astype(np.float32)
        looks[key] = TokenLook(np.where(masks[key], drawn[0], np.nan), {"t": np.where(masks[key], drawn[1], np.nan)})
    return masks, looks


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    values=st.sampled_from([2, 5, 1000]),
    by=st.sampled_from(["entropy", "divergence", "either"]),
    share=st.sampled_from([0.2, 0.5, 0.9]),
)
def test_it_takes_the_largest_and_does_not_depend_on_the_order_of_answers(seed, values, by, share) -> None:
    masks, looks = step(seed, values)
    chosen = select(Selection(by=by, share=share), masks, looks, "t")
    pairs = [(key, t) for key in sorted(masks) for t in np.flatnonzero(masks[key])]
    assert sum(int(c.sum()) for c in chosen.values()) == int(np.ceil(share * len(pairs)))
    entropy = [looks[key].entropy_T[t] for key, t in pairs]
    divergence = [looks[key].divergence["t"][t] for key, t in pairs]

    def rank(values: list, n: int) -> float:
        below, equal = sum(v < values[n] for v in values), sum(v == values[n] for v in values)
        return (below + (equal - 1) / 2) / (len(values) - 1) if len(values) > 1 else 1.0

    score = {"entropy": entropy, "divergence": divergence}.get(by)
    if score is None:
        score = [1 - (1 - rank(entropy, n)) * (1 - rank(divergence, n)) for n in range(len(pairs))]
    best = sorted(range(len(pairs)), key=lambda n: (-score[n], pairs[n]))[: int(np.ceil(share * len(pairs)))]
    assert {(key, int(t)) for key, c in chosen.items() for t in np.flatnonzero(c)} == {
        (pairs[n][0], int(pairs[n][1])) for n in best
    }
    turned = {key: masks[key] for key in "cebda"}
    again = select(Selection(by=by, share=share), turned, looks, "t")
    assert all(np.array_equal(chosen[key], again[key]) for key in masks)


def test_ranks_go_from_nought_to_one_and_ties_share() -> None:
    assert ranks(np.array([3.0, 1.0, 1.0, 7.0])).tolist() == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1.0])


def test_answers_without_a_token_to_choose_need_no_look() -> None:
    masks = {"a": np.array([True, True]), "b": np.array([False, False])}
    looks = {"a": TokenLook(np.array([1.0, 2.0]), {"t": np.array([1.0, 2.0])}), "b": TokenLook(np.array([3.0, 3.0]))}
    chosen = select(Selection(by="divergence", share=0.5), masks, looks, "t")
    assert chosen["a"].tolist() == [False, True] and chosen["b"].tolist() == [False, False]


@pytest.mark.parametrize("by", ["entropy", "divergence", "either"])
@pytest.mark.parametrize("noise", [1e-7, -1e-7])
def test_M_05_rounding_does_not_choose_between_answers_that_begin_alike(by, noise: float) -> None:
    """The first tokens of answers to one prompt have one score; batching changes its last digits."""
    score = np.array([1.2345678, 0.5], dtype=np.float32)
    masks = {key: np.array([True, True]) for key in "abc"}
    looks = {key: TokenLook(score * np.float32(1 + n * noise), {"t": score}) for n, key in enumerate("abc")}
    looks = {key: TokenLook(look.entropy_T, {"t": look.entropy_T}) for key, look in looks.items()}
    chosen = select(Selection(by=by, share=0.3), masks, looks, "t")
    assert [chosen[key].tolist() for key in "abc"] == [[True, False], [True, False], [False, False]]
