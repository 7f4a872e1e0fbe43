"""How a loss function takes the mean over tokens and answers, found out from its gradients alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objectives.audit.calling import LossFunction, answer, call, gradient, masked, together
from opd.objectives.oracle.tabular import Tree

SAME = 1e-4  # relative difference below which two factors count as equal: float32 inside a function is no finding


@dataclass(frozen=True)
class Averaging:
    """How the mean is taken, and what that does.

    name          in words.
    per_token     the function leaves the mean to its caller.
    by_length     a lone answer's gradient is divided by its length; in a large batch of such calls it would not be.
    splits        whether cutting a batch into two calls changes the direction of the gradient.
    """

    name: str
    per_token: bool
    by_length: bool
    splits: bool


def averaging(loss: LossFunction, tree: Tree, student_SV: Tensor, teacher_SV: Tensor) -> Averaging:
    """Asks the function about a short and a long answer, alone and together."""
    lengths = tree.mask_NT.sum(-1)
    short, long = int(lengths.argmin()), int(lengths.argmax())
    rows = [answer(tree, n, student_SV, teacher_SV) for n in (short, long)]
    n_short, n_long = int(lengths[short]), int(lengths[long])
    if call(loss, rows[1]).dim():
        return Averaging("none: a loss per token, summed here", True, False, False)
    alone = [gradient(loss, row) for row in rows]
    both_NTV = gradient(loss, together(rows))
    factors = [_factor(both_NTV[:1, :n_short], alone[0]), _factor(both_NTV[1:, :n_long], alone[1])]
    # The last token has no future: its gradient tells the denominator, whatever credit the others get.
    last_NT = torch.zeros(1, n_long, dtype=torch.bool)
    last_NT[0, -1] = True
    last = _factor(gradient(loss, masked(rows[1], last_NT))[:, -1:], alone[1][:, -1:])
    if None in factors or last is None:
        return Averaging("cannot be told: a gradient is zero, or mixes answers", False, False, False)
    tokens, places = n_short + n_long, 2 * n_long
    known = (
        ("sum over tokens", (1.0, 1.0, 1.0), False),
        ("mean over answers of token sums", (0.5, 0.5, 1.0), False),
        ("mean over tokens of the call", (n_short / tokens, n_long / tokens, float(n_long)), True),
        ("mean over answers of their token means", (0.5, 0.5, float(n_long)), False),
        ("mean over all positions of the call, masked ones included", (n_short / places, n_long / places, 1.0), True),
    )
    seen = (factors[0], factors[1], last)
    splits = not _close(factors[0], factors[1])
    for name, wanted, by_length in known:
        if all(_close(a, b) for a, b in zip(seen, wanted, strict=True)):
            return Averaging(name, False, by_length, splits)
    return Averaging("of its own kind", False, False, splits)


def _factor(made: Tensor, of: Tensor) -> float | None:
    """c in made = c of; None when there is none."""
    size = of.square().sum()
    if not size:
        return None
    c = (made * of).sum() / size
    return float(c) if (made - c * of).norm() <= SAME * made.norm() and c else None


def _close(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) <= SAME * max(abs(a), abs(b))
