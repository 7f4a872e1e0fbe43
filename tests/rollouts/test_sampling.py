import numpy as np
import pytest
import torch

from opd.rollouts import noise, sampling
from opd.types import SamplingParams
from tests.rollouts.reference import assert_chi_square, distribution

GRID = [
    SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    for temperature in (0.6, 1.0, 1.7)
    for top_p in (1.0, 0.8, 0.05)
    for top_k in (0, 1, 7)
]


def _uniforms(count: int, name: str = "test") -> torch.Tensor:
    return torch.from_numpy(noise.uniforms(np.full(count, noise.key(0, name)), np.arange(count)))


@pytest.mark.parametrize("params", GRID, ids=lambda p: f"T{p.temperature}-p{p.top_p}-k{p.top_k}")
@pytest.mark.parametrize("vocab", [40, 512, 1300])
def test_T_07_tokens_and_log_probabilities_are_those_of_the_cut_distribution(params, vocab):
    rng = np.random.default_rng(vocab)
    logits_NV = torch.from_numpy(rng.normal(0, 3, (50, vocab)).astype(np.float32))
    uniform_N = _uniforms(50)
    token_N, logprob_N = sampling.draw(logits_NV, uniform_N, params)
    for n in range(50):
        exact_V = distribution(logits_NV[n].numpy(), params)
        ends_V = exact_V.cumsum()
        assert logprob_N[n].item() == pytest.approx(np.log(exact_V[token_N[n]]), abs=1e-5)
        assert ends_V[token_N[n]] > uniform_N[n] - 1e-6
        assert ends_V[token_N[n]] - exact_V[token_N[n]] < uniform_N[n] + 1e-6


@pytest.mark.parametrize("params", GRID[::4], ids=lambda p: f"T{p.temperature}-p{p.top_p}-k{p.top_k}")
def test_frequencies_pass_a_chi_square_test(params):
    logits_V = torch.from_numpy(np.random.default_rng(1).normal(0, 1.5, 60).astype(np.float32))
    exact_V = distribution(logits_V.numpy(), params)
    token_N, _ = sampling.draw(logits_V.expand(20_000, -1), _uniforms(20_000), params)
    counts_V = np.bincount(token_N.numpy(), minlength=60)
    assert_chi_square(counts_V, exact_V * 20_000)


def test_frequencies_of_a_large_vocabulary_pass_a_chi_square_test():
    vocab, draws, bins = 151_936, 1500, 30
    logits_V = torch.from_numpy(np.random.default_rng(2).normal(0, 2, vocab).astype(np.float32))
    params = SamplingParams(max_tokens=1)
    exact_V = distribution(logits_V.numpy(), params)
    bin_V = np.minimum((exact_V.cumsum() * bins).astype(int), bins - 1)
    expected = np.bincount(bin_V, weights=exact_V, minlength=bins) * draws
    counts = np.zeros(bins)
    for uniform_N in _uniforms(draws).split(100):
        token_N, _ = sampling.draw(logits_V.expand(len(uniform_N), -1), uniform_N, params)
        counts += np.bincount(bin_V[token_N.numpy()], minlength=bins)
    assert_chi_square(counts, expected)


def test_borders_between_tokens_of_a_large_vocabulary_are_where_they_belong():
    """To a hundred-millionth; a running sum in float32 over 151,936 tokens misses most borders of its upper half."""
    vocab = 151_936
    logits_V = torch.from_numpy(np.random.default_rng(3).normal(0, 1, vocab).astype(np.float32))
    exact_V = distribution(logits_V.numpy(), SamplingParams(max_tokens=1))
    ends_V = exact_V.cumsum()
    likely = np.flatnonzero((exact_V[:-1] > 1e-6) & (exact_V[1:] > 1e-6) & (ends_V[:-1] > 0.5))
    before_N = likely[np.linspace(0, len(likely) - 1, 30).astype(int)]
    for offset, expected_N in ((-1e-8, before_N), (1e-8, before_N + 1)):
        uniform_N = torch.from_numpy(ends_V[before_N] + offset)
        token_N, _ = sampling.draw(logits_V.expand(30, -1), uniform_N, SamplingParams(max_tokens=1))
        assert token_N.tolist() == expected_N.tolist()


@pytest.mark.parametrize("vocab", [5, 512, 2000])
def test_a_token_of_probability_zero_is_never_drawn(vocab):
    possible = [1, vocab // 2, vocab - 2]
    logits_NV = torch.full((5, vocab), -torch.inf)
    logits_NV[:, possible] = torch.tensor([0.0, -30.0, 1.0])
    edge_N = torch.tensor([2.0**-53, 1e-12, 0.5, 1 - 1e-12, 1 - 2.0**-53], dtype=torch.float64)
    token_N, logprob_N = sampling.draw(logits_NV, edge_N, SamplingParams(max_tokens=1))
    assert set(token_N.tolist()) <= set(possible)
    assert torch.isfinite(logprob_N).all()


def test_rounding_at_the_very_end_never_reaches_a_token_of_probability_zero():
    """The float32 sum of a block may exceed what its tokens add up to; the point then lies behind all of them."""
    logits_NV = torch.from_numpy(np.random.default_rng(5).normal(0, 1, (64, 2000)).astype(np.float32))
    logits_NV[:, 1900:] = -torch.inf
    token_N, logprob_N = sampling.draw(
        logits_NV, torch.full((64,), 1 - 2.0**-53, dtype=torch.float64), SamplingParams(max_tokens=1)
    )
    assert token_N.max() < 1900 and torch.isfinite(logprob_N).all()


def test_equal_probabilities_at_the_border_keep_the_lower_ids():
    logits_NV = torch.zeros(400, 10)
    logits_NV[:, 4] = 1.0
    for params, kept in (
        (SamplingParams(max_tokens=1, top_k=3), {0, 1, 4}),
        (SamplingParams(max_tokens=1, top_p=0.4), {0, 1, 4}),  # 0.232 + 2 x 0.085
        (SamplingParams(max_tokens=1, top_p=1e-9), {4}),
    ):
        token_N, _ = sampling.draw(logits_NV, _uniforms(400), params)
        assert set(token_N.tolist()) == kept


def test_a_nucleus_larger_than_the_first_look_is_whole():
    logits_V = torch.from_numpy(np.random.default_rng(4).normal(0, 0.1, 6000).astype(np.float32))
    params = SamplingParams(max_tokens=1, top_p=0.9)
    exact_V = distribution(logits_V.numpy(), params)
    token_N, logprob_N = sampling.draw(logits_V.expand(300, -1), _uniforms(300), params)
    assert np.abs(logprob_N.numpy() - np.log(exact_V[token_N.numpy()])).max() < 1e-5


def test_temperature_zero_is_the_arg_max_with_log_probability_zero():
    logits_NV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    token_N, logprob_N = sampling.draw(logits_NV, _uniforms(20), SamplingParams(max_tokens=1, temperature=0.0))
    assert torch.equal(token_N, logits_NV.argmax(-1)) and not logprob_N.any()


@pytest.mark.parametrize(
    "params", [SamplingParams(max_tokens=1, temperature=t, top_p=p) for t, p in ((1, 1), (1, 0.9), (0, 1))]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("vocab", [700, 5000])
def test_logits_that_are_not_finite_show_in_the_log_probability(params, bad, vocab):
    logits_NV = torch.zeros(3, vocab)
    logits_NV[1, 600] = bad
    token_N, logprob_N = sampling.draw(logits_NV, _uniforms(3), params)
    assert token_N.max() < vocab
    assert torch.isfinite(logprob_N).tolist() == [True, False, True]


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_a_large_vocabulary_is_drawn_from_as_float64_would(temperature):
    torch.manual_seed(3)
    logits_NV, uniform_N = torch.randn(12, 151_936) * 4, _uniforms(12)
    token_N, logprob_N = sampling.draw(logits_NV, uniform_N, SamplingParams(max_tokens=1, temperature=temperature))
    exact_NV = (logits_NV.double() / temperature).log_softmax(-1)
    ends_NV = exact_NV.exp().cumsum(-1)
    at_N1 = token_N[:, None]
    torch.testing.assert_close(logprob_N.double(), exact_NV.gather(1, at_N1)[:, 0], atol=1e-5, rtol=0)
    above = ends_NV.gather(1, at_N1)[:, 0] > uniform_N - 1e-6
    below = (ends_NV - exact_NV.exp()).gather(1, at_N1)[:, 0] < uniform_N + 1e-6
    assert above.all() and below.all()
