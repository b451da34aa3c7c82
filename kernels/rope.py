"""Rotary position embedding of queries and keys by per-token position, forward and backward.

    theta_j = positions[t] * inv_freq_j, read as cos/sin tables; per head, halves x1 = x[:D/2], x2 = x[D/2:]
    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin        backward: the same rotation with -sin

Floor (bf16, n = T * (Hq + Hk) * D elements): one read, one write, 4n bytes; the tables add 4 bytes * T * D; nothing
is saved but the positions. The half rotation is Hugging Face's layout (no permutation of weights). Packed documents
need nothing but their positions, so the grid is over tokens, never over documents times the longest document.
`rope_qkv.py` launches the same kernel on the fused projection.
Source: Su et al. 2021, arXiv:2104.09864; arithmetic in fp32, rounded once (`exact_hf`: where transformers rounds).
May touch: torch, triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, round_to, tl

# --- torch reference -------------------------------------------------------------------------------------------------


# Tokens of one block: its heads stay in the cache between the three passes. Rolling the heads and multiplying by signed
# tables keeps every pass at the whole width of a head: measured 1.2 to 2.8 times as fast as two passes per half.
BLOCK_TOKENS = 256


def gather_tables(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, inverse: bool, exact_hf: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[cos | cos] and [-sin | sin] [T, 1, D] of the tokens, in the dtype that rotates tensors of `dtype`."""
    acc = dtype if exact_hf else compute_dtype(dtype)
    cos_T1d, sin_T1d = (table.index_select(0, positions).to(acc).unsqueeze_(1) for table in (cos, sin))
    signed = (sin_T1d, -sin_T1d) if inverse else (-sin_T1d, sin_T1d)
    return torch.cat((cos_T1d, cos_T1d), -1), torch.cat(signed, -1)


def rotate_cpu(
    x_THD: torch.Tensor, out_THD: torch.Tensor, cos_T1D: torch.Tensor, sin_T1D: torch.Tensor, exact_hf: bool
) -> None:
    """Write rotated x to out, which may be x; tables from `gather_tables`."""
    half = x_THD.shape[-1] // 2
    for x, out, cos, sin in zip(*(t.split(BLOCK_TOKENS) for t in (x_THD, out_THD, cos_T1D, sin_T1D))):
        x = x.to(cos.dtype)
        y = x.roll(half, -1).mul_(sin)
        if exact_hf:
            torch.add(y, x * cos, out=out)
        elif out.dtype == cos.dtype:
            torch.addcmul(y, x, cos, out=out)
        else:
            out.copy_(y.addcmul_(x, cos))


def _rope_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool,
    exact_hf: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    tables = gather_tables(cos, sin, positions, q.dtype, inverse, exact_hf)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k))
    rotate_cpu(q, q_out, *tables, exact_hf)
    rotate_cpu(k, k_out, *tables, exact_hf)
    return q_out, k_out


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def head_pointers(
    Q, K, V, token, head, col, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr,
):  # fmt: skip
    """Columns of the heads of a token, counted through q, k and v; token and head int64. The columns are added before
    the choice: the compiler sees wide accesses through it only so."""
    q = Q + token * q_stride_t + head * q_stride_h + col
    k = K + token * k_stride_t + (head - HEADS_Q) * k_stride_h + col
    v = V + token * v_stride_t + (head - HEADS_Q - HEADS_K) * v_stride_h + col
    return tl.where(head < HEADS_Q, q, tl.where(head < HEADS_Q + HEADS_K, k, v))


@kernel
def given_heads(
    head, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr
):
    """Whether each head belongs to one of q, k and v that is given."""
    is_q, is_v = head < HEADS_Q, head >= HEADS_Q + HEADS_K
    return (is_q & HAS_Q) | (is_v & HAS_V) | (~is_q & ~is_v & HAS_K)


@kernel
def load_tables(COS, SIN, POSITIONS, token, col, HALF: tl.constexpr, INVERSE: tl.constexpr):
    position = tl.load(POSITIONS + token).to(tl.int64)
    cos = tl.load(COS + position * HALF + col, col < HALF, 0.0).to(tl.float32)
    sin = tl.load(SIN + position * HALF + col, col < HALF, 0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    return cos, sin


@kernel
def rotate(x1, x2, cos, sin, dtype: tl.constexpr, EXACT_HF: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 halves, not yet rounded to dtype; EXACT_HF: tables and products are rounded to it, the sum by the store."""
    if EXACT_HF:
        cos, sin = round_to(cos, dtype, INTERPRET), round_to(sin, dtype, INTERPRET)
        y1 = round_to(x1 * cos, dtype, INTERPRET) - round_to(x2 * sin, dtype, INTERPRET)
        y2 = round_to(x2 * cos, dtype, INTERPRET) + round_to(x1 * sin, dtype, INTERPRET)
    else:
        y1 = x1 * cos - x2 * sin
        y2 = x2 * cos + x1 * sin
    return y1, y2


@kernel
def rotate_kernel(
    Q, K, V, COS, SIN, POSITIONS, QO, KO, VO,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    qo_stride_t, qo_stride_h, ko_stride_t, ko_stride_h, vo_stride_t, vo_stride_h,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HEADS_V: tl.constexpr, HALF: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr, INVERSE: tl.constexpr, EXACT_HF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A block of heads of one token: those of q and k turn, those of v are copied; absent ones are zero."""
    blocks: tl.constexpr = (HEADS_Q + HEADS_K + HEADS_V + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = ((tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < HEADS_Q + HEADS_K + HEADS_V) & (col < HALF)
    present = mask & given_heads(head, HEADS_Q, HEADS_K, HAS_Q, HAS_K, HAS_V)
    x = head_pointers(
        Q, K, V, token, head, col, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,
        HEADS_Q, HEADS_K,
    )  # fmt: skip
    # The heads are under way before the position is known, on which the tables wait.
    x1 = tl.load(x, present, 0.0).to(tl.float32)
    x2 = tl.load(x + HALF, present, 0.0).to(tl.float32)
    cos, sin = load_tables(COS, SIN, POSITIONS, token, col, HALF, INVERSE)
    y1, y2 = rotate(x1, x2, cos, sin, QO.dtype.element_ty, EXACT_HF, INTERPRET)
    if HEADS_V:
        turns = head < HEADS_Q + HEADS_K
        y1, y2 = tl.where(turns, y1, x1), tl.where(turns, y2, x2)
    y = head_pointers(
        QO, KO, VO, token, head, col, qo_stride_t, qo_stride_h, ko_stride_t, ko_stride_h, vo_stride_t, vo_stride_h,
        HEADS_Q, HEADS_K,
    )  # fmt: skip
    tl.store(y, cast(y1, QO.dtype.element_ty, INTERPRET), mask)
    tl.store(y + HALF, cast(y2, QO.dtype.element_ty, INTERPRET), mask)


def head_tile(heads: int, head_dim: int) -> dict[str, int]:
    """Heads per program: one 16-byte vector of bf16 of each half per thread, at most 128 threads."""
    block_d = next_power_of_2(head_dim // 2)
    block_h = max(min(next_power_of_2(heads), 1024 // block_d), 1)
    return {"BLOCK_H": block_h, "BLOCK_D": block_d, "num_warps": min(max(block_h * block_d // 256, 1), 4)}


def unit_columns(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotation(
    sources: tuple[torch.Tensor | None, ...],
    results: tuple[torch.Tensor, ...],
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool,
    exact_hf: bool,
) -> tuple[tuple[int, ...], tuple, dict[str, Any]]:
    """Grid, arguments and constants of `rotate_kernel` from (q, k) or (q, k, v), each [T, heads, D], to results."""
    tokens, _, head_dim = results[0].shape
    heads = [x.shape[1] for x in results] + [0] * (3 - len(results))
    outs = [*results, results[0]][:3]
    given = [unit_columns(x) if x is not None else out for x, out in zip([*sources, results[0]][:3], outs)]
    tile = head_tile(sum(heads), head_dim)
    constants = {
        "HEADS_Q": heads[0], "HEADS_K": heads[1], "HEADS_V": heads[2], "HALF": head_dim // 2,
        "HAS_Q": sources[0] is not None, "HAS_K": sources[1] is not None, "HAS_V": sources[-1] is not None,
        "INVERSE": inverse, "EXACT_HF": exact_hf, **tile,
    }  # fmt: skip
    strides = [stride for x in (*given, *outs) for stride in x.stride()[:2]]
    args = (*given, cos.contiguous(), sin.contiguous(), positions.contiguous(), *outs, *strides)
    return (tokens * cdiv(sum(heads), tile["BLOCK_H"]),), args, constants


def _rope_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    inverse: bool,
    exact_hf: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    results = q.new_empty(q.shape), k.new_empty(k.shape)
    grid, args, constants = rotation((q, k), results, cos, sin, positions, inverse, exact_hf)
    launch(rotate_kernel, grid, *args, **constants)
    return results


# --- operators -------------------------------------------------------------------------------------------------------

_rope_op = define_op(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse, bool exact_hf) -> (Tensor, Tensor)",
    cpu=_rope_cpu,
    cuda=_rope_triton,
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, exact_hf):
        ctx.save_for_backward(cos, sin, positions)
        ctx.exact_hf = exact_hf
        return _rope_op(q, k, cos, sin, positions, False, exact_hf)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: torch.Tensor, dk: torch.Tensor):
        dq, dk = _rope_op(dq, dk, *ctx.saved_tensors, True, ctx.exact_hf)
        return dq, dk, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    exact_hf: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by the position of each token; returns new contiguous (q, k).

    q [T, Hq, D], k [T, Hk, D] of one dtype, any strides on the first two dimensions (views of a fused qkv are fine);
    cos and sin fp32 [P, D/2], already holding any attention factor of the scaling; positions [T] int32 or int64, 0 <=
    position < P (not checked on a GPU: that would be a synchronisation). Not differentiable in the tables.

    exact_hf: round cos and sin, both products and their sum to q.dtype as transformers' apply_rotary_pos_emb does: the
    same bits in bf16 and fp16, forward and backward. Default: one rounding, closer to the true rotation.
    """
    check_tensor("rope: q", q, (None, None, None), dtype=float_dtypes(q))
    tokens, _, head_dim = q.shape
    check_tensor("rope: k", k, (tokens, None, head_dim), like=q)
    check_rotation("rope", q, head_dim, cos, sin, positions)
    return _Rope.apply(q, k, cos, sin, positions, exact_hf)


def check_rotation(
    function: str, x: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> None:
    """ValueError unless the tables and positions can rotate x [T, ...] of heads of `head_dim`."""
    if head_dim % 2:
        raise ValueError(f"{function}: head dimension {head_dim}; allowed: even numbers")
    check_tensor(f"{function}: cos", cos, (None, head_dim // 2), dtype=(torch.float32, torch.float64), like=x)
    check_tensor(f"{function}: sin", sin, tuple(cos.shape), dtype=cos.dtype, like=x)
    check_tensor(f"{function}: positions", positions, (x.shape[0],), dtype=(torch.int32, torch.int64), like=x)
