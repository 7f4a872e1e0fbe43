"""Shares of tokens in a term's mean."""

from __future__ import annotations

import numpy as np
import pytest

from opd.objectives.reduction import token_shares

MASKS = {"a": np.array([1, 1, 0], bool), "b": np.array([1], bool), "c": np.array([0, 0], bool)}


def test_denominators_count_trained_tokens_and_answers_that_have_some() -> None:
    assert token_shares("token_mean", MASKS, None) == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 0})
    assert token_shares("sequence_mean", MASKS, None) == pytest.approx({"a": 1 / 4, "b": 1 / 2, "c": 0})
    assert token_shares("constant", MASKS, 10) == pytest.approx({"a": 1 / 20, "b": 1 / 20, "c": 0})


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_M_12_every_reduction_is_a_mean_and_forgets_how_often_the_batch_stands_there(reduction: str) -> None:
    twice = MASKS | {key + "'": mask for key, mask in MASKS.items()}
    once = token_shares(reduction, MASKS, 10)
    again = token_shares(reduction, twice, 10)
    assert all(2 * again[key] == pytest.approx(once[key]) for key in MASKS)


def test_nothing_to_train_divides_by_nothing() -> None:
    none = {"a": np.zeros(3, bool)}
    assert [token_shares(r, none, 5) for r in ("token_mean", "sequence_mean", "constant")] == [{"a": 0.0}] * 3
