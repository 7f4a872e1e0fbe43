"""Which code makes the pass over a micro-batch: plain torch (`tiled.py`) or Triton kernels (`triton.py`).

Both give the same numbers up to float32 rounding. Triton is imported here alone, and only when it is to be used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from opd.config.objective import DataTerm, DivergenceTerm
from opd.errors import ConfigError
from opd.objectives.kernels.rows import TermRows, TokenRows, TokenValues
from opd.objectives.kernels.tiled import tiled_look, tiled_loss
from opd.types import Head, ScorerRows

PACKAGE = "triton"
INTERPRETER = "TRITON_INTERPRET"  # set to 1, Triton runs its kernels on the host, slowly: for tests
TOLERANCE = 1e-4  # of a gradient's norm, in the trial of a device: float32 rounding is far below, a fault far above
TRIAL_SEED, TRIAL_TOKENS, TRIAL_VOCAB, TRIAL_WIDTH = 0, 24, 1000, 32


LossPass = Callable[..., tuple[Tensor, TokenValues]]
LookPass = Callable[..., TokenValues]


@dataclass(frozen=True)
class Kernel:
    """The pass with a gradient, called as `tiled_loss` is, and without one, called as `tiled_look` is.

    note  why it is not the one that this device would have; None: it is, or was asked for.
    """

    name: Literal["tiled", "triton"]
    loss: LossPass
    look: LookPass
    note: str | None = None


TILED = Kernel("tiled", tiled_loss, tiled_look)


def check_kernel(asked: str) -> None:
    """Raises ConfigError when `learner.kernel` names Triton and it is not installed. Imports nothing of it."""
    if asked == "triton" and find_spec(PACKAGE) is None:
        raise ConfigError(
            f"learner.kernel=triton needs the package {PACKAGE}, which is not installed: "
            f"pip install 'opd[{PACKAGE}]', or take learner.kernel=auto"
        )


def choose_kernel(asked: Literal["auto", "tiled", "triton"], device: torch.device) -> Kernel:
    """The kernel for a student on this device. "auto": Triton on CUDA where it is installed and works, else torch.

    Before Triton is used on a CUDA device it is tried on a small problem, and has to give what torch gives.
    Raises ConfigError when Triton is asked for by name and cannot be had.
    """
    if asked == "tiled":
        return TILED
    if asked == "auto":
        if device.type != "cuda" or find_spec(PACKAGE) is None:
            return TILED
        fault = fault_of(device)
        if fault is None:
            return _triton()
        return replace(TILED, note=f"learner.kernel: tiled, as triton does not work here: {fault}")
    check_kernel(asked)
    if device.type != "cuda" and os.environ.get(INTERPRETER) != "1":
        raise ConfigError(
            f"learner.kernel=triton needs a CUDA device, and student.device is {device.type}: take learner.kernel=auto"
        )
    fault = fault_of(device)
    if fault is not None:
        raise ConfigError(f"learner.kernel=triton does not work on this device: {fault}. Take learner.kernel=tiled")
    return _triton()


@cache
def fault_of(device: torch.device) -> str | None:
    """What is wrong with the Triton kernels on this device, tried once in a process; None: nothing."""
    try:
        ours, theirs = _trial(TILED, device), _trial(_triton(), device)
    except Exception as error:  # a compiler, a driver: whatever it is, training goes on without it
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    for name, expected in ours.items():
        far = float((theirs[name] - expected).norm() / expected.norm())
        if not far <= TOLERANCE:
            return f"its {name} is {far:.1e} of the norm away from that of tiled, where {TOLERANCE:g} is allowed"
    return None


def _triton() -> Kernel:
    from opd.objectives.kernels.triton import triton_look, triton_loss

    return Kernel("triton", triton_loss, triton_look)


def _trial(kernel: Kernel, device: torch.device) -> dict[str, Tensor]:
    """Loss and gradients of a full-vocabulary term and one on drawn tokens."""
    generator = torch.Generator().manual_seed(TRIAL_SEED)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    hidden_TD, weight_VD = numbers(TRIAL_TOKENS, TRIAL_WIDTH), numbers(TRIAL_VOCAB, TRIAL_WIDTH)
    teacher_TD, teacher_VD = numbers(TRIAL_TOKENS, TRIAL_WIDTH), numbers(TRIAL_VOCAB, TRIAL_WIDTH)
    hidden_TD.requires_grad_()
    weight_VD.requires_grad_()
    token_T = torch.randint(TRIAL_VOCAB, (TRIAL_TOKENS,), generator=generator).to(device)
    one_T = torch.ones(TRIAL_TOKENS, device=device)
    terms = [
        TermRows(DivergenceTerm(name="whole"), one_T, {"teacher": one_T}, unit=True),
        TermRows(DataTerm(name="drawn"), one_T, {}, unit=True),
    ]
    teacher = ScorerRows("teacher", one_T.bool(), 1.0, hidden_TD=teacher_TD, head=Head(teacher_VD, TRIAL_VOCAB))
    with torch.enable_grad():
        loss, _ = kernel.loss(
            hidden_TD,
            Head(weight_VD, TRIAL_VOCAB),
            TokenRows(token_T, one_T),
            terms,
            [teacher],
            student_temperature=1.0,
            chunk_tokens=TRIAL_TOKENS,
        )
        loss.backward()
    assert hidden_TD.grad is not None and weight_VD.grad is not None
    return {"loss": loss.detach(), "hidden gradient": hidden_TD.grad, "head gradient": weight_VD.grad}
