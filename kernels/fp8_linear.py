"""Linear layer with float8 operands: y = x W^T + b, its three GEMMs on Hopper's fp8 tensor cores, twice bf16's rate.

    y [T, N] = x8 W8^T          both scaled along K
    dx [T, K] = dy8 W8          both scaled along N: W cast transposed
    dW [N, K] = dy8^T x8        both scaled along T: dy and x cast transposed

`recipe` "blockwise": 1 x 128 groups for x and dy, 128 x 128 for W; "rowwise": whole rows (see fp8.py). Parameters,
results and gradients keep their dtype; sums are fp32, rounded once.

Floor: 2 T K N FLOPs for each GEMM, and the casts: 4 bytes per element of x and dy (both copies in one read), 3 of W in
forward and 3 in backward ("rowwise" 6, 5 and 5). At T = 16384, K = 3584, N = 18944 the GEMMs are 6.7 TFLOP, 3.4 ms at
1979 TFLOP/s, the casts 1.9 GB, 0.6 ms. Saved: x as its transposed fp8 copy, half the bytes of bf16, and W itself: W is
cast again in backward, for its fp8 copies kept until then would be one more byte per parameter of the whole model.

Error: an operand is off by a random 2.7 % (rms), so a product of two by 3.8 %, and so is a sum of such products, as
far as they are independent, whatever its length: the relative error of y, dx and dW as whole tensors. Never more than
(2^-3 + 2^-8) sum |x| |w|, but for underflow. On a CPU: the same operands, dequantised and multiplied in fp32.
Sources: DeepSeek-V3, arXiv:2412.19437, section 3.3; torch.nn.functional.scaled_mm. May touch: torch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._op import check_tensor, define_op
from .fp8 import dequantise, fp8_cast

# Scaling of an activation or gradient, and of a weight.
_RECIPES = {"blockwise": ("1x128", "128x128"), "rowwise": ("rowwise", "rowwise")}

# --- the GEMM: a8 [M, K] b8 [N, K]^T -> [M, N] -----------------------------------------------------------------------


def _mm_emulated(
    a8: torch.Tensor, scale_a: torch.Tensor, b8: torch.Tensor, scale_b: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, scaling: str, fast_accum: bool,
) -> torch.Tensor:  # fmt: skip
    """On any device; scaling, that of b8, and fast_accum make no difference."""
    y = torch.mm(dequantise(a8, scale_a), dequantise(b8, scale_b).t())
    return (y if bias is None else y.add_(bias)).to(dtype)


def _mm_cublas(
    a8: torch.Tensor, scale_a: torch.Tensor, b8: torch.Tensor, scale_b: torch.Tensor,
    bias: torch.Tensor | None, dtype: torch.dtype, scaling: str, fast_accum: bool,
) -> torch.Tensor:  # fmt: skip
    if not (a8.numel() and b8.numel()):
        return _mm_emulated(a8, scale_a, b8, scale_b, bias, dtype, scaling, fast_accum)
    kinds = {
        "rowwise": F.ScalingType.RowWise,
        "1x128": F.ScalingType.BlockWise1x128,
        "128x128": F.ScalingType.BlockWise128x128,
    }
    # cuBLAS adds a bf16 bias before it rounds to bf16; to fp32 it adds none.
    fused = bias.to(dtype) if bias is not None and dtype == torch.bfloat16 else None
    y = F.scaled_mm(
        a8,
        b8.t(),
        scale_a,
        kinds["rowwise" if scaling == "rowwise" else "1x128"],
        scale_b if scaling == "1x128" else scale_b.t(),
        kinds[scaling],
        bias=fused,
        output_dtype=dtype,
        use_fast_accum=fast_accum,
    )
    return y if bias is None or fused is not None else y.add_(bias)


_fp8_mm_op = define_op(
    "fp8_mm",
    "(Tensor a8, Tensor scale_a, Tensor b8, Tensor scale_b, Tensor? bias, ScalarType dtype, str scaling,"
    " bool fast_accum) -> Tensor",
    cpu=_mm_emulated,
    cuda=_mm_cublas,
    fake=lambda a8, scale_a, b8, scale_b, bias, dtype, scaling, fast_accum: a8.new_empty(
        a8.shape[0], b8.shape[0], dtype=dtype
    ),
)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, recipe: str, fast_accum: bool, need_dx: bool, need_dw: bool) -> torch.Tensor:
        scaling_x, scaling_w = _RECIPES[recipe]
        x8, scale, xt8, scale_t = fp8_cast(x, scaling_x, columns=need_dw)
        w8, scale_w, _, _ = fp8_cast(weight, scaling_w, columns=False)
        ctx.save_for_backward(xt8, scale_t, weight if need_dx else None)
        ctx.recipe, ctx.shape, ctx.dtypes = recipe, weight.shape, (x.dtype, weight.dtype)
        if bias is not None:
            bias = F.pad(bias, (0, w8.shape[0] - bias.shape[0]))
        y = _fp8_mm_op(x8, scale, w8, scale_w, bias, x.dtype, scaling_w, fast_accum)
        return _unpadded(y, x.shape[0], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        xt8, x_scale, weight = ctx.saved_tensors
        scaling_x, scaling_w = _RECIPES[ctx.recipe]
        need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
        dy8, scale, dyt8, scale_t = fp8_cast(dy, scaling_x, rows=need_dx, columns=need_dw)
        dx = dw = None
        if need_dx:
            _, _, wt8, scale_w = fp8_cast(weight, scaling_w, rows=False)
            dx = _fp8_mm_op(dy8, scale, wt8, scale_w, None, ctx.dtypes[0], scaling_w, False)
            dx = _unpadded(dx, dy.shape[0], ctx.shape[1])
        if need_dw:
            dw = _fp8_mm_op(dyt8, scale_t, xt8, x_scale, None, ctx.dtypes[1], scaling_x, False)
            dw = _unpadded(dw, *ctx.shape)
        return dx, dw, dy.sum(0) if need_db else None, None, None, None, None


def _unpadded(y: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The part of y that was asked for: a copy where something was padded, as a view could not be changed in place by
    whoever gets it (`rope_qkv` does)."""
    return y if y.shape == (rows, columns) else y[:rows, :columns].clone()


# --- public ----------------------------------------------------------------------------------------------------------


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    recipe: Literal["blockwise", "rowwise"] = "blockwise",
    fast_accum: bool = False,
) -> torch.Tensor:
    """y [..., N] = x [..., K] weight [N, K]^T + bias [N], both operands in float8 e4m3, y in x's dtype.

    x, weight and bias in bf16 or fp32, each with a dtype of its own; sizes need not be multiples of anything (they are
    padded to multiples of 128; at those nothing is copied). dx comes in x's dtype, dW in weight's, from fp32 sums.
    recipe: "blockwise" casts in one read, and an outlier can take precision from its own group of 128 only; compute
        capability 9.0 (H100, H200) with torch for CUDA 12.9 or later. "rowwise": capability 8.9 and up. The two are
        equally exact as long as the largest element of a row is below 2^14 times the typical one.
    fast_accum: let the forward ("rowwise" only) add up inside the tensor cores, with fewer bits than fp32, without
        moving sums to fp32 registers on the way: faster, less exact. The gradients never do.

    Raises:
        ValueError: naming the argument that is wrong, or what the GPU lacks.
    """
    if recipe not in _RECIPES:
        raise ValueError(f"fp8_linear: recipe is {recipe!r}; allowed: {', '.join(_RECIPES)}")
    if fast_accum and recipe != "rowwise":
        raise ValueError(f'fp8_linear: fast_accum is for recipe "rowwise" only; recipe is {recipe!r}')
    dtypes = (torch.bfloat16, torch.float32)
    check_tensor("fp8_linear: x", x, dtype=dtypes)
    if not x.ndim:
        raise ValueError("fp8_linear: x is a scalar; expected [..., K]")
    check_tensor("fp8_linear: weight", weight, (None, x.shape[-1]), dtype=dtypes, like=x)
    if bias is not None:
        check_tensor("fp8_linear: bias", bias, (weight.shape[0],), dtype=dtypes, like=x)
    if x.is_cuda and not torch.compiler.is_compiling():  # a compiled call leaves it to torch to refuse
        _check_device(x.device, recipe)
    need_dx, need_dw = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    y = _FP8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, recipe, fast_accum, need_dx, need_dw)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check_device(device: torch.device, recipe: str) -> None:
    gpu = torch.cuda.get_device_properties(device)
    capability = (gpu.major, gpu.minor)
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if capability < (8, 9):
        raise ValueError(f"fp8_linear: {gpu.name} has compute capability {gpu.major}.{gpu.minor}; fp8 needs 8.9")
    if recipe == "blockwise" and (capability != (9, 0) or cuda < (12, 9)):
        raise ValueError(
            f'fp8_linear: recipe "blockwise" needs compute capability 9.0 and torch for CUDA 12.9 or later; here are '
            f'{gpu.major}.{gpu.minor} and {torch.version.cuda}; allowed: "rowwise"'
        )
