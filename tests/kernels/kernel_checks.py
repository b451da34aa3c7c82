"""The standard that kernels are held to: float64 autograd of the plain formula, and the error of bf16 eager code."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch

FP32_BOUND = 2e-6  # relative error of a whole tensor


def kernel_module(name: str):
    """The module `steep.kernels.<name>`; the package's attribute of that name is the function."""
    return importlib.import_module(f"steep.kernels.{name}")


def gradients(function: Callable, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and input gradients of `function` in `dtype`; cotangents are fixed random bf16 numbers, 1 for a loss."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    cotangents = [
        torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) if o.ndim else torch.ones_like(o)
        for o in outputs
    ]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, cotangents)]


def errors(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> list[float]:
    """Relative error per tensor (absolute where the true tensor vanishes)."""
    scale = [w.double().norm().item() for w in want]
    return [(g.double() - w.double()).norm().item() / (s if s > 1e-12 else 1.0) for g, w, s in zip(got, want, scale)]


def check(function: Callable, formula: Callable, eager: Callable, inputs: Sequence[torch.Tensor], dtype: torch.dtype):
    """fp32: within FP32_BOUND of float64. bf16: no further from float64 than `eager`, as transformers computes it."""
    inputs = [x.to(dtype) for x in inputs]
    want = gradients(formula, inputs, torch.float64)
    got = gradients(function, inputs, dtype)
    bounds = [FP32_BOUND] * len(want)
    if dtype == torch.bfloat16:
        bounds = errors(gradients(eager, inputs, dtype), want)
    for index, (error, bound) in enumerate(zip(errors(got, want), bounds, strict=True)):
        # 1 %: where both round alike, single elements still fall to either side of a rounding boundary.
        assert error <= 1.01 * bound + 1e-7, f"tensor {index}: error {error:.3g}, bound {bound:.3g}"
