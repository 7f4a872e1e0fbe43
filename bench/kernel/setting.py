"""What the pass over the vocabulary is measured on, and the truth about it. Imports nothing of opd."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gate import Gate, forget_the_peak, held_megabytes, peak_megabytes
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLICE = 64  # tokens that are also taken in float64: both heads stand there once more, twice as wide


@dataclass(frozen=True)
class Sizes:
    """tokens T, vocab V, widths D of student and teacher; chunk: tokens at a time, where a pass has a choice."""

    tokens: int = 1024
    vocab: int = 151_936
    student_width: int = 512
    teacher_width: int = 1024
    chunk: int = 512

    def arguments(self) -> list[str]:
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]


@dataclass
class Inputs:
    """Random models of logits about N(0, 1), the same numbers in every process; gradients go to the first two."""

    hidden_TD: Tensor
    weight_VD: Tensor
    teacher_TD: Tensor
    teacher_VD: Tensor

    @classmethod
    def random(cls, sizes: Sizes, dtype: torch.dtype) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, width: int, scale: float) -> Tensor:
            return torch.randn(rows, width, generator=generator).mul_(scale).to(dtype)

        T, V, D_s, D_t = sizes.tokens, sizes.vocab, sizes.student_width, sizes.teacher_width
        return cls(
            normal(T, D_s, 1.0).requires_grad_(),
            normal(V, D_s, D_s**-0.5).requires_grad_(),
            normal(T, D_t, 1.0),
            normal(V, D_t, D_t**-0.5),
        )

    def first(self, tokens: int) -> Inputs:
        """The same models at the first tokens alone."""
        hidden_TD = self.hidden_TD.detach()[:tokens].clone().requires_grad_()
        return Inputs(hidden_TD, self.weight_VD, self.teacher_TD[:tokens], self.teacher_VD)

    def forget(self) -> None:
        self.hidden_TD.grad = self.weight_VD.grad = None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """[T, D] and [V, D], of the hidden states and of the head."""
        assert self.hidden_TD.grad is not None and self.weight_VD.grad is not None
        return self.hidden_TD.grad, self.weight_VD.grad


Loss = Callable[[Inputs], Tensor]  # mean of the reverse KL over tokens, differentiable


def exact(inputs: Inputs) -> tuple[float, tuple[Tensor, Tensor]]:
    """Loss and gradients in float64, of the numbers as they are."""
    hidden_TD, weight_VD, teacher_TD, teacher_VD = (
        x.detach().double() for x in (inputs.hidden_TD, inputs.weight_VD, inputs.teacher_TD, inputs.teacher_VD)
    )
    log_p_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
    gap_TV = log_p_TV - (teacher_TD @ teacher_VD.T).log_softmax(-1)
    p_TV = log_p_TV.exp()
    value_T1 = (p_TV * gap_TV).sum(-1, keepdim=True)
    dlogits_TV = p_TV * (gap_TV - value_T1) / len(hidden_TD)
    return float(value_T1.mean()), (dlogits_TV @ weight_VD, dlogits_TV.T @ hidden_TD)


def errors(loss: Loss, inputs: Inputs) -> dict[str, float]:
    """How far a pass is from float64 on the first tokens, relative to the loss and to the norm of the gradients."""
    few = inputs.first(min(SLICE, len(inputs.hidden_TD)))
    expected, gradients = exact(few)
    few.forget()
    made = loss(few)
    made.backward()
    pairs = list(zip(few.gradients(), gradients, strict=True))
    off = sum(float((mine.double() - true).square().sum()) for mine, true in pairs) ** 0.5
    size = sum(float(true.square().sum()) for _, true in pairs) ** 0.5
    few.forget()
    return {"loss_error": abs(made.item() - expected) / expected, "gradient_error": off / size}


def worker(loss: Loss, inputs: Inputs) -> None:
    """One side of the comparison: it is held against float64, warms up, is looked at for its memory, and is then timed.

    What it holds at the peak is counted above inputs; gradients belong to it.
    """

    def once() -> None:
        inputs.forget()
        loss(inputs).backward()

    gate = Gate()
    gate.wait()
    facts: dict[str, Any] = errors(loss, inputs)
    torch.compiler.reset()  # what is compiled next is compiled for one shape, as if there had been no other
    once()
    facts["megabytes"] = _peak_of(once, inputs)
    gate.wait(**facts)
    while True:
        once()
        gate.wait(**facts)


def _peak_of(work: Callable[[], None], inputs: Inputs) -> float:
    inputs.forget()
    give_back()
    before = held_megabytes()
    forget_the_peak()
    work()
    return peak_megabytes() - before


def give_back() -> None:
    """What was freed goes back to the system, as far as the C library can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
