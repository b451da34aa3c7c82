"""Casts to float8 e4m3 (4 exponent, 3 mantissa bits, largest number 448) with fp32 scales, both orientations at once.

    scale = amax / 448     x8 = e4m3(x / scale), to nearest even, saturating     x ~ x8 * scale

One amax per group of elements; `scaling` is
    "1x128"    128 consecutive elements of a row (activations and their gradients)
    "128x128"  a square block (weights; both orientations have the same scales)
    "rowwise"  a whole row
A GEMM on Hopper wants both operands contiguous and scaled in groups along the dimension it sums over. What both the
forward and the weight gradient need is therefore cast twice: x8 [T, K], and xt8 [K, T] of x^T with its own scales.

Floor (bf16, n = T * K elements): 2n bytes read and n written per copy, 4n for both. "1x128" and "128x128" take just
that: a 128 x 128 tile is read once and stays in registers. "rowwise" must see all of x before it can scale, 2n more.
At [16384, 3584], with the scales: 239 MB, 71 us at 3.35 TB/s.

Error of an element: at most 2^-4 |x|, or 2^-10 scale where |x| < 2^-6 scale; root mean square 0.027 |x|. No e5m2: with
a scale per group its range is not needed, and it has half the precision. Sources: Micikevicius et al. 2022,
arXiv:2209.05433; groups as in DeepSeek-V3, arXiv:2412.19437. May touch: torch, triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._op import check_tensor, define_op
from ._triton import cdiv, kernel, launch, tl, unit_rows

E4M3 = torch.float8_e4m3fn
BLOCK = 128
_MAX = 448.0
_MIN_AMAX = _MAX * 2.0**-126  # anything smaller, zeros too, has the scale 2^-126: it and its inverse are normal numbers


def _empty_copy(x: torch.Tensor, rows: int, columns: int, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x8, scale) for padded sizes, in the layouts that cuBLAS takes: scales of "1x128" with unit stride along the
    rows, those of "128x128" in rows of a multiple of four (the rest is zero)."""
    x8 = x.new_empty(rows, columns, dtype=E4M3)
    if scaling == "rowwise":
        return x8, x.new_empty(rows, 1, dtype=torch.float32)
    if scaling == "1x128":
        return x8, x.new_empty(columns // BLOCK, rows, dtype=torch.float32).t()
    width = cdiv(columns // BLOCK, 4) * 4
    new = x.new_empty if width == columns // BLOCK else x.new_zeros
    return x8, new(rows // BLOCK, width, dtype=torch.float32)


def _empty_copies(x: torch.Tensor, scaling: str, rows: bool, columns: bool) -> tuple[torch.Tensor, ...]:
    """(x8, scale, xt8, scale_t) for x [T, K]; a copy that is not wanted has no elements."""
    t, k = (cdiv(size, BLOCK) * BLOCK for size in x.shape)
    x8, scale = _empty_copy(x, t if rows else 0, k if rows else 0, scaling)
    return x8, scale, *_empty_copy(x, k if columns else 0, t if columns else 0, scaling)


def _nothing(results: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The results for an x without elements: "rowwise" has scales of rows of no length."""
    for scale in results[1::2]:
        scale.fill_(_MIN_AMAX / _MAX)
    return results


# --- torch reference -------------------------------------------------------------------------------------------------


def _scale_cpu(amax: torch.Tensor, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, its inverse). An infinite amax gives an infinite scale: the group comes out as inf and NaN."""
    amax = amax.clamp(min=_MIN_AMAX)
    if not power_of_two:
        return amax * (1 / _MAX), torch.full_like(amax, _MAX) / amax  # a number / a tensor would round twice
    # The smallest power that is not below amax / 448: one more if the mantissa exceeds 1.75.
    exponent = ((amax.view(torch.int32) + 0x1FFFFF) >> 23) - 8
    scale, inverse = ((e << 23).view(torch.float32) for e in (exponent, 254 - exponent))
    return torch.where(amax == torch.inf, amax, scale), inverse


def _cast_cpu(x: torch.Tensor, scaling: str, power_of_two: bool, x8: torch.Tensor, scale: torch.Tensor) -> None:
    """x [M, K] into x8 and scale."""
    m, k = x.shape
    group_m, group_k = {"rowwise": (1, k), "1x128": (1, BLOCK), "128x128": (BLOCK, BLOCK)}[scaling]
    groups = x.reshape(m // group_m, group_m, k // group_k, group_k)
    # A NaN is cast to NaN; it does not take part in the scale.
    amax = groups.abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax((1, 3))
    group_scale, inverse = _scale_cpu(amax, power_of_two)
    scale[:, : amax.shape[1]] = group_scale
    x8.copy_((groups * inverse[:, None, :, None]).clamp_(-_MAX, _MAX).view(m, k))


def _fp8_cast_cpu(
    x: torch.Tensor, scaling: str, rows: bool, columns: bool, power_of_two: bool
) -> tuple[torch.Tensor, ...]:
    x8, scale, xt8, scale_t = results = _empty_copies(x, scaling, rows, columns)
    if not x.numel():
        return _nothing(results)
    x = F.pad(x.float(), (0, -x.shape[1] % BLOCK, 0, -x.shape[0] % BLOCK))
    if rows:
        _cast_cpu(x, scaling, power_of_two, x8, scale)
    if columns:
        _cast_cpu(x.t(), scaling, power_of_two, xt8, scale_t)
    return results


def dequantise(x8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x8 [M, K] times its scale, in the shape of any `scaling`: fp32 [M, K]."""
    m, k = x8.shape
    if not x8.numel():
        return x8.float()
    if len(scale) != m:  # "128x128": without the padding
        scale = scale[:, : k // BLOCK]
    groups = x8.float().view(scale.shape[0], m // scale.shape[0], scale.shape[1], k // scale.shape[1])
    return groups.mul_(scale[:, None, :, None]).view(m, k)


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def cast_e4m3(x, INTERPRET: tl.constexpr):
    """fp32 `x` as e4m3, to nearest even, saturating; NaN stays NaN. One instruction for two elements on the GPU; the
    interpreter wraps where it should saturate, so there the code is put together from the bits."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal numbers: round 23 mantissa bits to 3, bias 127 becomes 7. Below 2^-6: a multiple of 2^-9, which is the
        # last bit of a number near 2^14.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
        subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(magnitude < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@kernel
def _scale(amax, POWER_OF_TWO: tl.constexpr):
    """As _scale_cpu; compiled, the quotient may be off by two units in the last place."""
    amax = tl.maximum(amax, 448.0 * 1.1754943508222875e-38)
    if POWER_OF_TWO:
        exponent = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23) - 8
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        return tl.where(amax == float("inf"), amax, scale), ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return amax * (1.0 / 448.0), 448.0 / amax


@kernel
def _amax_kernel(
    X, ROW_AMAX, COLUMN_AMAX, rows, columns, stride, padded_rows, padded_columns,
    BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Of one tile: amax per row into ROW_AMAX [K / 128, T] and per column into COLUMN_AMAX [T / 128, K]."""
    tile_row = (tl.program_id(0) // (padded_columns // BLOCK)).to(tl.int64)
    tile_column = (tl.program_id(0) % (padded_columns // BLOCK)).to(tl.int64)
    row = tile_row * BLOCK + tl.arange(0, BLOCK)
    column = tile_column * BLOCK + tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.abs(tl.load(X + row[:, None] * stride + column[None, :], mask, 0.0).to(tl.float32))
    tl.store(ROW_AMAX + tile_column * padded_rows + row, tl.max(x, 1))
    tl.store(COLUMN_AMAX + tile_row * padded_columns + column, tl.max(x, 0))


@kernel
def _cast_kernel(
    X, ROW_AMAX, COLUMN_AMAX, X8, SCALE, XT8, SCALE_T, rows, columns, stride, padded_rows, padded_columns,
    scale_stride, scale_t_stride, SCALING: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile, read once. It is held as [row / 4, column, row % 4], every thread having four rows of a column: the
    transposed copy then crosses the shared memory in words of four elements instead of byte by byte."""
    tile_row = (tl.program_id(0) // (padded_columns // BLOCK)).to(tl.int64)
    tile_column = (tl.program_id(0) % (padded_columns // BLOCK)).to(tl.int64)
    first_row, first_column = tile_row * BLOCK, tile_column * BLOCK
    row4, i = 4 * tl.arange(0, BLOCK // 4)[:, None].to(tl.int64), tl.arange(0, BLOCK).to(tl.int64)
    tile = X + first_row * stride + first_column + (row4 * stride + i[None, :])
    left, inside = rows - first_row, i[None, :] < columns - first_column
    x0 = tl.load(tile, (row4 < left) & inside, 0.0)
    x1 = tl.load(tile + stride, (row4 + 1 < left) & inside, 0.0)
    x2 = tl.load(tile + 2 * stride, (row4 + 2 < left) & inside, 0.0)
    x3 = tl.load(tile + 3 * stride, (row4 + 3 < left) & inside, 0.0)
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (BLOCK // 4, BLOCK, 4)).to(tl.float32)
    row = first_row + row4 + tl.arange(0, 4)[None, :]
    column = first_column + i

    if SCALING == "128x128":
        scale, inverse = _scale(tl.max(tl.abs(x)), POWER_OF_TWO)
        row_inverse = inverse
        column_inverse = inverse
        if ROWS:
            tl.store(SCALE + tile_row * scale_stride + tile_column, scale)
        if COLUMNS:
            tl.store(SCALE_T + tile_column * scale_t_stride + tile_row, scale)
    # One orientation after the other: with both in the air the tile takes more than 128 registers a thread, and only
    # one block fits on an SM. The scale of a row is stored by each of its tiles, or ("rowwise") by the first.
    if ROWS:
        if SCALING != "128x128":
            row_amax = tl.max(tl.abs(x), 1) if SCALING == "1x128" else tl.load(ROW_AMAX + row)
            row_scale, row_inverse = _scale(row_amax, POWER_OF_TWO)
            row_inverse = row_inverse[:, None, :]
            if SCALING == "1x128" or tile_column == 0:
                tl.store(SCALE + tile_column * padded_rows + row, row_scale)
        x8 = tl.permute(cast_e4m3(x * row_inverse, INTERPRET), (0, 2, 1))
        out = X8 + first_row * padded_columns + first_column + (i[:, None] * padded_columns + i[None, :])
        tl.store(out, tl.reshape(x8, (BLOCK, BLOCK)))
    if COLUMNS:
        if SCALING != "128x128":
            column_amax = tl.max(tl.max(tl.abs(x), 2), 0) if SCALING == "1x128" else tl.load(COLUMN_AMAX + column)
            column_scale, column_inverse = _scale(column_amax, POWER_OF_TWO)
            column_inverse = column_inverse[None, :, None]
            if SCALING == "1x128" or tile_row == 0:
                tl.store(SCALE_T + tile_row * padded_columns + column, column_scale)
        xt8 = tl.permute(cast_e4m3(x * column_inverse, INTERPRET), (1, 0, 2))
        out_t = XT8 + first_column * padded_rows + first_row + (i[:, None] * padded_rows + i[None, :])
        tl.store(out_t, tl.reshape(xt8, (BLOCK, BLOCK)))


def _fp8_cast_triton(
    x: torch.Tensor, scaling: str, rows: bool, columns: bool, power_of_two: bool
) -> tuple[torch.Tensor, ...]:
    x8, scale, xt8, scale_t = results = _empty_copies(x, scaling, rows, columns)
    if not x.numel():
        return _nothing(results)
    x = unit_rows(x)
    tiles_t, tiles_k = (cdiv(size, BLOCK) for size in x.shape)
    padded = tiles_t * BLOCK, tiles_k * BLOCK
    grid = (tiles_t * tiles_k,)
    row_amax, column_amax = scale, scale_t
    if scaling == "rowwise":
        row_amax = x.new_empty(tiles_k, padded[0], dtype=torch.float32)
        column_amax = x.new_empty(tiles_t, padded[1], dtype=torch.float32)
        launch(_amax_kernel, grid, x, row_amax, column_amax, *x.shape, x.stride(0), *padded, BLOCK=BLOCK, num_warps=8)
        row_amax, column_amax = row_amax.amax(0), column_amax.amax(0)
    launch(
        _cast_kernel, grid, x, row_amax, column_amax, x8, scale, xt8, scale_t, *x.shape, x.stride(0), *padded,
        scale.stride(0), scale_t.stride(0), SCALING=scaling, ROWS=rows, COLUMNS=columns, POWER_OF_TWO=power_of_two,
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return results


# --- operator --------------------------------------------------------------------------------------------------------

_fp8_cast_op = define_op(
    "fp8_cast",
    "(Tensor x, str scaling, bool rows, bool columns, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_fp8_cast_cpu,
    cuda=_fp8_cast_triton,
    fake=lambda x, scaling, rows, columns, power_of_two: _empty_copies(x, scaling, rows, columns),
)


def fp8_cast(
    x: torch.Tensor, scaling: str, *, rows: bool = True, columns: bool = True, power_of_two: bool = False
) -> tuple[torch.Tensor, ...]:
    """(x8, scale, xt8, scale_t), the first two without elements if not `rows`, the others if not `columns`."""
    return _fp8_cast_op(x, scaling, rows, columns, power_of_two)


# --- public ----------------------------------------------------------------------------------------------------------


def cast_rowwise(x: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, ...]:
    """(x8 [T', K'], scale [T', 1], xt8 [K', T'], scale_t [K', 1]): x and x^T as e4m3, one fp32 scale per row of each.

    x [T, K] in bf16 or fp32. T' and K' are T and K rounded up to multiples of 128; what is added is zero. x ~ x8 *
    scale, x^T ~ xt8 * scale_t. power_of_two: scales are rounded up to powers of two, so that the division is exact
    and x8 and xt8 hold the same numbers except for underflow; without it the largest element of each row is exact.
    NaN comes out as NaN; a row with an infinity comes out without a finite number, 0 included. Not differentiable.
    """
    return _cast("cast_rowwise", x, "rowwise", power_of_two)


def cast_blockwise(x: torch.Tensor, *, block_rows: int = 1, power_of_two: bool = False) -> tuple[torch.Tensor, ...]:
    """(x8 [T', K'], scale, xt8 [K', T'], scale_t): x and x^T as e4m3, one fp32 scale per 128 elements of a row.

    x, T', K', power_of_two, NaN and infinities as in `cast_rowwise`.
    block_rows=1: scale [T', K'/128] and scale_t [K', T'/128], both with unit stride along the first dimension.
    block_rows=128: a scale per 128 x 128 block, the same for both copies: scale [T'/128, L(K'/128)] and scale_t
    [K'/128, L(T'/128)], where L rounds up to a multiple of 4 (zeros). Both are the layouts that torch.nn.functional's
    scaled_mm takes for BlockWise1x128 and (transposed) BlockWise128x128.
    """
    if block_rows not in (1, BLOCK):
        raise ValueError(f"cast_blockwise: block_rows is {block_rows}; allowed: 1, {BLOCK}")
    return _cast("cast_blockwise", x, "1x128" if block_rows == 1 else "128x128", power_of_two)


def _cast(function: str, x: torch.Tensor, scaling: str, power_of_two: bool) -> tuple[torch.Tensor, ...]:
    check_tensor(f"{function}: x", x, (None, None), dtype=(torch.bfloat16, torch.float32))
    return fp8_cast(x.detach(), scaling, power_of_two=power_of_two)
