"""Compiles every Triton kernel to machine code of a CUDA device, which need not be there.

python -m tests.objectives.compile_triton SHAPE ...
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd.objectives.kernels import triton_kernels as kernels

TARGET = GPUTarget("cuda", 80, 32)
BLOCK = 256
INDICES = ("order_ptr", "token_ptr", "row_ptr", "from_ptr", "to_ptr")
WHOLE = {"V": "i32", "entries": "i32", "stride": "i64", "p_stride": "i64", "q_stride": "i64"}


def compile_kernel(kernel: Any, **constants: Any) -> None:
    """Prints its name, its constants, and the size of what came out."""

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith(INDICES):
            return "*i64"
        return "*fp32" if name.endswith("_ptr") else WHOLE.get(name, "fp32")

    signature = {name: kind(name) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=TARGET, options={"num_warps": 8})
    print(f"{kernel.fn.__name__} {constants}: cubin of {len(made.asm['cubin'])} bytes")


def main(shapes: list[str]) -> None:
    flags = ("BIAS", "ORDER", "SOFTCAP")
    one, two = dict.fromkeys(flags, True), {side + flag: True for side in ("P_", "Q_") for flag in flags}
    for kernel in (kernels.summary_kernel, kernels.logprobs_kernel, kernels.mix_kernel):
        compile_kernel(kernel, BLOCK=BLOCK, **one)
    for shape in shapes:
        for kernel in (kernels.compare_kernel, kernels.field_kernel):
            compile_kernel(kernel, SHAPE=shape, BLOCK=BLOCK, **two)
        compile_kernel(kernels.finish_kernel, SHAPE=shape, FIELD=True, OTHER=True, BLOCK=BLOCK, **two)


if __name__ == "__main__":
    main(sys.argv[1:])
