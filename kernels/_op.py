"""Registration of an opaque operator under `torch.ops.steep` (schema, CPU reference, CUDA kernels, fake), and the
checks that every public function makes of its arguments.

Every kernel file of this folder registers its forward and backward here and wraps them in a `torch.autograd.Function`
of fixed arity *outside* the operator: that is the cheapest form (no autograd registered in Python per call) and the one
`torch.compile` traces through while the operator itself stays one opaque node. May touch: torch.library.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def define_op(
    name: str,
    schema: str,
    *,
    cpu: Callable,
    fake: Callable,
    cuda: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define `steep::name` with `schema` and return it, ready to be called.

    Arguments that the operator writes are marked in the schema, "(Tensor(a!) x) -> ()"; results never alias arguments.
    `cuda=None` says that the same Python body serves both devices.
    """
    qualname = f"steep::{name}"
    torch.library.define(qualname, schema)
    torch.library.impl(qualname, "cpu", cpu)
    torch.library.impl(qualname, "cuda", cuda or cpu)
    torch.library.register_fake(qualname, fake)
    return getattr(torch.ops.steep, name).default


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in: fp32 for bf16, fp16 and fp32; fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def float_dtypes(x: torch.Tensor) -> tuple[torch.dtype, ...]:
    """What a kernel computes with where x is: Triton's arithmetic is fp32, the references' fp64 too."""
    narrow = torch.bfloat16, torch.float16, torch.float32
    return narrow if x.is_cuda else (*narrow, torch.float64)


def check_tensor(
    argument: str,
    x: torch.Tensor,
    shape: tuple[int | None, ...] | None = None,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    like: torch.Tensor | None = None,
) -> None:
    """Refuse an argument that is not what a kernel takes.

    Args:
        argument: "function: name", as the message begins.
        shape: expected sizes, None for any; None as a whole: any shape.
        dtype: the one that is allowed, or several; None: `like`'s if given, else any.
        like: a tensor on the device where x must be.

    Raises:
        ValueError: naming the argument, what it is and what is allowed.
    """
    if shape is not None and (
        x.ndim != len(shape) or any(want is not None and size != want for size, want in zip(x.shape, shape))
    ):
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{argument} has shape {tuple(x.shape)}; expected ({sizes})")
    if dtype is None and like is not None:
        dtype = like.dtype
    if dtype is not None and x.dtype not in (allowed := dtype if isinstance(dtype, tuple) else (dtype,)):
        raise ValueError(f"{argument} is {x.dtype}; allowed: {', '.join(map(str, allowed))}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{argument} is on {x.device}; expected {like.device}")
