"""Where each way of cutting the reverse KL to the teacher's likeliest tokens ends, and how it gets there.

The pair is the one of tests/oracle/test_derived_top_k.py: one state, 50 tokens, the teacher's top 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from measures.drawing import Level, Line, Panel, figure
from opd.objectives import oracle
from opd.objectives.oracle import divergences
from tests.oracle import test_derived_top_k as pair

RATE, STEPS = 1.0, 3000  # of plain gradient descent on the logits
AGREE = 1e-12


@dataclass(frozen=True)
class Variant:
    """h       from log p and log q on the vocabulary [V] to h [V]; the field is -p (h - E_p[h]).
    inside     whether p and q are rescaled to the set first, and nothing outside moves."""

    name: str
    config: str
    on_and_off: str
    h: Callable[[Tensor, Tensor], Tensor]
    verdict: str
    inside: bool = False


def _on(value: Tensor, rest: Tensor | float = 0.0) -> Tensor:
    return torch.where(pair.KEPT[0], value, rest)


def _bucket(logp: Tensor, logq: Tensor) -> Tensor:
    outside = ~pair.KEPT[0]
    return _on(logq - logp, logq[outside].logsumexp(0) - logp[outside].logsumexp(0))


VARIANTS: dict[str, Variant] = {
    "full": Variant(
        "whole vocabulary", "`full`", "log r / log r", lambda logp, logq: logq - logp, "the teacher, exactly"
    ),
    "bucket": Variant("tail in one class", "`tail: bucket`", "log r / log(Q_tail / P_tail)", _bucket,
                      "right mass, right shape on S, the tail keeps its own shape; default"),
    "stop_gradient": Variant("outside left alone", "`tail: drop`", "log r / 0", lambda logp, logq: _on(logq - logp),
                             "the same optimum, another way to it"),
    "renormalised": Variant("rescaled to S", "`tail: renormalise`", "log r^ / no gradient",
                            lambda logp, logq: logq - logp, "mass on S drifts, and entropy rises; warned about", True),
    "naive": Variant("sum over S of p log(p / q), differentiated", "not offered", "log r - 1 / 0",
                     lambda logp, logq: _on(logq - logp - 1), "empties S down to Q_S / e"),
}  # fmt: skip


def field(variant: Variant, z: Tensor) -> Tensor:
    """[V]: the closed form of the variant's field at logits [V]."""
    logp, logq = z.log_softmax(0), pair.TEACHER[0]
    if variant.inside:
        logp, logq = (divergences.within(x, pair.KEPT[0]) for x in (logp, logq))
    p, h = logp.exp(), variant.h(logp, logq)
    return -p * (h - (p * h).sum())


def masses(variant: Variant) -> list[tuple[float, float]]:
    """(steps x rate, P_S) along gradient descent, at steps that are even on a logarithmic axis."""
    z = pair.START[0].clone()
    seen = {round(10 ** (i / 24)) for i in range(90)}
    found = []
    for step in range(1, STEPS + 1):
        if step in seen:
            found.append((step * RATE, pair.mass(z.log_softmax(0)[None])))
        z = z - RATE * field(variant, z)
    return found


@cache
def rest(name: str) -> Tensor:
    """[1, V]: log-probabilities where the variant comes to rest. Its closed form is checked against autograd here."""
    gap = field(VARIANTS[name], pair.START[0]) - pair.FIELDS[name](pair.START)[0]
    assert gap.abs().max() < AGREE, f"{name}: closed form and autograd differ by {gap.abs().max():.2g}"
    return pair.ONE.logprobs(oracle.fixed_point(pair.FIELDS[name], pair.START))


def table() -> str:
    rows = [
        "| variant | in the config | h on S / off S | P_S at rest | KL(p ‖ q) | entropy | what it does |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for name, v in VARIANTS.items():
        logp = rest(name)
        numbers = f"{pair.mass(logp):.3f} | {abs(pair.full_kl(logp)):.3f} | {pair.entropy(logp):.3f}"
        rows.append(f"| {v.name} | {v.config} | {v.on_and_off} | {numbers} | {v.verdict} |")
    start = pair.START
    told = (
        f"\nTeacher: Q_S = {pair.mass(pair.TEACHER):.3f}, entropy {pair.entropy(pair.TEACHER):.3f}. "
        f"Start: P_S = {pair.mass(start):.3f}, KL {pair.full_kl(start):.3f}, entropy {pair.entropy(start):.3f}. "
        f"Q_S / e = {pair.mass(pair.TEACHER) / torch.e:.3f}."
    )
    return "\n".join(rows) + "\n" + told


def picture() -> str:
    names = ("full", "bucket", "stop_gradient", "renormalised", "naive")
    lines = [
        Line(name=VARIANTS[n].name, points=masses(VARIANTS[n]), colour=i, dashed=n == "stop_gradient")
        for i, n in enumerate(names)
    ]
    teacher = pair.mass(pair.TEACHER)
    panel = Panel(
        title="Student mass on the teacher's top 5",
        x_label="gradient descent on the logits: steps x rate (log scale)",
        y_label="P_S",
        lines=lines,
        x=(RATE, RATE * STEPS),
        y=(0.0, 0.8),
        log_x=True,
        levels=(Level(name="Q_S", value=teacher), Level(name="Q_S / e", value=teacher / torch.e)),
    )
    return figure("Student mass on the teacher's top 5 while five variants of top-k reverse KL are minimised", [panel])
