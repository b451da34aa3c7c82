"""Registration of an opaque operator under `torch.ops.steep`: schema, CPU reference, CUDA kernels, fake (shapes).

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
    """Define `steep::name` with `schema` (functional: no argument is written) and return it, ready to be called.

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
