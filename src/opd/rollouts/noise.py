"""The noise of a rollout: a function of (seed, rollout id, position) and of nothing else.

Batch, slot, order of prompts, device and threads do not enter: a rollout that is replayed alone meets the same noise.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64 (Steele, Lea, Flood 2014): a counter, then a mixing of its bits
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_ONE, _UNUSED = np.uint64(1), np.uint64(12)


def key(seed: int, rollout_id: str) -> np.uint64:
    """64 bits that stand for one rollout of one seed."""
    digest = hashlib.blake2b(f"{seed}:{rollout_id}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def uniforms(key_N: NDArray[np.uint64], position_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [N], strictly between 0 and 1: one number per (rollout, response position)."""
    # wrapping around 2**64 is how a counter generator counts; arrays do so without a warning
    z = key_N + (position_N.astype(np.uint64) + _ONE) * _STEP
    z = (z ^ (z >> _SHIFT_1)) * _MIX_1
    z = (z ^ (z >> _SHIFT_2)) * _MIX_2
    z = z ^ (z >> _SHIFT_3)
    # 52 bits and a half: the middle of each of 2**52 equal intervals, all of them exact in float64, none of them 0 or 1
    return ((z >> _UNUSED).astype(np.float64) + 0.5) * 2.0**-52
