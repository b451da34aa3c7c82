"""What every Triton kernel of this folder shares: the launcher, and casts that are right both compiled and interpreted.

The house rule (Triton's CPU interpreter, up to 3.9 at least, computes wrongly on bf16 and truncates when it converts to
it): load and convert to fp32 first; all arithmetic, reductions and comparisons in fp32; `cast` before every store;
`operand` for every argument of `tl.dot`; no inline assembly, no atomics. A kernel written so gives the same numbers in
both worlds, and `launch` lets one process use both: compiled for CUDA tensors (or ahead of time), interpreted for CPU
tensors, whatever TRITON_INTERPRET says.

Without triton installed `kernel` leaves plain functions behind, which nothing calls: CPU tensors take the torch
references. May touch: torch, triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

try:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction
except ImportError:  # a CPU-only installation
    tl = JITFunction = None


def kernel(fn: Callable) -> Any:
    """Decorator of every Triton function here: `triton.jit` that never turns into an interpreter-only object."""
    return fn if JITFunction is None else JITFunction(fn)


def launch(fn: Any, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 3, **constexprs) -> None:
    """Run `fn` over `grid`: compiled if the first argument is a CUDA tensor, interpreted if it is on the CPU (tests).

    fp fusion is pinned: triton's default for it changes with 3.10, and with it the last bits of every result.
    """
    if args[0].is_cuda:
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        with torch.cuda.device_of(args[0]):
            fn[grid](*args, INTERPRET=False, **options, **constexprs)
    else:
        # Device functions, triton's own (tl.sum) among them, are JITFunctions too: here a call interprets them. What
        # that leaves patched in triton's library is put back, or nothing could be compiled afterwards.
        with patch.object(JITFunction, "__call__", _interpret_device_function), patch.dict(vars(tl.core)):
            _interpreted(fn.fn)[grid](*args, INTERPRET=True, **constexprs)


def _interpret_device_function(jit_function: Any, *args, **kwargs):
    interpreted = _interpreted(jit_function.fn)
    if not jit_function.module.startswith("triton."):
        interpreted = interpreted.rewrite()  # our `tl` is already the interpreter's: not patched a second time
    return interpreted(*args, **kwargs)


@cache
def _interpreted(fn: Callable) -> Any:
    return InterpretedFunction(fn)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, columns] with unit stride along the columns; a copy only where it has another."""
    return x if x.stride(1) == 1 else x.contiguous()


def persistent_programs(x: torch.Tensor, per_sm: int) -> int:
    """Programs of a grid that fills the GPU `per_sm` times; a small odd number in the interpreter."""
    if x.is_cuda:
        return per_sm * torch.cuda.get_device_properties(x.device).multi_processor_count
    return 3


@kernel
def cast(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 `x` as `dtype`, rounded to nearest even; the interpreter truncates to bf16, so it rounds the bits first."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@kernel
def round_to(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 `x`, rounded to `dtype`: where transformers' eager code rounds and we need not."""
    return cast(x, dtype, INTERPRET).to(tl.float32)


@kernel
def operand(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """`x`, of any dtype, as an argument of `tl.dot` in `dtype`; the interpreter's dot is exact in fp32 only."""
    if INTERPRET:
        return cast(x.to(tl.float32), dtype, INTERPRET).to(tl.float32)
    return x.to(dtype)
