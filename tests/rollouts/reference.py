"""What the engine must agree with, written the plain way: float64, whole sequences, no cache, sorting."""

from __future__ import annotations

import numpy as np
import torch

from opd.models.causal import CausalLM
from opd.types import Prompt, Rollout, Row, SamplingParams
from tests import tiny

VOCAB = 300


def causal(kind: str = "qwen3", *, vocab_size: int = VOCAB, **settings) -> CausalLM:
    return CausalLM(tiny.model(kind, **settings), vocab_size=vocab_size, compute_dtype=torch.float32, name=kind)


def prompts(*lengths: int, seed: int = 0) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [
        Prompt(row=Row(id=f"rows/{i}", domain="rows", prompt=""), ids=rng.integers(3, 250, length))
        for i, length in enumerate(lengths)
    ]


def distribution(logits_V: np.ndarray, params: SamplingParams) -> np.ndarray:
    """float64 [V]: the probabilities that `params` asks for."""
    logits_V = logits_V.astype(np.float64)
    if params.temperature == 0:
        return np.eye(len(logits_V))[int(logits_V.argmax())]
    tempered_V = logits_V / params.temperature
    mass_V = np.exp(tempered_V - tempered_V.max())
    order_V = np.argsort(-mass_V, kind="stable")
    if params.top_k:
        mass_V[order_V[params.top_k :]] = 0
    mass_V /= mass_V.sum()
    enough = np.cumsum(mass_V[order_V]) >= params.top_p
    if params.top_p < 1:
        mass_V[order_V[int(enough.argmax()) + 1 :]] = 0
    return mass_V / mass_V.sum()


def recomputed(model: CausalLM, rollout: Rollout, params: SamplingParams) -> np.ndarray:
    """float64 [T] log-probabilities of the response by one forward pass over prompt and response alone."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt.ids, rollout.response_ids]))[None]
    with torch.no_grad():
        logits_1TV = model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    rows_TV = logits_1TV[0].float().numpy()[len(rollout.prompt.ids) - 1 : -1, : model.vocab_size]
    probabilities = [
        distribution(row_V, params)[token] for row_V, token in zip(rows_TV, rollout.response_ids, strict=True)
    ]
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def assert_chi_square(counts: np.ndarray, expected: np.ndarray) -> None:
    """p > 0.001, with rare outcomes (expected less than 5 times) counted together; the impossible never happens."""
    assert not counts[expected == 0].any()
    often = expected >= 5
    counts = np.append(counts[often], counts[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    statistic = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    degrees = int((expected > 0).sum()) - 1
    # 99.9th percentile, Wilson and Hilferty 1931; a single outcome leaves nothing to differ
    limit = degrees * (1 - 2 / (9 * degrees) + 3.0902 * np.sqrt(2 / (9 * degrees))) ** 3 if degrees else 1e-9
    assert statistic < limit, f"chi-square {statistic:.1f} with {degrees} degrees of freedom, limit {limit:.1f}"


def assert_binomial(count: int, draws: int, share: float, level: float = 1e-6) -> None:
    """`count` of `draws` lies where a binomial variable lies but with probability `level`, by its exact tails."""
    k = np.arange(draws + 1)
    steps = np.concatenate(
        [[0.0], np.cumsum(np.log(draws - k[:-1]) - np.log(k[1:]))]
    )  # log of the binomial coefficient
    if share in (0.0, 1.0):
        assert count == share * draws
        return
    mass_k = np.exp(steps + k * np.log(share) + (draws - k) * np.log1p(-share))
    assert abs(mass_k.sum() - 1) < 1e-9
    below, above = mass_k[: count + 1].sum(), mass_k[count:].sum()
    assert min(below, above) > level / 2, f"{count} of {draws}, where {share * draws:.1f} is expected"


def logits(model: CausalLM, ids: np.ndarray) -> np.ndarray:
    """float64 [V] of the token behind `ids`, by one forward pass without a cache."""
    given = torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]
    with torch.no_grad():
        made = model.module(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False).logits
    return made[0, -1, : model.vocab_size].double().numpy()
