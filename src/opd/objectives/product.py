"""Products of float32 matrices on a CPU, by the faster of torch's two libraries.

torch sends float32 products to one library (MKL) and keeps another (oneDNN) for 16 bits. Measured on an AMD processor
with AVX-512, the second does 400 GFLOP/s in float32 where the first does 180, with the same rounding error; it is
reached through an operator that torch keeps for its compiler. Where a version of torch lacks it, on other devices, in
other dtypes and for small matrices the ordinary product does the same work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BLOCK = 2**22  # bytes of a result that is made before it is copied to its place: what a cache holds
FLOAT_BYTES = 4
INNER = 256  # terms of a sum that are added one after the other; rounding grows with them, and a softmax enlarges it
SMALL = 2**22  # multiplications; below it what a new shape costs at its first use is more than what it saves


def faster(left_MK: Tensor, right_NK: Tensor) -> bool:
    """Whether `product` takes another way than torch for left @ right.T."""
    return (
        HAS_ONEDNN
        and left_MK.dtype == right_NK.dtype == torch.float32
        and left_MK.device.type == right_NK.device.type == "cpu"
        and left_MK.numel() * right_NK.shape[0] >= SMALL
    )


def product(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """left @ right.T of two matrices of one dtype, without a gradient."""
    if not faster(left_MK, right_NK):
        return left_MK @ right_NK.T
    return torch.ops.mkldnn._linear_pointwise(_plain(left_MK), _plain(right_NK), None, "none", [], "")


def product_into(left_MK: Tensor, right_NK: Tensor, into_MN: Tensor) -> Tensor:
    """`product`, written into memory that is there already, which may be wider than the product's dtype.

    A product that is not made in place is made in blocks of columns: what the system asks for fresh pages is more than
    a copy of a block costs that the cache holds. Its sums are taken in parts of INNER terms: measured on logits over
    150,000 entries with 512 and 1024 terms, the gradient of a divergence is then 1.8 times as exact, and the product
    takes a tenth longer.
    """
    if not faster(left_MK, right_NK):
        if into_MN.dtype == left_MK.dtype:
            return torch.mm(left_MK, right_NK.T, out=into_MN)
        lefts = (left_MK,)
    else:
        lefts = tuple(part.contiguous() for part in left_MK.split(INNER, 1))
    for columns in column_blocks(*into_MN.shape, share=min(2, len(lefts))):
        rights = (right_NK[columns],) if len(lefts) == 1 else right_NK[columns].split(INNER, 1)
        first, *others = (product(left, right.contiguous()) for left, right in zip(lefts, rights, strict=True))
        for other in others:
            first += other
        into_MN[:, columns] = first
    return into_MN


def column_blocks(rows: int, columns: int, *, share: int = 1) -> Iterator[slice]:
    """Parts of a float32 [rows, columns] that are small enough to be kept when they are freed; of BLOCK / share."""
    width = max(1, BLOCK // (FLOAT_BYTES * share * rows))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))


def _plain(matrix: Tensor) -> Tensor:
    """Rows or columns one after the other: any other layout is multiplied a hundred times slower."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, differentiable once in all three.

    x  [..., K]; the result is [..., N].
    """
    if weight_NK.dim() != 2 or not faster(x.reshape(-1, x.shape[-1]), weight_NK):
        return F.linear(x, weight_NK, bias_N)
    made = _Linear.apply(x, weight_NK)
    return made if bias_N is None else made + bias_N


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return product(x.reshape(-1, x.shape[-1]), weight_NK).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight_NK = ctx.saved_tensors
        out_MN = outputs[0].reshape(-1, weight_NK.shape[0])
        dx = dweight_NK = None
        if ctx.needs_input_grad[0]:
            dx = product(out_MN, weight_NK.T).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dweight_NK = product(out_MN.T, x.reshape(-1, x.shape[-1]).T)
        return dx, dweight_NK


class FasterLinear(TorchFunctionMode):
    """While it is on, every linear layer in float32 is `linear`: for models whose code is not ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not torch.is_autocast_enabled("cpu"):
            with torch._C.DisableTorchFunction():
                return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
