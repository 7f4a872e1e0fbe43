"""Credit from the future against a sum that is written out, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.objectives.credit import BLOCK, future_credit


def by_hand(f, trained, lengths, discount, length_norm):
    """G_t - h_t, from the definition."""
    future, start = [0.0] * len(f), 0
    for length in lengths:
        for t in range(start, start + length):
            if not trained[t]:
                continue
            later = [k for k in range(t + 1, start + length) if trained[k]]
            total = sum(discount ** (k - t) * -f[k] for k in later)
            future[t] = total / len(later) if length_norm and later else total
        start += length
    return future


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    discount=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    length_norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_sum_over_later_trained_tokens_of_the_same_answer(lengths, discount, length_norm, seed) -> None:
    rng = np.random.default_rng(seed)
    f, trained = rng.normal(size=sum(lengths)), rng.random(sum(lengths)) < 0.7
    got = future_credit(
        torch.from_numpy(f), torch.from_numpy(trained), lengths, discount=discount, length_norm=length_norm
    )
    assert got.tolist() == pytest.approx(by_hand(f, trained, lengths, discount, length_norm), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("discount", [0.5, 0.99, 1.0])
def test_long_answers_are_summed_over_the_edges_of_blocks(discount: float) -> None:
    f = torch.randn(3 * BLOCK + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trained = torch.ones(len(f), dtype=torch.bool)
    got = future_credit(f, trained, [len(f)], discount=discount, length_norm=False)
    expected, running = [], 0.0
    for value in reversed(f.tolist()):
        expected.append(running)
        running = discount * (running - value)
    assert got.tolist() == pytest.approx(expected[::-1], rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
def test_M_09_a_masked_token_gives_no_credit_and_gets_none(discount: float) -> None:
    f = torch.tensor([1.0, float("nan"), 2.0, float("inf")], dtype=torch.float64)
    trained = torch.tensor([True, False, True, False])
    got = future_credit(f, trained, [4], discount=discount, length_norm=False)
    assert got.tolist() == pytest.approx([-2.0 * discount**2, 0.0, 0.0, 0.0])
