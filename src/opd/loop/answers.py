"""Facts about a step's answers: how long, how they end, whether they go round in circles, where the divergence sits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from opd.types import Rollout, TokenScores

REPEATED_NGRAM = 16  # tokens; a power of two. Shorter ones also repeat in good prose, code and arithmetic
MOST_DOMAINS = 20


def answer_metrics(rollouts_N: Sequence[Rollout], scores: Mapping[str, TokenScores]) -> dict[str, float]:
    """Plain finite numbers; a key that has nothing to say is left out.

    rollouts, response_tokens                answers, and tokens in them
    response_length, response_length_max     tokens
    truncated, ended                         share of answers cut off at the limit, and that ended by themselves
    repetition                               share of the writer's tokens that are repeated, see `repeated`
    end_logprob, end_probability             of the end tokens that were drawn, under the student: mean, mean of exp
    teacher_logprob, teacher_spread          mean and standard deviation of the teacher's log-probability of the tokens
    reverse_kl/domain/NAME                   mean per token, where there are several domains; the largest 20 of them
    reverse_kl/position/LOW-HIGH             mean per token at positions LOW to HIGH of the answer, both included,
                                             counted from 0: 0-3, 4-15, 16-63, 64-255, ...

    scores   rollout id to what the update saw; rollouts without scores count in the first seven only. Masked tokens are
             left out of everything but counts and lengths.
    """
    length_N = np.array([len(r.response_ids) for r in rollouts_N])
    ended_N = np.array([r.finish_reason == "stop" for r in rollouts_N])
    mask_T = np.concatenate([r.mask for r in rollouts_N])
    repeated_T = repeated(np.concatenate([r.response_ids for r in rollouts_N]), length_N)
    facts = {
        "rollouts": float(len(rollouts_N)),
        "response_tokens": float(length_N.sum()),
        "response_length": float(length_N.mean()),
        "response_length_max": float(length_N.max()),
        "truncated": float(1.0 - ended_N.mean()),
        "ended": float(ended_N.mean()),
    }
    if mask_T.any():
        facts["repetition"] = float(repeated_T[mask_T].mean())
    scored_N = [r for r in rollouts_N if r.id in scores and len(r.response_ids)]
    return facts | (_scored(scored_N, scores) if scored_N else {})


def repeated(ids_T: NDArray[np.int64], length_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [T]: True for a token that lies inside `REPEATED_NGRAM` consecutive tokens which also stand, in the same
    order, earlier in the same answer (the two places may overlap).

    A loop is repeated from its second round on, whatever its period; answers that are not longer than the n-gram never
    are. Sorting one 64-bit hash per token makes it linear but for the sort; two n-grams share a hash with a
    probability of about T^2 / 2^65.

    ids_T      int64 [T], the answers one after another.
    length_N   int64 [N], their lengths.
    """
    T, n = len(ids_T), REPEATED_NGRAM
    hash_T = _mix(ids_T.astype(np.uint64))
    width = 1
    while width < n:  # the hash of 2w tokens from those of the w tokens here and w further on
        hash_T = _mix(hash_T[:-width] * np.uint64(0x9E3779B97F4A7C15) + hash_T[width:])
        width *= 2
    row_T = np.repeat(np.arange(len(length_N), dtype=np.int64), length_N)
    window_W = np.flatnonzero(row_T[: max(T - n + 1, 0)] == row_T[n - 1 :])  # starts of n-grams inside one answer
    key_W = hash_T[window_W] ^ _mix(row_T[window_W].astype(np.uint64) + np.uint64(1) + ids_T.size)
    order_W = np.argsort(key_W, kind="stable")
    again_W = np.zeros(len(window_W), dtype=np.bool_)
    again_W[order_W[1:]] = key_W[order_W[1:]] == key_W[order_W[:-1]]
    edge_T = np.zeros(T + 1, dtype=np.int64)
    edge_T[window_W[again_W]] += 1
    edge_T[window_W[again_W] + n] -= 1
    return np.cumsum(edge_T[:-1]) > 0


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scored(scored_N: Sequence[Rollout], scores: Mapping[str, TokenScores]) -> dict[str, float]:
    """What the update's scores say; `scored_N` is not empty and every rollout has scores."""
    seen_N = [scores[r.id] for r in scored_N]
    for rollout, seen in zip(scored_N, seen_N, strict=True):
        assert len(seen.reverse_kl) == len(rollout.response_ids), f"scores of another answer at {rollout.id}"
    mask_T = np.concatenate([r.mask for r in scored_N])
    length_N = np.array([len(r.response_ids) for r in scored_N])
    end_N = np.cumsum(length_N)
    facts: dict[str, float] = {}

    student_T = np.concatenate([seen.student_logprobs for seen in seen_N])
    ended_N = np.array([r.finish_reason == "stop" for r in scored_N])
    ends_E = _kept(student_T[end_N - 1], mask_T[end_N - 1] & ended_N)
    if len(ends_E):
        facts |= {"end_logprob": float(ends_E.mean()), "end_probability": float(np.exp(ends_E).mean())}

    teacher_T = _kept(np.concatenate([seen.teacher_logprobs for seen in seen_N]), mask_T)
    if len(teacher_T):
        facts |= {"teacher_logprob": float(teacher_T.mean()), "teacher_spread": float(teacher_T.std())}

    kl_T = np.concatenate([seen.reverse_kl for seen in seen_N])
    valid_T = mask_T & np.isfinite(kl_T)
    if valid_T.any():
        domain_N = [r.domain for r in scored_N]
        if len(set(domain_N)) > 1:
            facts |= _by_domain(kl_T, valid_T, domain_N, length_N)
        facts |= _by_position(kl_T[valid_T], (np.arange(len(kl_T)) - np.repeat(end_N - length_N, length_N))[valid_T])
    return facts


def _by_domain(
    kl_T: NDArray[np.float32], valid_T: NDArray[np.bool_], domain_N: Sequence[str], length_N: NDArray[np.int64]
) -> dict[str, float]:
    """Domains whose names are the same as a key are one."""
    keys = [as_key(domain) for domain in domain_N]
    names, row_N = np.unique(keys, return_inverse=True)
    group_T = np.repeat(row_N, length_N)[valid_T]
    counts = np.bincount(group_T, minlength=len(names))
    sums = np.bincount(group_T, weights=kl_T[valid_T], minlength=len(names))
    largest = sorted(range(len(names)), key=lambda i: (-counts[i], names[i]))[:MOST_DOMAINS]
    return {f"reverse_kl/domain/{names[i]}": float(sums[i] / counts[i]) for i in sorted(largest) if counts[i]}


def _by_position(kl_T: NDArray[np.float32], position_T: NDArray[np.int64]) -> dict[str, float]:
    """Buckets end at 4, 16, 64, ... (excluded), so that each holds three quarters of all positions up to its end."""
    _, exponent_T = np.frexp(position_T.astype(np.float64))  # 2^(e - 1) <= position < 2^e, and e = 0 at position 0
    bucket_T = np.maximum(exponent_T - 1, 0) // 2
    counts = np.bincount(bucket_T)
    sums = np.bincount(bucket_T, weights=kl_T)
    return {
        f"reverse_kl/position/{0 if b == 0 else 4**b}-{4 ** (b + 1) - 1}": float(sums[b] / counts[b])
        for b in range(len(counts))
        if counts[b]
    }


def _kept(values: NDArray[np.float32], mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    return values[mask & np.isfinite(values)].astype(np.float64)


def as_key(name: str) -> str:
    """A domain as part of a metric's name: letters, digits, `_`, `.` and `-`; no slash, which separates the parts."""
    return re.sub(r"[^\w.-]+", "_", name)[:60] or "_"
