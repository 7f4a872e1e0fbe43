"""Launching the Triton kernels: rows of logits as the product left them, and what is read from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from opd.config.shapes import (
    ClippedKL,
    JensenShannon,
    ReverseKL,
    Shape,
    SkewForwardKL,
    SkewReverseKL,
    TanhKL,
    TotalVariation,
    VerifierGatedKL,
)
from opd.objectives.kernels.triton_kernels import (
    compare_kernel,
    field_kernel,
    finish_kernel,
    logprobs_kernel,
    mix_kernel,
    summary_kernel,
)
from opd.objectives.tanh_value import tanh_tables
from opd.types import Head

WIDEST = 2048  # entries that a program holds at once
WARPS = 8


class Logits:
    """Logits of R rows before bias, scale, softcap, order and temperature, and the log-probabilities they stand for.

    raw_RV   the product of states and head, any float dtype; rows lie `stride(0)` apart.
    head     of which everything but the weight is read.
    token_R  int64; the tokens whose log-probabilities are asked for.
    """

    def __init__(self, raw_RV: Tensor, head: Head, temperature: float, token_R: Tensor) -> None:
        self.raw_RV, self.head, self.temperature = raw_RV, head, temperature
        self._token_R = token_R.contiguous()

    @cached_property
    def summary(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32 [R] each: logsumexp, log-probability of the token, entropy in nats."""
        logsumexp_R, drawn_R, entropy_R = (
            torch.empty(len(self.raw_RV), dtype=torch.float32, device=self.raw_RV.device) for _ in range(3)
        )
        _launch(
            summary_kernel, len(self.raw_RV), self.vocab_size, self.arguments(logsumexp=False),
            token_ptr=self._token_R, logsumexp_ptr=logsumexp_R, drawn_ptr=drawn_R, entropy_ptr=entropy_R,
        )  # fmt: skip
        return logsumexp_R, drawn_R, entropy_R

    @property
    def vocab_size(self) -> int:
        return self.raw_RV.shape[1]

    def logprobs(self) -> Tensor:
        """float32 [R, V], written down: what terms need that are not made by these kernels."""
        into_RV = torch.empty(self.raw_RV.shape, dtype=torch.float32, device=self.raw_RV.device)
        _launch(logprobs_kernel, len(into_RV), self.vocab_size, self.arguments(), into_ptr=into_RV)
        return into_RV

    def add_to(self, mixed_MV: Tensor, *, from_K: Tensor, to_K: Tensor, share_K: Tensor) -> None:
        """Adds share x log-probabilities of rows `from_K` to rows `to_K` of a log-linear target."""
        _launch(
            mix_kernel, len(from_K), self.vocab_size, self.arguments(), into_ptr=mixed_MV,
            from_ptr=from_K.contiguous(), to_ptr=to_K.contiguous(), share_ptr=_float(share_K),
        )  # fmt: skip

    def arguments(self, prefix: str = "", *, logsumexp: bool = True) -> dict[str, Any]:
        """What `triton_kernels.entry` takes, and the logsumexp."""
        head, raw = self.head, self.raw_RV
        found = {
            "raw_ptr": raw,
            "stride": raw.stride(0),
            "bias_ptr": raw if head.bias_V is None else head.bias_V,
            "order_ptr": raw if head.order_V is None else head.order_V,
            "scale": float(head.scale),
            "softcap": 1.0 if head.softcap is None else float(head.softcap),
            "temperature": float(self.temperature),
        }
        if logsumexp:
            found["logsumexp_ptr"] = self.summary[0]
        flags = {
            "BIAS": head.bias_V is not None,
            "ORDER": head.order_V is not None,
            "SOFTCAP": head.softcap is not None,
        }
        return {prefix + name: x for name, x in found.items()} | {prefix.upper() + name: x for name, x in flags.items()}


@dataclass(frozen=True)
class Comparison:
    """A shape between rows of the student and rows of a target, pair by pair [K].

    right_K  bool; the verdict on the answer, for verifier_gated alone.
    """

    shape: Shape
    student: Logits
    target: Logits
    student_row_K: Tensor
    target_row_K: Tensor
    right_K: Tensor | None = None

    def reduce(self) -> tuple[Tensor, Tensor]:
        """float32 [K]: E_p[h], and the divergence in nats."""
        mean_K = torch.empty(len(self.student_row_K), dtype=torch.float32, device=self.student.raw_RV.device)
        value_K = torch.empty_like(mean_K)
        table, step = _table(self.shape, mean_K)
        _launch(
            compare_kernel, len(mean_K), self.student.vocab_size, self._arguments(),
            p_row_ptr=self.student_row_K.contiguous(), q_row_ptr=self.target_row_K.contiguous(),
            table_ptr=table, entries=table.shape[-1], step=step, mean_ptr=mean_K, value_ptr=value_K,
        )  # fmt: skip
        return mean_K, value_K

    def add_field(self, into_BV: Tensor, weight_K: Tensor) -> None:
        """Adds -w p h(r) at the student's rows."""
        _launch(
            field_kernel, len(weight_K), self.student.vocab_size, self._arguments(), into_ptr=into_BV,
            p_row_ptr=self.student_row_K.contiguous(), q_row_ptr=self.target_row_K.contiguous(),
            weight_ptr=_float(weight_K),
        )  # fmt: skip

    def _arguments(self) -> dict[str, Any]:
        low_K, high_K = _ends(self.shape, self.right_K, len(self.student_row_K), self.student.raw_RV.device)
        return {
            **self.student.arguments("p_"),
            **self.target.arguments("q_"),
            **_numbers(self.shape),
            "low_ptr": low_K,
            "high_ptr": high_K,
        }

    def spread(self, weight_K: Tensor) -> dict[str, Any]:
        """The same as arguments for a pass over all of the student's rows; weight 0 where there is no pair."""
        rows = len(self.student.raw_RV)
        low_K, high_K = _ends(self.shape, self.right_K, len(weight_K), weight_K.device)

        def over_rows(values_K: Tensor) -> Tensor:
            return values_K.new_zeros(rows).index_copy_(0, self.student_row_K, values_K)

        return {
            **self.target.arguments("q_"),
            **_numbers(self.shape),
            "q_row_ptr": over_rows(self.target_row_K),
            "low_ptr": over_rows(low_K),
            "high_ptr": over_rows(high_K),
            "weight_ptr": over_rows(_float(weight_K)),
        }


def finish(
    student: Logits,
    *,
    along_B: Tensor,
    drawn_B: Tensor,
    token_B: Tensor,
    other_BV: Tensor | None,
    field: tuple[Comparison, Tensor] | None,
) -> None:
    """Replaces the student's raw logits by the gradient with respect to them, as `triton_kernels.finish_kernel` says.

    field  a comparison and its weights [K], whose -w p h(r) is made here and needs no array.
    """
    if field is None:
        compared = {
            **student.arguments("q_"), **_numbers(ReverseKL()),
            "q_row_ptr": token_B, "low_ptr": along_B, "high_ptr": along_B, "weight_ptr": along_B,
        }  # fmt: skip
    else:
        compared = field[0].spread(field[1])
    _launch(
        finish_kernel, len(student.raw_RV), student.vocab_size, {**student.arguments("p_"), **compared},
        along_ptr=_float(along_B), drawn_ptr=_float(drawn_B), token_ptr=token_B.contiguous(),
        other_ptr=along_B if other_BV is None else other_BV, FIELD=field is not None, OTHER=other_BV is not None,
    )  # fmt: skip


def _launch(kernel: Any, rows: int, V: int, arguments: dict[str, Any], **more: Any) -> None:
    if rows:
        kernel[(rows,)](**arguments, **more, V=V, BLOCK=min(WIDEST, 1 << (V - 1).bit_length()), num_warps=WARPS)


def _float(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous()


def _numbers(shape: Shape) -> dict[str, Any]:
    """The numbers a, b, c of a shape, and its name among the kernels' shapes."""
    a = b = c = 0.0
    kind = "clipped" if isinstance(shape, VerifierGatedKL) else shape.kind
    match shape:
        case JensenShannon(beta=beta, normalised=normalised):
            a, b = beta, 1.0 / (beta * (1.0 - beta)) if normalised else 1.0
        case SkewForwardKL(alpha=alpha) | SkewReverseKL(alpha=alpha):
            a = alpha
        case TotalVariation(dead_zone=zone):
            a, b, c = zone, math.exp(zone), math.exp(-zone)
        case TanhKL(scale=scale):
            a = scale
    return {"a": a, "b": b, "c": c, "SHAPE": kind}


def _ends(shape: Shape, right_K: Tensor | None, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 [K]: the ends to which a clipped shape holds log r."""
    low, high = -math.inf, math.inf
    if isinstance(shape, VerifierGatedKL):
        if right_K is None:
            raise ValueError("the shape verifier_gated needs the verdict on every answer (right), but there is none")
        zero_K = torch.zeros(rows, device=device)
        return torch.where(right_K, zero_K, low), torch.where(right_K, high, zero_K)
    if isinstance(shape, ClippedKL):
        low = low if shape.low is None else shape.low
        high = high if shape.high is None else shape.high
    return torch.full((rows,), low, device=device), torch.full((rows,), high, device=device)


def _table(shape: Shape, like: Tensor) -> tuple[Tensor, float]:
    """float32 [4, entries] and the step between entries; for shapes without a table, something of that form."""
    if not isinstance(shape, TanhKL):
        return like[:1], 1.0
    return _tanh_table(shape.scale, like.device)


@lru_cache(maxsize=8)
def _tanh_table(scale: float, device: torch.device) -> tuple[Tensor, float]:
    step, above_2I, below_2I = tanh_tables(scale)
    return torch.cat([above_2I, below_2I]).to(device, torch.float32).contiguous(), step
