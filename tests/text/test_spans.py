"""The runs that two tokenizations have in common, against the definition."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.text.spans import joined


def tokens(lengths: list[int], start: int = 0):
    end = start + np.cumsum(np.array(lengths, dtype=np.int64))
    return end - np.array(lengths, dtype=np.int64), end


def spans(lengths_T, lengths_U, bad_T=(), bad_U=()):
    length = sum(lengths_T)
    bad = [np.isin(np.arange(len(x)), list(y)) for x, y in ((lengths_T, bad_T), (lengths_U, bad_U))]
    span_T, span_U = joined(*tokens(lengths_T), bad[0], *tokens(lengths_U), bad[1], length)
    assert span_T.dtype == span_U.dtype == np.int64
    return span_T.tolist(), span_U.tolist()


def test_least_runs_with_the_same_ends():
    assert spans([2, 3, 1], [2, 3, 1]) == ([0, 1, 2], [0, 1, 2])
    assert spans([2, 3, 1], [1, 1, 4]) == ([0, 1, 1], [0, 0, 1])
    assert spans([5], [1] * 5) == ([0], [0] * 5)
    assert spans([2, 2, 2], [3, 3]) == ([0] * 3, [0] * 2)
    assert spans([], []) == ([], [])
    assert spans([3], []) == ([-1], [])


def test_a_run_with_a_bad_token_is_nobodys_and_the_others_keep_their_order():
    assert spans([1, 2, 1], [1, 1, 1, 1], bad_U=[1]) == ([0, -1, 1], [0, -1, -1, 1])
    assert spans([1, 1, 1, 1], [1, 2, 1], bad_T=[2]) == ([0, -1, -1, 1], [0, -1, 1])


def test_tokens_without_bytes_go_with_the_next_one_that_has_some():
    assert spans([0, 2, 0, 0, 1, 0], [2, 1]) == ([0, 0, 1, 1, 1, 1], [0, 1])
    assert spans([2, 1], [0, 2, 0, 1, 0]) == ([0, 1], [0, 0, 1, 1, 1])
    assert spans([0, 0], [0]) == ([0, 0], [0])


@settings(max_examples=200, deadline=None)
@given(data=st.data(), length=st.integers(0, 12))
def test_any_two_tokenizations_against_the_definition(data, length):
    def cut():
        ends = [*sorted(data.draw(st.lists(st.integers(0, length), max_size=8))), length]
        return [b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    T, U = cut(), cut()
    bad_T = data.draw(st.sets(st.integers(0, len(T) - 1), max_size=2))
    (start_T, end_T), (start_U, end_U) = tokens(T), tokens(U)
    span_T, span_U = spans(T, U, bad_T)
    meet = sorted({0, *end_T.tolist()} & {0, *end_U.tolist()})
    runs = list(pairwise(meet)) or [(0, 0)]

    def run_of(start):
        return next((n for n, (a, b) in enumerate(runs) if a <= start < b), len(runs) - 1)

    run_T, run_U = [run_of(s) for s in start_T], [run_of(s) for s in start_U]
    bad = {run_T[n] for n in bad_T}
    kept = [n for n in range(len(runs)) if n in run_T and n in run_U and n not in bad]
    assert span_T == [kept.index(n) if n in kept else -1 for n in run_T]
    assert span_U == [kept.index(n) if n in kept else -1 for n in run_U]
