"""Shapes as advantages: the table and the picture of h, and JSD's two forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from measures.drawing import Level, Line, Panel, figure
from opd.config.shapes import (
    ClippedKL,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Shape,
    SkewForwardKL,
    SkewReverseKL,
    TanhKL,
    TotalVariation,
    VerifierGatedKL,
)
from opd.objectives import oracle
from opd.objectives.oracle import divergences
from opd.objectives.shapes import ShapeMaths, maths

ONE = oracle.tree(12, 1)
PAIR = (ONE.random_table(2), ONE.random_table(102))  # student, teacher
RATIOS = (0.01, 0.5, 2.0, 100.0)
REACH = 4.0  # of the picture, in nats
AGREE = 1e-12


@dataclass(frozen=True)
class Row:
    """definition: the divergence from log p and log q, for those that have one of their own."""

    name: str
    config: str
    spec: Shape
    h: str
    definition: divergences.Divergence | None = None
    right: bool | None = None


ROWS = (
    Row("reverse KL, KL(p ‖ q)", "{kind: reverse_kl}", ReverseKL(), "log r", divergences.reverse_kl),
    Row("forward KL, KL(q ‖ p)", "{kind: forward_kl}", ForwardKL(), "r - 1", divergences.forward_kl),
    Row("JSD, GKD's form", "{kind: jsd, beta: 0.5, normalised: false}", JensenShannon(beta=0.5),
        "(1 - beta) log(beta r + 1 - beta)", divergences.jensen_shannon(0.5)),
    Row("JSD, normalised", "{kind: jsd, beta: 0.5, normalised: true}", JensenShannon(beta=0.5, normalised=True),
        "the same / (beta (1 - beta))", lambda logp, logq: 4 * divergences.jensen_shannon(0.5)(logp, logq)),
    Row("skew forward KL, KL(q ‖ alpha q + (1 - alpha) p)", "{kind: skew_forward_kl, alpha: 0.1}", SkewForwardKL(),
        "(1 - alpha)² (r - 1) / (alpha r + 1 - alpha)", divergences.skew_forward_kl(0.1)),
    Row("skew reverse KL, KL(p ‖ (1 - alpha) q + alpha p)", "{kind: skew_reverse_kl, alpha: 0.1}", SkewReverseKL(),
        "log u + alpha / u - alpha, u = (1 - alpha) r + alpha", divergences.skew_reverse_kl(0.1)),
    Row("total variation", "{kind: total_variation}", TotalVariation(),
        "sign(r - 1) / 2, and 0 where abs(log r) is at most dead_zone", divergences.total_variation),
    Row("clipped reverse KL", "{kind: clipped, low: -2, high: 2}", ClippedKL(low=-2, high=2),
        "log r held to [low, high]; with low alone: floored"),
    Row("tanh-bounded reverse KL", "{kind: tanh, scale: 1.0}", TanhKL(), "scale tanh(log r / scale)"),
    Row("verifier-gated, right answers", "{kind: verifier_gated}", VerifierGatedKL(), "max(log r, 0)", right=True),
    Row("verifier-gated, wrong answers", "{kind: verifier_gated}", VerifierGatedKL(), "min(log r, 0)", right=False),
)  # fmt: skip


def of(row: Row) -> ShapeMaths:
    return maths(row.spec, None if row.right is None else torch.tensor(row.right))


def h(row: Row, log_r: Tensor) -> Tensor:
    return of(row).h(torch.zeros_like(log_r), log_r)


def slope(row: Row) -> float:
    """dh/d log r at r = 1: how strongly a student pulls that is nearly there."""
    step = 1e-6
    ends = h(row, torch.tensor([-step, step], dtype=torch.float64))
    return float((ends[1] - ends[0]) / (2 * step))


def check(row: Row) -> None:
    """The field from h is the gradient of the definition, or of the shape's own f, by autograd."""
    logp, logq = (ONE.logprobs(table) for table in PAIR)
    p, h_v = logp.exp(), of(row).h(logp, logq)
    field = -p * (h_v - (p * h_v).sum(-1, keepdim=True))
    value = row.definition or (lambda logp, logq: of(row).f_mass(logp, logq).sum(-1))
    gap = oracle.bias(field, oracle.local_field(ONE, *PAIR, value))
    assert gap.relative < AGREE, f"{row.name}: h and the divergence differ by {gap.relative:.2g}"


def table() -> str:
    rows = [
        f"| shape | in the config | h(r) | {' | '.join(f'r = {r:g}' for r in RATIOS)} | slope at r = 1 |",
        "|---|---|---|" + "---:|" * (len(RATIOS) + 1),
    ]
    log_r = torch.tensor(RATIOS, dtype=torch.float64).log()
    for row in ROWS:
        check(row)
        values = " | ".join(f"{x:.3g}" if abs(x) > AGREE else "0" for x in h(row, log_r).tolist())
        end = "a jump" if isinstance(row.spec, TotalVariation) else f"{slope(row):.3g}"
        end = "1 on one side" if row.right is not None else end
        rows.append(f"| {row.name} | `{row.config}` | {row.h} | {values} | {end} |")
    return "\n".join(rows)


def picture() -> str:
    axis = torch.linspace(-REACH, REACH, 161, dtype=torch.float64)

    def line(index: int, name: str, colour: int, dashed: bool = False) -> Line:
        values = h(ROWS[index], axis).tolist()
        return Line(name=name, points=list(zip(axis.tolist(), values, strict=True)), colour=colour, dashed=dashed)

    whole = (line(0, "reverse KL", 0), line(1, "forward KL", 1), line(2, "JSD(0.5), GKD's form", 2),
             line(3, "JSD(0.5), normalised", 2, True), line(4, "skew forward KL(0.1)", 3),
             line(5, "skew reverse KL(0.1)", 4))  # fmt: skip
    shaped = (line(0, "reverse KL", 0), line(6, "total variation", 1), line(7, "clipped to [-2, 2]", 2),
              line(8, "tanh, scale 1", 3), line(9, "verifier-gated, right answers", 4, True),
              line(10, "verifier-gated, wrong answers", 5, True))  # fmt: skip
    panels = [
        Panel(
            title=title,
            x_label="log r, r = target / student (0: they agree)",
            y_label="h(r): what a drawn token is worth",
            lines=lines,
            x=(-REACH, REACH),
            y=(-REACH, REACH),
        )
        for title, lines in (("Divergences by definition", whole), ("Shaped log-ratios", shaped))
    ]
    return figure("Every shape as an advantage: h as a function of the log-ratio", panels)


def jsd() -> str:
    logp, logq = (ONE.logprobs(table) for table in PAIR)
    betas = [i / 100 for i in range(1, 100)]
    ends = {name: float(divergences.NAMED[name](logp, logq)) for name in ("forward KL", "reverse KL")}

    def values(scale: Callable[[float], float]) -> list[tuple[float, float]]:
        return [(b, float(divergences.jensen_shannon(b)(logp, logq)) * scale(b)) for b in betas]

    panel = Panel(
        title="JSD between its two ends",
        x_label="beta",
        y_label="nats",
        lines=(
            Line(name="normalised: divided by beta (1 - beta)", points=values(lambda b: 1 / (b * (1 - b))), colour=0),
            Line(name="GKD's form", points=values(lambda b: 1.0), colour=1),
        ),
        x=(0.0, 1.0),
        y=(0.0, 1.15 * max(ends.values())),
        levels=tuple(Level(name=name, value=value) for name, value in ends.items()),
    )
    return figure("JSD with and without its normalisation, by beta, with forward and reverse KL as the limits", [panel])


def jumps() -> str:
    """What a library does that takes the full KL at beta 0 and 1."""
    logp, logq = (ONE.logprobs(table) for table in PAIR)
    at = {b: float(divergences.jensen_shannon(b)(logp, logq)) for b in (0.1, 0.9)}
    forward, reverse = (float(d(logp, logq)) for d in (divergences.forward_kl, divergences.reverse_kl))
    assert math.isfinite(forward + reverse)
    return (
        f"On the pair of the picture the value jumps by a factor of {forward / at[0.1]:.1f} between beta = 0.1 and 0, "
        f"and of {reverse / at[0.9]:.1f} between 0.9 and 1."
    )
