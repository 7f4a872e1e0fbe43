"""Named methods: each a short function from its parameters to behaviour and terms. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from opd.config.objective import ForwardKL, JensenShannon, ReverseKL, Term
from opd.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """What a named method stands for."""

    behaviour: Literal["student", "dataset"]
    terms: tuple[Term, ...]


def reverse_kl() -> Preset:
    """Full-vocabulary KL(student || teacher) on the student's own answers."""
    return Preset("student", (Term(name="reverse_kl", shape=ReverseKL()),))


def forward_kl() -> Preset:
    """Full-vocabulary KL(teacher || student) on the student's own answers."""
    return Preset("student", (Term(name="forward_kl", shape=ForwardKL()),))


def jsd(beta: float = 0.5, normalised: bool = False) -> Preset:
    """Full-vocabulary generalised Jensen-Shannon divergence on the student's own answers (GKD with lambda = 1)."""
    return Preset("student", (Term(name="jsd", shape=JensenShannon(beta=beta, normalised=normalised)),))


def tml() -> Preset:
    """Thinking Machines: sampled reverse KL under the sampler as advantage, importance-sampling loss, discount 0."""
    return Preset(
        "student",
        (Term(name="tml", shape=ReverseKL(), support="sampled", advantage_under="sampler", importance="ratio"),),
    )


def sft() -> Preset:
    """Cross-entropy on the answers of the data."""
    return Preset("dataset", (Term(name="sft", target="data", shape=ForwardKL(), support="sampled"),))


PRESETS: dict[str, Callable[..., Preset]] = {f.__name__: f for f in (reverse_kl, forward_kl, jsd, tml, sft)}


def expand(name: str, parameters: dict[str, object]) -> Preset:
    """The preset `name` with its parameters; raises ConfigError for a name or parameter that does not exist."""
    if name not in PRESETS:
        raise ConfigError(f"objective.preset: there is no {name!r}; the presets are {', '.join(sorted(PRESETS))}")
    known = list(inspect.signature(PRESETS[name]).parameters)
    for key in parameters:
        if key not in known:
            takes = ", ".join(known) if known else "none"
            raise ConfigError(f"objective.parameters.{key}: preset {name!r} takes {takes}")
    return PRESETS[name](**parameters)
