"""RMSNorm and RMSNorm of a residual sum, forward and backward.

    rstd = (mean(x^2) + eps)^-1/2          y = x * rstd * w
    m = dy * w      dx = rstd * (m - x * rstd^2 * mean(m * x))      dw = sum_rows(dy * x * rstd)

Floor (bf16, n = rows * H elements): forward reads x and writes y, 4n bytes (with the residual sum 8n: x, r in, s, y
out); backward reads dy and x and writes dx, 6n bytes (with the residual sum 8n: ds in as well). Saved: x (or s), rstd
per row. Source: Zhang & Sennrich 2019, arXiv:1910.07467; arithmetic in fp32 as in transformers' LlamaRMSNorm, rounded
once. May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import compute_dtype, define_op
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, persistent_programs, tl

# --- torch reference -------------------------------------------------------------------------------------------------


def _rms_norm_cpu(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    # vector_norm reads x once, without a temporary; blocks of rows that fit the cache were measured slower.
    acc = compute_dtype(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=acc)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(x, rstd).mul_(weight)
    return y.to(x.dtype), rstd.squeeze(-1)


def _add_rms_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    s = x + residual
    y, rstd = _rms_norm_cpu(s, weight, eps)
    return y, s, rstd


def _rms_norm_backward_cpu(
    dy: torch.Tensor, ds: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = x.shape[-1]
    acc = compute_dtype(x.dtype)
    dy_TH, x_TH, w = dy.reshape(-1, hidden).to(acc), x.reshape(-1, hidden).to(acc), weight.to(acc)
    rstd = rstd.reshape(-1)
    # Both reductions are matrix-vector products of the one temporary dy * x.
    t_TH = dy_TH * x_TH
    dw = torch.mv(t_TH.T, rstd)
    c = torch.mv(t_TH, w).mul_(rstd.pow(3)).div_(hidden).unsqueeze_(-1)
    dx = torch.mul(dy_TH, w, out=t_TH).mul_(rstd.unsqueeze(-1)).addcmul_(x_TH, c, value=-1)
    if ds is not None:
        dx.add_(ds.reshape(-1, hidden))
    return dx.to(x.dtype).view(x.shape), dw.to(weight.dtype)


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def _forward_kernel(
    X, R, W, Y, S, RSTD, rows, hidden, x_stride, r_stride, eps,
    RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of rows: all of a row at once, so x is read once."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < hidden)
    row = row.to(tl.int64)
    x = tl.load(X + row * x_stride + col, mask, 0.0).to(tl.float32)
    if RESIDUAL:
        # The sum is rounded before it is normalised: s is what the next layer adds to and what backward sees.
        s = cast(x + tl.load(R + row * r_stride + col, mask, 0.0).to(tl.float32), S.dtype.element_ty, INTERPRET)
        tl.store(S + row * hidden + col, s, mask)
        x = s.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / hidden + eps)
    tl.store(RSTD + row, rstd, row < rows)
    w = tl.load(W + col, col < hidden, 0.0).to(tl.float32)
    tl.store(Y + row * hidden + col, cast(x * rstd * w, Y.dtype.element_ty, INTERPRET), mask)


@kernel
def _backward_kernel(
    DY, DS, X, W, RSTD, DX, DW, rows, hidden, dy_stride, ds_stride, x_stride, programs,
    RESIDUAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """A persistent program walks over row blocks, prefetching the next ones, and keeps its part of dw in registers."""
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.load(W + col, col < hidden, 0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK_ROWS, rows, programs * BLOCK_ROWS, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (col < hidden)
        row = row.to(tl.int64)
        x = tl.load(X + row * x_stride + col, mask, 0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + col, mask, 0.0).to(tl.float32)
        rstd = tl.load(RSTD + row, row < rows, 0.0)
        x_hat = x * rstd
        m = dy * w
        dw += dy * x_hat
        dx = rstd * (m - x_hat * (tl.sum(m * x_hat, 1, keep_dims=True) / hidden))
        if RESIDUAL:
            dx += tl.load(DS + row * ds_stride + col, mask, 0.0).to(tl.float32)
        tl.store(DX + row * hidden + col, cast(dx, DX.dtype.element_ty, INTERPRET), mask)
    tl.store(DW + tl.program_id(0) * hidden + col, tl.sum(dw, 0, keep_dims=True), col < hidden)


def _tile(hidden: int) -> dict[str, int]:
    """A row per program from 4096 columns up, several shorter rows below; 16 elements per thread."""
    block = next_power_of_2(hidden)
    block_rows = max(1, 4096 // block)
    return {"BLOCK": block, "BLOCK_ROWS": block_rows, "num_warps": min(max(block * block_rows // 512, 1), 16)}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., H] as [rows, H] with unit stride along H; a copy only where no view has that form."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    x_RH, y = _rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, hidden = x_RH.shape
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tile = _tile(hidden)
    grid = (cdiv(rows, tile["BLOCK_ROWS"]),)
    strides = x_RH.stride(0), 0
    launch(_forward_kernel, grid, x_RH, x_RH, weight, y, y, rstd, rows, hidden, *strides, eps, RESIDUAL=False, **tile)
    return y, rstd


def _add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_RH, r_RH = _rows(x), _rows(residual)
    rows, hidden = x_RH.shape
    y, s = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tile = _tile(hidden)
    grid = (cdiv(rows, tile["BLOCK_ROWS"]),)
    strides = x_RH.stride(0), r_RH.stride(0)
    launch(_forward_kernel, grid, x_RH, r_RH, weight, y, s, rstd, rows, hidden, *strides, eps, RESIDUAL=True, **tile)
    return y, s, rstd


def _rms_norm_backward_triton(
    dy: torch.Tensor, ds: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dy_RH, x_RH = _rows(dy), _rows(x)
    ds_RH = dy_RH if ds is None else _rows(ds)
    rows, hidden = x_RH.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Two programs per SM hide each other's reductions; their partial sums are added in a fixed order.
    programs = persistent_programs(x, per_sm=2)
    dw = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    strides = dy_RH.stride(0), ds_RH.stride(0), x_RH.stride(0)
    launch(
        _backward_kernel, (programs,), dy_RH, ds_RH, x_RH, weight, rstd, dx, dw, rows, hidden, *strides, programs,
        RESIDUAL=ds is not None, STAGES=3, **_tile(hidden),
    )  # fmt: skip
    return dx, dw.sum(0).to(weight.dtype)


# --- operators -------------------------------------------------------------------------------------------------------


def _rstd_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))


_rms_norm_op = define_op(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    cpu=_rms_norm_cpu,
    cuda=_rms_norm_triton,
    fake=lambda x, weight, eps: (x.new_empty(x.shape), _rstd_like(x)),
)
_add_rms_norm_op = define_op(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    cpu=_add_rms_norm_cpu,
    cuda=_add_rms_norm_triton,
    fake=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape), _rstd_like(x)),
)
_rms_norm_backward_op = define_op(
    "rms_norm_backward",
    "(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    cpu=_rms_norm_backward_cpu,
    cuda=_rms_norm_backward_triton,
    fake=lambda dy, ds, x, weight, rstd: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rstd = _rms_norm_op(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        x, weight, rstd = ctx.saved_tensors
        dx, dw = _rms_norm_backward_op(dy, None, x, weight, rstd)
        return dx, dw, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
        y, s, rstd = _add_rms_norm_op(x, residual, weight, eps)
        ctx.save_for_backward(s, weight, rstd)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor, ds: torch.Tensor):
        s, weight, rstd = ctx.saved_tensors
        dx, dw = _rms_norm_backward_op(dy, ds, s, weight, rstd)
        return dx, dx, dw, None


# --- public ----------------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., H] in bf16, fp32 (or fp16, fp64); weight [H]. Arithmetic in fp32, result in x.dtype, rounded once.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, s) with s = x + residual, rounded to x.dtype, and y = rms_norm(s, weight, eps): the pre-norm residual step.

    x and residual [..., H] of one shape and dtype; weight [H]. Both results are differentiable; x and residual receive
    the same gradient.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual is {residual.dtype} {tuple(residual.shape)}; "
            f"it must match x, {x.dtype} {tuple(x.shape)}"
        )
    return _AddRMSNorm.apply(x, residual, weight, eps)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}; x {tuple(x.shape)} needs ({x.shape[-1]},)")
