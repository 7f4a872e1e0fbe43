"""Where descent along a field ends.

Pseudo-transient continuation (Kelley and Keyes, SIAM J. Numer. Anal. 35, 1998): implicit steps along the flow
dz/dt = -field(z), with a time step that grows as the field shrinks. Far away it follows the flow, so it ends where
gradient descent ends and not in some other zero; close by it is Newton's method.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fixed_point(
    field: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    tolerance: float = 1e-13,
    first_step: float = 1.0,
    most_steps: int = 2000,
) -> Tensor:
    """The table where the flow along minus `field` from `start` comes to rest; same shape as `start`, float64.

    field       differentiable, from a table to the gradient to descend, of the same shape. It need not be the gradient
                of anything.
    tolerance   largest entry of the field that counts as rest.
    Raises ArithmeticError when it does not come to rest.
    """
    z = start.detach().clone()
    value = field(z).detach()
    norm = value.norm()
    step = first_step
    eye = torch.eye(z.numel(), dtype=z.dtype)
    for _ in range(most_steps):
        if value.abs().max() <= tolerance:
            return z
        jacobian = torch.autograd.functional.jacobian(field, z).reshape(z.numel(), z.numel())
        move = torch.linalg.solve(eye / step + jacobian, -value.flatten()).view_as(z)
        trial = field(z + move).detach()
        growth = norm / trial.norm()
        if not trial.isfinite().all() or growth < 0.5:  # stepped over something: the flow does not do that
            step /= 4
            continue
        z, value, norm = z + move, trial, trial.norm()
        step *= min(float(growth), 4.0) if growth > 1 else 1.0
    raise ArithmeticError(
        f"no fixed point after {most_steps} steps: the field's largest entry is {value.abs().max():.2g}, not "
        f"{tolerance:.0e}; start closer, or allow more"
    )
