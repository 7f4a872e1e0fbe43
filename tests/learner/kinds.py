"""Every kind of term on one step of answers: two domains, two writers, rewards, a masked turn, truncated answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from opd.types import Rollout
from tests import rooms

SAMPLED = {"support": "sampled"}
OWN = {"written_by": ["student"]}
ROUTED = {"kind": "routed", "routes": {"m": "teacher", "c": "reference"}}
DIVERGENCES: dict[str, dict[str, Any]] = {
    "full": {},
    "forward, sequence mean": {"shape": {"kind": "forward_kl"}, "reduction": "sequence_mean"},
    "jsd, constant": {"shape": {"kind": "jsd"}, "reduction": "constant", **OWN},
    "bucket": {"support": {"kind": "union", "k": 6}},
    "correction": {"support": {"kind": "union", "k": 4, "tail": "sampled_correction"}, "importance": "tis", **OWN},
    "routed": {"target": ROUTED},
    "product": {"target": {"kind": "product", "weights": {"teacher": 0.3, "reference": 0.7}}},
    "extrapolated": {"target": {"kind": "extrapolated", "scale": 1.25}, **SAMPLED, **OWN},
    "delta": {"target": {"kind": "delta", "strong": "teacher", "weak": "weak", "base": "reference"}, **SAMPLED, **OWN},
    "sampled": {"importance": "tis", **SAMPLED, **OWN},
    "discounted": {"credit": {"discount": 0.9}, **SAMPLED, **OWN},
    "future alone": {"credit": {"discount": 0.95, "now": False, "length_norm": True}, **SAMPLED, **OWN},
    "forward, discounted": {"credit": {"discount": 1.0}, "shape": {"kind": "forward_kl"}, **SAMPLED, **OWN},
    "baseline": {"credit": {"baseline": "exact"}, **SAMPLED, **OWN},
    "answer ratio": {"importance": {"kind": "icepop", "level": "sequence"}, **SAMPLED, **OWN},
    "answer clip": {"importance": {"kind": "ppo", "level": "sequence"}, "credit": {"discount": 0.5}, **SAMPLED, **OWN},
    "anchor": {"importance": {"kind": "ppo", "against": "proximal"}, "advantage_under": "proximal", **SAMPLED, **OWN},
    "verifier": {"shape": {"kind": "verifier_gated"}},
    "entropy gate": {"tokens": {"where": {"of": "teacher", "above": 1.0}}},
    "masks": {"tokens": {"special": "mask", "truncated": "mask", "skip_first": 1, "first": 6}},
    "prefix weights": {"tokens": {"importance_of_prefix": 0.5}},
    "select": {"tokens": {"select": {"by": "either", "share": 0.4}}},
    "select sampled": {"tokens": {"select": {"by": "divergence", "share": 0.4}}, **SAMPLED, **OWN},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "veto": {"target": {"kind": "veto"}},
    "outcome": {"kind": "outcome", **OWN},
    "outcome, clipped": {"kind": "outcome", "importance": {"kind": "ppo", "level": "sequence"}, **OWN},
    "data": {"kind": "data"},
}
KINDS = DIVERGENCES | OTHERS
SPECIAL = frozenset(range(5, 300, 9))


def step(student, fmt) -> list[Rollout]:
    """Ragged answers; of every six one has no reward and one is the data's; one token in five is a tool's."""
    made = []
    for n, rollout in enumerate(rooms.rollouts(student, fmt, samples=3, max_tokens=10)):
        row = dataclasses.replace(rollout.prompt.row, domain="mc"[int(rollout.prompt.id[-1]) % 2])
        moved = rollout.behaviour_logprobs + 0.2 * np.sin(np.arange(len(rollout.mask)) + n)
        fields: dict[str, Any] = {
            "prompt": dataclasses.replace(rollout.prompt, row=row),
            "mask": np.arange(len(rollout.mask)) % 5 != 3,
            "behaviour_logprobs": moved.astype(np.float32),
            "reward": None if n % 6 == 5 else float(n % 2),
        }
        if n % 6 == 4:
            fields |= {"behaviour": "dataset", "behaviour_logprobs": np.full(len(rollout.mask), np.nan, np.float32)}
        made.append(dataclasses.replace(rollout, **fields))
    return made


def gradient(student, terms, rollouts_N, teacher, **options) -> torch.Tensor:
    """Of the real learner; `terms` is one term or several."""
    named = [{"name": f"t{n}", **term} for n, term in enumerate(terms if isinstance(terms, (list, tuple)) else [terms])]
    learner = rooms.learner(student, rooms.objective(*named), special_ids=SPECIAL, **options)
    learner.gradients(rollouts_N, teacher.evidence(rollouts_N))
    return rooms.gradient(student)
