"""Where m (q / m)^lambda leads at discounts 0 and 1: the mixture that is normalised in every state, or over answers."""

from __future__ import annotations

from torch import Tensor

from measures.drawing import Line, Panel, figure
from opd.objectives import oracle

TREE = oracle.tree(3, 3, end=2)
START, TEACHER, REFERENCE = (TREE.random_table(seed) for seed in (0, 1, 2))
SCALES = tuple(0.5 + i / 8 for i in range(9))
SHOWN = SCALES[::2]
DISCOUNTS = (0.0, 0.5, 1.0)


def extrapolated(scale: float) -> Tensor:
    """[S, V]: lambda log q + (1 - lambda) log m, not normalised."""
    return scale * TREE.logprobs(TEACHER) + (1 - scale) * TREE.logprobs(REFERENCE)


def local(scale: float) -> Tensor:
    """[N]: log-probability of every answer, normalised in every state."""
    return TREE.at_tokens(extrapolated(scale).log_softmax(-1)).sum(-1)


def tilted(scale: float) -> Tensor:
    """[N]: log-probability of every answer, normalised over answers."""
    return TREE.at_tokens(extrapolated(scale)).sum(-1).log_softmax(0)


def kl(loga: Tensor, logb: Tensor) -> float:
    return max(0.0, float((loga.exp() * (loga - logb)).sum()))  # 0 up to rounding can come out below it


def at_rest(scale: float, discount: float) -> Tensor:
    """[N]: log-probability of every answer where descent for the reward lambda log(q / m) - log(p / m) ends."""

    def field(table: Tensor) -> Tensor:
        return oracle.return_field(TREE, table, extrapolated(scale) - TREE.logprobs(table), discount)

    return TREE.answer_logprobs(oracle.fixed_point(field, START, tolerance=1e-11))


def distances() -> dict[tuple[float, float], tuple[float, float]]:
    """(lambda, discount) to the KL, in nats, of what is reached to the local and to the sequence-level target."""
    found = {}
    for scale in SCALES:
        for discount in DISCOUNTS:
            reached = at_rest(scale, discount)
            found[scale, discount] = (kl(reached, local(scale)), kl(reached, tilted(scale)))
    return found


def table(found: dict[tuple[float, float], tuple[float, float]]) -> str:
    head = " | ".join(f"discount {d:g}: to every state's | to the answers'" for d in DISCOUNTS)
    rows = [f"| lambda | {head} |", "|---:|" + "---:|" * (2 * len(DISCOUNTS))]
    for scale in SHOWN:
        cells = [shown(value) for d in DISCOUNTS for value in found[scale, d]]
        rows.append(f"| {scale:g} | {' | '.join(cells)} |")
    return "\n".join(rows)


def shown(value: float) -> str:
    return "0" if value < 1e-9 else f"{value:.4f}"


def picture(found: dict[tuple[float, float], tuple[float, float]]) -> str:
    top = 1.1 * max(max(pair) for pair in found.values())
    panels = []
    for discount in DISCOUNTS:
        lines = [
            Line(
                name=name,
                points=[(scale, found[scale, discount][i]) for scale in SCALES],
                colour=i,
                dashed=bool(i),
            )
            for i, name in enumerate(("to the target of every state", "to the target over answers"))
        ]
        panels.append(
            Panel(
                title=f"Discount {discount:g}",
                x_label="lambda",
                y_label="KL from what is reached, nats",
                lines=lines,
                x=(SCALES[0], SCALES[-1]),
                y=(0.0, top),
            )
        )
    return figure("Distance of what is reached to the local and the sequence-level target, by lambda", panels)
