"""Linear layers with low-rank adapters (LoRA) beside a matrix that is not trained, fused as in fused_linear.py.

    out = x W^T + b;  columns [lo, hi) of it += scale * z_i B_i^T, z_i = x A_i^T      (one i per matrix inside W)
    dz_i = d_out[lo:hi] B_i    dB_i = scale d_out[lo:hi]^T z_i    dA = scale dz^T x    dx = d_out W + scale dz A

W may be several matrices, one below the other, each with or without an adapter of rank R; their A lie one below the
other too, so that x is read once for all of them. x is the norm of a sum, or SwiGLU of gate and up, and is then written
again by the backward of what made it: nothing of the width of x is kept, only z.

Why not W + scale B A instead, once per forward: in bf16 the sum would round most of the adapter away; it needs room for
a copy of W; and autograd would form dW, 2 T K N FLOPs. This takes 6 T n R (K + N / n) beside the 4 T K N of the frozen
matrix (R = 16, K = N = 4096: 1 %), and the product with B reads and writes `out` once more, 4 T N bytes of bf16.
Source: Hu et al. 2021, arXiv:2106.09685. With B = 0 the result is that without an adapter, bit for bit. May touch:
torch, and the kernels that it is made of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor
from .fused_linear import product
from .rms_norm import check_norm, norm_backward, norm_forward
from .swiglu import check_gate_up, swiglu_backward, swiglu_forward

Spans = tuple[tuple[int, int], ...]


class LowRank(NamedTuple):
    """Adapters of the matrices that lie one below the other in a weight [N, K]: n of them, of rank R.

    a: [n R, K]; b: [sum of the widths of spans, R]; in the dtype of x, fp32 or bf16; the products are in that of x, to
        which they are converted.
    spans: n ranges [lo, hi) of the N columns of the output, in order.
    scale: alpha / R, or alpha / sqrt(R) (rank-stabilised, arXiv:2312.03732).
    """

    a: torch.Tensor
    b: torch.Tensor
    spans: Spans
    scale: float


def _parts(b: torch.Tensor, spans: Spans) -> list[tuple[slice, slice, slice]]:
    """Of each adapter: columns of the output, columns of z, rows of b."""
    parts, rank, row = [], b.shape[1], 0
    for index, (lo, hi) in enumerate(spans):
        parts.append((slice(lo, hi), slice(index * rank, (index + 1) * rank), slice(row, row + hi - lo)))
        row += hi - lo
    return parts


def _add(out: torch.Tensor, x: torch.Tensor, term: LowRank) -> torch.Tensor:
    """Add the adapters to `out` in place; z [T, n R]."""
    z, b = product(x, term.a.to(x.dtype)), term.b.to(x.dtype)
    for columns, ranks, rows in _parts(b, term.spans):
        out[:, columns].addmm_(z[:, ranks], b[rows].t(), alpha=term.scale)
    return z


def _backward(d_out: torch.Tensor, z: torch.Tensor, term: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """(dz / scale, dB)."""
    b = term.b.to(z.dtype)
    dz, db = torch.empty_like(z), torch.empty_like(b)
    for columns, ranks, rows in _parts(b, term.spans):
        dz[:, ranks] = product(d_out[:, columns], b[rows].t())
        db[rows].addmm_(d_out[:, columns].t(), z[:, ranks], beta=0, alpha=term.scale)
    return dz, db


def _add_to_dx(dx: torch.Tensor, dz: torch.Tensor, term: LowRank, beta: int = 1) -> torch.Tensor:
    return dx.addmm_(dz, term.a.to(dx.dtype), beta=beta, alpha=term.scale)


def _da(dz: torch.Tensor, x: torch.Tensor, term: LowRank) -> torch.Tensor:
    return x.new_empty(dz.shape[1], x.shape[1]).addmm_(dz.t(), x, beta=0, alpha=term.scale)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, x, a, b, spans: Spans, scale: float):
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, _add(out, x, LowRank(a, b, spans, scale)), a, b)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor):
        x, z, a, b = ctx.saved_tensors
        term = LowRank(a, b, ctx.spans, ctx.scale)
        dz, db = _backward(d_out, z, term)
        dx = _add_to_dx(torch.empty_like(x), dz, term, beta=0) if ctx.needs_input_grad[1] else None
        return d_out, dx, _da(dz, x, term), db, None, None


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, weight, bias, a, b, spans: Spans, scale: float, eps: float):
        y, s, rstd = norm_forward(x, residual, norm_weight, eps, False)
        out = product(y, weight, bias)
        z = _add(out, y, LowRank(a, b, spans, scale))
        ctx.save_for_backward(s, rstd, norm_weight, weight, z, a, b)
        ctx.has_residual, ctx.spans, ctx.scale = residual is not None, spans, scale
        ctx.set_materialize_grads(False)
        return out, s

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor | None, ds: torch.Tensor | None):
        if d_out is None:
            return ds, ds if ctx.has_residual else None, *(None,) * 8
        s, rstd, norm_weight, weight, z, a, b = ctx.saved_tensors
        term = LowRank(a, b, ctx.spans, ctx.scale)
        dz, db = _backward(d_out, z, term)
        dy = _add_to_dx(product(d_out, weight.t()), dz, term)
        dx, d_norm_weight = norm_backward(dy, ds, s, norm_weight, rstd, False, recompute=True)
        da = _da(dz, dy, term)  # dy holds y by now
        return dx, dx if ctx.has_residual else None, d_norm_weight, None, None, da, db, None, None, None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, a, b, spans: Spans, scale: float):
        h = swiglu_forward(gate_up, False)
        out = product(h, weight, bias)
        ctx.save_for_backward(gate_up, weight, _add(out, h, LowRank(a, b, spans, scale)), a, b)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor):
        gate_up, weight, z, a, b = ctx.saved_tensors
        term = LowRank(a, b, ctx.spans, ctx.scale)
        dz, db = _backward(d_out, z, term)
        dh = _add_to_dx(product(d_out, weight.t()), dz, term)
        d_gate_up = swiglu_backward(dh, gate_up, False, recompute=True)
        return d_gate_up, None, None, _da(dz, dh, term), db, None, None  # dh holds h by now


# --- public ----------------------------------------------------------------------------------------------------------


def add_low_rank(out: torch.Tensor, x: torch.Tensor, term: LowRank) -> torch.Tensor:
    """`out` [T, N], which is x W^T however it was computed, with the adapters added to it in place.

    x [T, K] in out's dtype. Saves x and z. Differentiable in out, x, a and b.

    Raises:
        ValueError: an argument of another dtype, shape or device.
    """
    check_tensor("add_low_rank: x", x, (out.shape[0], None), like=out)
    _check("add_low_rank", x, x.shape[1], out.shape[1], term)
    return _AddLowRank.apply(out, x, *term)


def rms_norm_lora_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    term: LowRank,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, s) of `rms_norm_linear` with `return_sum`, with adapters. Saves s, the reciprocal root mean squares and z.

    Args:
        x: [T, K]; residual: the same shape and dtype.
        norm_weight: [K]; weight: [N, K]; bias: [N]. weight and bias are not trained.
        term: the adapters of weight.

    Raises:
        ValueError: an argument of another dtype, shape or device; weight or bias requires a gradient.
    """
    check_tensor("rms_norm_lora_linear: x", x, (None, None))
    check_norm("rms_norm_lora_linear", x, norm_weight, residual, weight_name="norm_weight")
    _check_frozen("rms_norm_lora_linear", x, x.shape[1], weight, bias, term)
    return _RMSNormLinear.apply(x, residual, norm_weight, weight, bias, *term, eps)


def swiglu_lora_linear(
    gate_up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, term: LowRank
) -> torch.Tensor:
    """out [T, N] of `swiglu_linear`, with adapters. Saves gate_up and z.

    Args:
        gate_up: [T, 2K] = [gate | up].
        weight: [N, K]; bias: [N]. Neither is trained.
        term: the adapters of weight.

    Raises:
        ValueError: an argument of another dtype, shape or device; weight or bias requires a gradient.
    """
    check_gate_up("swiglu_lora_linear", gate_up)
    _check_frozen("swiglu_lora_linear", gate_up, gate_up.shape[1] // 2, weight, bias, term)
    return _SwiGLULinear.apply(gate_up, weight, bias, *term)


def _check_frozen(
    function: str, x: torch.Tensor, width: int, weight: torch.Tensor, bias: torch.Tensor | None, term: LowRank
) -> None:
    check_tensor(f"{function}: weight", weight, (None, width), like=x)
    if bias is not None:
        check_tensor(f"{function}: bias", bias, weight.shape[:1], like=x)
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(f"{function}: weight or bias requires a gradient, but gets none: freeze it")
    _check(function, x, width, weight.shape[0], term)


def _check(function: str, x: torch.Tensor, width: int, columns: int, term: LowRank) -> None:
    ends = [0, *(end for span in term.spans for end in span), columns]
    if not term.spans or ends != sorted(ends):
        raise ValueError(f"{function}: spans are {term.spans}; allowed: ranges in order within {columns} columns")
    rank, rows = term.b.shape[-1], sum(hi - lo for lo, hi in term.spans)
    dtypes = (x.dtype, torch.float32, torch.bfloat16)
    check_tensor(f"{function}: a", term.a, (len(term.spans) * rank, width), dtype=dtypes, like=x)
    check_tensor(f"{function}: b", term.b, (rows, rank), dtype=dtypes, like=x)
