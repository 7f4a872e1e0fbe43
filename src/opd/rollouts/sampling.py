"""From logits and one uniform number to a token and its log-probability."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from opd.types import SamplingParams

_BLOCK = 512  # tokens that one float32 sum may span; sums of blocks are added in float64
_AT_ONCE = 1024  # tokens whose cumulative sum is made in one piece, in float64
_CANDIDATES = 256  # largest probabilities looked at first when only the top of the vocabulary matters


def draw(logits_NV: Tensor, uniform_N: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution at `uniform_N`.

    The distribution is softmax(logits / temperature), cut to `top_k`, renormalised, cut to `top_p`, renormalised.
    Both cuts keep an exact number of tokens: `top_k`, and the smallest set whose mass reaches `top_p` (never less than
    one). Where tokens of equal probability straddle the border, those with the lower ids stay.

    logits_NV   float32 [N, V].
    uniform_N   float64 [N], strictly between 0 and 1, on the same device.
    Returns int64 [N] tokens, never one of probability zero, and float32 [N] log-probabilities under the distribution
    they were drawn from: NaN for a row with NaN or +inf logits. Temperature 0 is the arg max with log-probability 0.
    """
    if params.temperature == 0:
        top_N, token_N = logits_NV.max(-1)
        return token_N, top_N * 0.0  # 0, or NaN where the logits are not finite
    return _invert(_masses(logits_NV, params), uniform_N)


def distribution(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """float32 [N, V]: the probabilities that `draw` draws from; each row adds up to 1. A row with logits that are not
    finite (-inf excepted) is NaN.

    logits_NV   float32 [N, V].
    """
    if params.temperature == 0:
        top_N1, token_N1 = logits_NV.max(-1, keepdim=True)
        return torch.zeros_like(logits_NV).scatter_(1, token_N1, 1.0) + top_N1 * 0.0
    mass_NV = _masses(logits_NV, params)
    return mass_NV / mass_NV.sum(-1, keepdim=True)


def largest(values_NV: Tensor, k: int) -> Tensor:
    """bool [N, V]: the k largest values of every row, lower ids first among equals."""
    k = min(k, values_NV.shape[-1])
    border_N1 = values_NV.topk(k, dim=-1).values[:, -1:]
    return _stays(values_NV, border_N1, torch.full_like(border_N1, k, dtype=torch.int64))


def _masses(logits_NV: Tensor, params: SamplingParams) -> Tensor:
    """float32 [N, V], not normalised: the tempered softmax, zero where a cut takes the token out."""
    cut = 0 < params.top_k < logits_NV.shape[-1] or params.top_p < 1
    if not cut and logits_NV.device.type == "cpu" and logits_NV.shape[-1] > _AT_ONCE:
        return _powers(logits_NV, params.temperature)
    tempered_NV = logits_NV if params.temperature == 1 else logits_NV / params.temperature
    mass_NV = torch.softmax(tempered_NV, dim=-1)
    if 0 < params.top_k < mass_NV.shape[-1]:
        mass_NV = mass_NV * largest(mass_NV, params.top_k)
    if params.top_p < 1:
        mass_NV = _keep_top_p(mass_NV, params.top_p)
    return mass_NV


def _powers(logits_NV: Tensor, temperature: float) -> Tensor:
    """exp((logits - largest) / temperature) as powers of two, which a CPU makes in a fraction of the time of exp."""
    scale = math.log2(math.e) / temperature
    return torch.add(logits_NV.amax(-1, keepdim=True) * -scale, logits_NV, alpha=scale).exp2_()


def _invert(mass_NV: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from unnormalised masses; over a large vocabulary in two steps, a block of tokens and then a token of it.

    A cumulative sum over a large vocabulary in float32 loses the tail; this reads the vocabulary once, in float32, and
    adds in float64.
    """
    V = mass_NV.shape[1]
    uniform_N1 = uniform_N[:, None]
    if V <= _AT_ONCE:
        ends_NV = mass_NV.double().cumsum(1)
        total_N1 = ends_NV[:, -1:]
        token_N1 = _first_above(ends_NV, uniform_N1 * total_N1)
    else:
        blocks = V // _BLOCK
        sums_NB = mass_NV[:, : blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).sum(-1)
        rest_N1 = mass_NV[:, blocks * _BLOCK :].sum(-1, keepdim=True)
        ends_NB = torch.cat([sums_NB, rest_N1], dim=1).double().cumsum(1)
        total_N1 = ends_NB[:, -1:]
        point_N1 = uniform_N1 * total_N1
        block_N1 = _first_above(ends_NB, point_N1)
        left_N1 = point_N1 - F.pad(ends_NB, (1, 0)).gather(1, block_N1)
        token_NB = block_N1 * _BLOCK + torch.arange(_BLOCK, device=mass_NV.device)
        token_NB = token_NB.clamp_(max=V - 1)  # a last, shorter block repeats its last token behind the end of its mass
        place_N1 = _first_above(mass_NV.gather(1, token_NB).double().cumsum(1), left_N1)
        token_N1 = token_NB.gather(1, place_N1)
    chosen_N1 = mass_NV.gather(1, token_N1)
    return token_N1[:, 0], (chosen_N1 / total_N1).log()[:, 0].float()


def _first_above(ends_NB: Tensor, point_N1: Tensor) -> Tensor:
    """int64 [N, 1]: the first interval that ends above the point.

    An interval of mass zero ends where it began, so it is never the first. Rounding may put the point on the last end
    itself; it is moved just below.
    """
    point_N1 = torch.minimum(point_N1, ends_NB[:, -1:] * (1 - 1e-15))
    return torch.searchsorted(ends_NB, point_N1, right=True).clamp_(max=ends_NB.shape[1] - 1)


def _keep_top_p(mass_NV: Tensor, top_p: float) -> Tensor:
    """Sorts no more of the vocabulary than the nucleus needs: 256 tokens, then 16 times as many, ..."""
    V = mass_NV.shape[-1]
    goal_N1 = top_p * mass_NV.sum(-1, keepdim=True, dtype=torch.float64)
    looked_at = min(_CANDIDATES, V)
    while True:
        largest_NK = mass_NV.topk(looked_at, dim=-1).values
        reached_NK = largest_NK.double().cumsum(-1)
        if looked_at == V or bool((reached_NK[:, -1:] >= goal_N1).all()):
            break
        looked_at = min(16 * looked_at, V)
    count_N1 = ((reached_NK < goal_N1).sum(-1, keepdim=True) + 1).clamp(max=looked_at)
    return mass_NV * _stays(mass_NV, largest_NK.gather(1, count_N1 - 1), count_N1)


def _stays(mass_NV: Tensor, border_N1: Tensor, count_N1: Tensor) -> Tensor:
    """bool [N, V]: the `count` largest values; `border` is the smallest of them, lower ids first among equals."""
    stays_NV = mass_NV >= border_N1
    if bool((stays_NV.sum(-1, keepdim=True) > count_N1).any()):
        above_NV = mass_NV > border_N1
        room_N1 = count_N1 - above_NV.sum(-1, keepdim=True)
        equal_NV = mass_NV == border_N1
        stays_NV = above_NV | (equal_NV & (equal_NV.cumsum(-1) <= room_N1))
    return stays_NV
