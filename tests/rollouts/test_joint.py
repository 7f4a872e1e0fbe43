"""What comes out when two models draw a token together, against the procedure itself, enumerated in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.rollouts import joint, sampling
from opd.types import SamplingParams
from tests.rollouts.reference import distribution

V = 12
logits = st.lists(st.floats(-8, 8, width=32), min_size=V, max_size=V).map(lambda x: np.array(x, dtype=np.float32))
params = st.builds(
    SamplingParams,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.5, 1.0, 1.6]),
    top_p=st.sampled_from([1.0, 0.7]),
    top_k=st.sampled_from([0, 3]),
)


def _row(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values)[None]


@settings(max_examples=60, deadline=None)
@given(logits, logits, st.floats(0.01, 0.99), params)
def test_a_mixture_is_the_sum_of_both_shares(student_V, teacher_V, alpha, asked):
    exact_V = np.zeros(V)
    for who, share in ((teacher_V, alpha), (student_V, 1 - alpha)):
        drawn_V = _distinct(who, asked)
        exact_V = exact_V + share * drawn_V
    made_V = joint.mixed(_row(student_V), _row(teacher_V), asked, alpha=alpha)[0].numpy()
    np.testing.assert_allclose(made_V, exact_V, atol=3e-6)


@settings(max_examples=100, deadline=None)
@given(logits, logits, st.integers(1, V + 2), st.sampled_from([0.3, 1.0, 2.0]), params)
def test_proposing_and_checking_is_enumerated(student_V, teacher_V, k, temperature, asked):
    """Every proposal u with its probability; it stays, or the teacher draws every v with its own."""
    p_V, q_V = _distinct(student_V, asked), _distinct(teacher_V, replace(asked, temperature=temperature))
    kept = set(sorted(range(V), key=lambda v: (-teacher_V[v], v))[:k])
    exact_V = np.zeros(V)
    for u in range(V):
        if u in kept:
            exact_V[u] += p_V[u]
        else:
            for v in range(V):
                exact_V[v] += p_V[u] * q_V[v]
    made_V = joint.verified(_row(student_V), _row(teacher_V), asked, top_k=k, temperature=temperature)[0].numpy()
    assert made_V.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(made_V, exact_V, atol=3e-6)


def _distinct(values_V: np.ndarray, asked: SamplingParams) -> np.ndarray:
    """The engine's own law, which has tests of its own: ties at a cut are decided there in float32."""
    return sampling.distribution(_row(values_V), asked)[0].double().numpy()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (0.9, 4)])
def test_T_07_the_law_of_one_model_is_the_one_that_is_drawn_from(temperature, top_p, top_k):
    asked = SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    logits_NV = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (20, 50)).astype(np.float32))
    made_NV = sampling.distribution(logits_NV, asked)
    for made_V, logits_V in zip(made_NV, logits_NV, strict=True):
        np.testing.assert_allclose(made_V.numpy(), distribution(logits_V.numpy(), asked), atol=1e-6)
    token_N, logprob_N = sampling.draw(logits_NV, torch.full((20,), 0.4, dtype=torch.float64), asked)
    assert torch.allclose(made_NV.gather(1, token_N[:, None])[:, 0].log(), logprob_N, atol=1e-5)


def test_a_student_that_proposes_only_the_top_is_never_refused():
    """1 - p(top k) would be rounding noise here, some 1e-8, and tokens nobody drew could come out."""
    student_V, teacher_V = np.full(V, -30.0, dtype=np.float32), np.zeros(V, dtype=np.float32)
    student_V[:3], teacher_V[:3] = [0.1, 0.2, 0.3], 5.0
    asked = SamplingParams(max_tokens=1)
    made_V = joint.verified(_row(student_V), _row(teacher_V), asked, top_k=3, temperature=1.0)[0].double()
    refused = 9 * math.exp(-30) / sum(math.exp(x) for x in student_V.astype(float))
    share = 1 / (9 + 3 * math.exp(5))  # of one token of the teacher's tail
    np.testing.assert_allclose(made_V[3:].numpy(), refused * share, rtol=1e-4)


def test_a_tie_at_the_border_keeps_the_lower_ids():
    values = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0]])
    assert sampling.largest(values, 3).tolist() == [[True, True, True, False, False]]
    assert sampling.largest(values, 9).all()


def test_logits_that_are_not_finite_give_nan_and_not_a_token():
    bad = torch.tensor([[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0]])
    for temperature in (0.0, 1.0):
        made = sampling.distribution(bad, SamplingParams(max_tokens=1, temperature=temperature))
        assert made.isnan().any(-1).all()
