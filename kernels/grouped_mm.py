"""Grouped matrix product: each expert multiplies its own rows, and how many those are only the device knows.

    y_r = W_e x_r        dx_r = W_e^T dy_r        dW_e = sum_r dy_r x_r^T        e: offsets[e-1] <= r < offsets[e]

Floor: 2*R*K*N FLOPs for each of y, dx and dW, summed in fp32, rounded once. Rows from offsets[-1] on belong to nobody:
y and dx are 0 there, dW leaves them out. An expert without rows has dW = 0.

On Hopper bf16 goes to torch.nn.functional.grouped_mm: CUTLASS, 128x256x64 tiles, no split of the reduction, so two runs
give the same bits; pytorch#163425 has it at the rate of a loop of cuBLAS products for large experts. It is used nowhere
else: below sm_90 and for other dtypes it copies the offsets to the host, on sm_100 dW of an empty expert is garbage
(pytorch#172439), and it has no fp32 dW of bf16 rows. There the Triton kernels below run. The rows past the last
offset, which it leaves uninitialised (pytorch#193633), are zeroed here. May touch: torch, triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, operand, persistent_programs, tl
from .linear import linear

# --- torch reference -------------------------------------------------------------------------------------------------


def _segments(offsets: torch.Tensor, rows: int) -> list[tuple[int, int]]:
    """(first row, end) of every expert, read by the host: offsets are on the CPU."""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    if any(start > end for start, end in zip(starts, ends)) or ends[-1] > rows:
        raise ValueError(f"grouped_mm: offsets {ends} must rise from 0 to {rows} rows at most")
    return list(zip(starts, ends))


def _grouped_mm_cpu(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    y = x.new_empty(x.shape[0], weight.shape[1])
    segments = _segments(offsets, x.shape[0])
    for (start, end), w in zip(segments, weight):
        y[start:end] = linear(x[start:end], w)
    y[segments[-1][1] :].zero_()
    return y


def _grouped_mm_dw_cpu(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dw = dy.new_empty(len(offsets), dy.shape[1], x.shape[1], dtype=dtype)
    for (start, end), out in zip(_segments(offsets, x.shape[0]), dw):
        out.copy_(linear(dy[start:end].T.to(dtype), x[start:end].T.to(dtype)))
    return dw


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def _swizzle(tile, tiles_m, tiles_n, BAND: tl.constexpr):
    """(m, n) of a tile, BAND rows of tiles at a time: what neighbours read at the same time stays in the L2."""
    first = tile // (BAND * tiles_n) * BAND
    height = tl.minimum(tiles_m - first, BAND)
    tile = tile % (BAND * tiles_n)
    return first + tile % height, tile // height


@kernel
def _rows_kernel(
    X, W, Y, OFFSETS, experts, width, depth, w_stride, w_row, w_col, programs,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """y = x W_e^T: persistent programs walk over the tiles of all experts, [BLOCK_M rows of one expert, BLOCK_N]."""
    dtype: tl.constexpr = X.dtype.element_ty
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(OFFSETS + e, e < experts, 0)
    starts = tl.load(OFFSETS + e - 1, (e > 0) & (e < experts), 0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(tiles, 0)
    tiles_n = (width + BLOCK_N - 1) // BLOCK_N
    for tile in range(tl.program_id(0), tl.sum(tiles, 0) * tiles_n, programs):
        expert = tl.sum((last * tiles_n <= tile).to(tl.int32), 0)
        mine = e == expert
        end = tl.sum(tl.where(mine, ends, 0), 0)
        start = tl.sum(tl.where(mine, starts, 0), 0)
        tiles_m = tl.sum(tl.where(mine, tiles, 0), 0)
        before = tl.sum(tl.where(mine, last, 0), 0) - tiles_m
        m, n = _swizzle(tile - before * tiles_n, tiles_m, tiles_n, BAND)
        row = start + m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        col = n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        k = tl.arange(0, BLOCK_K)
        # Rows past the end repeat the last one: no mask in the loop, and they are not stored.
        x_ptr = X + tl.minimum(row, end - 1).to(tl.int64) * depth + k[None, :]
        w_ptr = W + expert.to(tl.int64) * w_stride + col.to(tl.int64) * w_row + k[:, None].to(tl.int64) * w_col
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, depth, BLOCK_K):
            x = tl.load(x_ptr, (k0 + k < depth)[None, :], 0.0)
            w = tl.load(w_ptr, (k0 + k < depth)[:, None] & (col < width), 0.0)
            acc = tl.dot(operand(x, dtype, INTERPRET), operand(w, dtype, INTERPRET), acc, input_precision=PRECISION)
            x_ptr += BLOCK_K
            w_ptr += BLOCK_K * w_col
        tl.store(Y + row.to(tl.int64) * width + col, cast(acc, dtype, INTERPRET), (row < end) & (col < width))


@kernel
def _weight_kernel(
    DY, X, DW, OFFSETS, width, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of one expert's dW [width, depth]: its rows, BLOCK_K at a time, are the reduction."""
    dtype: tl.constexpr = X.dtype.element_ty
    expert = tl.program_id(1)
    end = tl.load(OFFSETS + expert)
    start = tl.load(OFFSETS + expert - 1, expert > 0, 0)
    m, n = _swizzle(tl.program_id(0), (width + BLOCK_M - 1) // BLOCK_M, (depth + BLOCK_N - 1) // BLOCK_N, BAND)
    m = m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_K)[:, None]
    dy_ptr = DY + (start + row).to(tl.int64) * width + m[None, :]
    x_ptr = X + (start + row).to(tl.int64) * depth + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, end, BLOCK_K):
        # Both operands are masked: the next expert's rows may hold anything, and 0 * inf is not 0.
        dy = tl.load(dy_ptr, (first + row < end) & (m[None, :] < width), 0.0)
        x = tl.load(x_ptr, (first + row < end) & (n[None, :] < depth), 0.0)
        dy_t = tl.trans(operand(dy, dtype, INTERPRET))
        acc = tl.dot(dy_t, operand(x, dtype, INTERPRET), acc, input_precision=PRECISION)
        dy_ptr += BLOCK_K * width
        x_ptr += BLOCK_K * depth
    out = DW + (expert.to(tl.int64) * width + m[:, None]) * depth + n[None, :]
    tl.store(out, cast(acc, DW.dtype.element_ty, INTERPRET), (m[:, None] < width) & (n[None, :] < depth))


@kernel
def _zero_tail_kernel(
    Y, OFFSETS, experts, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):
    """Zero those of ROWS rows that lie past the last offset: none, usually."""
    used = tl.load(OFFSETS + experts - 1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    if used < tl.minimum(tl.program_id(0) * ROWS + ROWS, rows):
        zero = tl.zeros((ROWS, BLOCK), tl.float32).to(Y.dtype.element_ty)
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)[None, :]
            tl.store(Y + row.to(tl.int64) * width + col, zero, (row >= used) & (row < rows) & (col < width))


def tile_sizes(dtype: torch.dtype, shared_bytes: int) -> dict[str, int]:
    """Tiles by the shared memory of an SM. 128x256 reads 12 bytes of the L2 per 1000 FLOPs, 128x128 16: at
    the rate of sm_90's tensor cores the L2 is what the smaller tile would wait for."""
    if dtype == torch.float32:
        tiles = (64, 64, 32, 4, 2)
    elif shared_bytes >= 160 * 1024:
        tiles = (128, 256, 64, 8, 3)
    else:
        tiles = (128, 128, 32, 4, 3)
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"), tiles), BAND=16)


def _options(x: torch.Tensor) -> dict:
    shared = torch.cuda.get_device_properties(x.device).shared_memory_per_multiprocessor if x.is_cuda else 2**30
    return {**tile_sizes(x.dtype, shared), "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}


def _zero_tail(y: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    rows, width = y.shape
    launch(
        _zero_tail_kernel, (cdiv(rows, 64),), y, offsets, offsets.shape[0], rows, width, ROWS=64, BLOCK=64
    )  # fmt: skip
    return y


def _grouped_mm_triton(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    rows, depth = x.shape
    experts, width, _ = weight.shape
    y = x.new_empty(rows, width)
    programs = persistent_programs(x, per_sm=1)
    launch(
        _rows_kernel, (programs,), x, weight, y, offsets, experts, width, depth, *weight.stride(), programs,
        BLOCK_E=next_power_of_2(experts), **_options(x),
    )  # fmt: skip
    return _zero_tail(y, offsets)


def _grouped_mm_dw_triton(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    width, depth = dy.shape[1], x.shape[1]
    dw = dy.new_empty(offsets.shape[0], width, depth, dtype=dtype)
    options = _options(x)
    tiles = cdiv(width, options["BLOCK_M"]) * cdiv(depth, options["BLOCK_N"])
    launch(_weight_kernel, (tiles, offsets.shape[0]), dy, x, dw, offsets, width, depth, **options)
    return dw


# --- torch's kernel on Hopper ----------------------------------------------------------------------------------------


def _torch_serves(*matrices: torch.Tensor) -> bool:
    """Whether F.grouped_mm multiplies these without the host: sm_90, bf16, rows of whole, aligned 16 bytes."""
    return all(
        m.is_cuda
        and m.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(m.device)[0] == 9
        and m.numel()
        and m.data_ptr() % 16 == 0
        and min(m.stride()[-2:]) == 1
        and not any(size % 8 for size in m.shape[1:])
        and not any(stride % 8 for stride in m.stride() if stride != 1)
        for m in matrices
    )


def _grouped_mm_torch(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def _grouped_mm_dw_torch(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    # dy^T column by column, x row by row: the one layout in which an expert may have no rows, or any number of them.
    return F.grouped_mm(dy.t(), x, offs=offsets)


def _grouped_mm_cuda(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    if _torch_serves(x, weight):
        return _zero_tail(_grouped_mm_torch(x, weight, offsets), offsets)
    return _grouped_mm_triton(x, weight, offsets)


def _grouped_mm_dw_cuda(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    if dtype == torch.bfloat16 and _torch_serves(dy, x):
        return _grouped_mm_dw_torch(dy, x, offsets)
    return _grouped_mm_dw_triton(dy, x, offsets, dtype)


# --- operators -------------------------------------------------------------------------------------------------------

_grouped_mm_op = define_op(
    "grouped_mm",
    "(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    cpu=_grouped_mm_cpu,
    cuda=_grouped_mm_cuda,
    fake=lambda x, weight, offsets: x.new_empty(x.shape[0], weight.shape[1]),
)
_grouped_mm_dw_op = define_op(
    "grouped_mm_dw",
    "(Tensor dy, Tensor x, Tensor offsets, ScalarType dtype) -> Tensor",
    cpu=_grouped_mm_dw_cpu,
    cuda=_grouped_mm_dw_cuda,
    fake=lambda dy, x, offsets, dtype: dy.new_empty(offsets.shape[0], dy.shape[1], x.shape[1], dtype=dtype),
)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return _grouped_mm_op(x, weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        x, weight, offsets = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx = _grouped_mm_op(dy, weight.transpose(1, 2), offsets) if need_dx else None
        dw = _grouped_mm_dw_op(dy, x, offsets, weight.dtype) if need_dw else None
        return dx, dw, None


# --- public ----------------------------------------------------------------------------------------------------------


def grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """y [R, N]: y_r = W_e x_r for the rows offsets[e-1] <= r < offsets[e] of expert e; 0 from row offsets[-1] on.

    x [R, K] and weight [E, N, K] of one dtype, bf16, fp16 or fp32 (fp64 on a CPU); a transposed view of a weight is as
    good, nothing is copied. offsets [E] int32 on x's device, rising, each at most R (checked on a CPU only): what
    `sort_by_expert` returns. Differentiable in x and weight. Sums in fp32, rounded once; no host synchronisation.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    check_tensor("grouped_mm: x", x, (None, None), dtype=float_dtypes(x))
    check_tensor("grouped_mm: weight", weight, (None, None, x.shape[1]), like=x)
    _check_offsets("grouped_mm", offsets, weight.shape[0], x)
    return _GroupedMM.apply(x, weight, offsets)


def grouped_weight_grad(
    dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """dW [E, N, K]: dW_e = sum_r dy_r x_r^T, summed in fp32, in `dtype`: that of x, the default, or fp32.

    dy [R, N] and x [R, K] of one dtype; offsets [E] int32 as in `grouped_mm`. Not differentiable. fp32 is for whoever
    adds the gradients of several micro-batches without a rounding in between.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    check_tensor("grouped_weight_grad: x", x, (None, None), dtype=float_dtypes(x))
    check_tensor("grouped_weight_grad: dy", dy, (x.shape[0], None), like=x)
    _check_offsets("grouped_weight_grad", offsets, None, x)
    if dtype not in (None, x.dtype, compute_dtype(x.dtype)):
        raise ValueError(f"grouped_weight_grad: dtype is {dtype}; allowed: {x.dtype}, {compute_dtype(x.dtype)}")
    return _grouped_mm_dw_op(dy.detach(), x.detach(), offsets, dtype or x.dtype)


def _check_offsets(function: str, offsets: torch.Tensor, experts: int | None, x: torch.Tensor) -> None:
    check_tensor(f"{function}: offsets", offsets, (experts,), dtype=torch.int32, like=x)
    if not offsets.shape[0] or x.shape[0] > 2**30:
        raise ValueError(f"{function}: {offsets.shape[0]} experts, {x.shape[0]} rows; allowed: 1 or more, 2^30 at most")
