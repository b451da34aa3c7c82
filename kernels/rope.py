"""Rotary position embedding of queries and keys by per-token position, forward and backward.

    theta_j = positions[t] * inv_freq_j, read as cos/sin tables; per head, halves x1 = x[:D/2], x2 = x[D/2:]
    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin        backward: the same rotation with -sin

Floor (bf16, n = T * (Hq + Hk) * D elements): one read, one write, 4n bytes; the tables add 4 bytes * T * D; nothing
is saved but the positions. The half rotation is Hugging Face's layout (no permutation of weights). Packed documents
need nothing but their positions, so the grid is over tokens, never over documents times the longest document.
Source: Su et al. 2021, arXiv:2104.09864; arithmetic in fp32, rounded once.
May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import compute_dtype, define_op
from ._triton import cast, kernel, launch, next_power_of_2, tl

# --- torch reference -------------------------------------------------------------------------------------------------


# Tokens of one block: its heads stay in the cache between the four passes (measured 1.5x faster than whole tensors).
_BLOCK_TOKENS = 256


def _rotate(x_THD: torch.Tensor, cos_T1d: torch.Tensor, sin_T1d: torch.Tensor) -> torch.Tensor:
    half = x_THD.shape[-1] // 2
    out_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype)
    for x, y_out, cos, sin in zip(*(t.split(_BLOCK_TOKENS) for t in (x_THD, out_THD, cos_T1d, sin_T1d))):
        x = x.to(cos.dtype)
        y = y_out if y_out.dtype == cos.dtype else torch.empty_like(x)
        torch.mul(x[..., :half], cos, out=y[..., :half]).addcmul_(x[..., half:], sin, value=-1)
        torch.mul(x[..., half:], cos, out=y[..., half:]).addcmul_(x[..., :half], sin)
        if y is not y_out:
            y_out.copy_(y)
    return out_THD


def _rope_cpu(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = compute_dtype(q.dtype)
    cos_T1d = cos.index_select(0, positions).to(acc).unsqueeze_(1)
    sin_T1d = sin.index_select(0, positions).to(acc).unsqueeze_(1)
    if inverse:
        sin_T1d.neg_()
    return _rotate(q, cos_T1d, sin_T1d), _rotate(k, cos_T1d, sin_T1d)


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def _rotate_heads(
    X, Y, heads, half, x_stride_h, cos, sin, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr
):
    head = tl.arange(0, BLOCK_H)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < heads) & (col < half)
    x1 = tl.load(X + head * x_stride_h + col, mask, 0.0).to(tl.float32)
    x2 = tl.load(X + head * x_stride_h + half + col, mask, 0.0).to(tl.float32)
    y = Y + head * (2 * half) + col
    tl.store(y, cast(x1 * cos - x2 * sin, Y.dtype.element_ty, INTERPRET), mask)
    tl.store(y + half, cast(x2 * cos + x1 * sin, Y.dtype.element_ty, INTERPRET), mask)


@kernel
def _rope_kernel(
    Q, K, COS, SIN, POSITIONS, QO, KO, heads_q, heads_k, half, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    INVERSE: tl.constexpr, BLOCK_HQ: tl.constexpr, BLOCK_HK: tl.constexpr, BLOCK_D: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One token: its row of the tables is read once and rotates every head of q and k."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(POSITIONS + token).to(tl.int64)
    col = tl.arange(0, BLOCK_D)[None, :]
    cos = tl.load(COS + position * half + col, col < half, 0.0)
    sin = tl.load(SIN + position * half + col, col < half, 0.0)
    if INVERSE:
        sin = -sin
    q_out = QO + token * heads_q * half * 2
    k_out = KO + token * heads_k * half * 2
    _rotate_heads(Q + token * q_stride_t, q_out, heads_q, half, q_stride_h, cos, sin, BLOCK_HQ, BLOCK_D, INTERPRET)
    _rotate_heads(K + token * k_stride_t, k_out, heads_k, half, k_stride_h, cos, sin, BLOCK_HK, BLOCK_D, INTERPRET)


def _rope_triton(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    tokens, heads_q, head_dim = q.shape
    heads_k = k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1)
    launch(
        _rope_kernel, (tokens,), q, k, cos.contiguous(), sin.contiguous(), positions.contiguous(), q_out, k_out,
        heads_q, heads_k, head_dim // 2, *strides,
        INVERSE=inverse, BLOCK_HQ=next_power_of_2(heads_q), BLOCK_HK=next_power_of_2(heads_k),
        BLOCK_D=next_power_of_2(head_dim // 2),
    )  # fmt: skip
    return q_out, k_out


# --- operators -------------------------------------------------------------------------------------------------------

_rope_op = define_op(
    "rope",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse) -> (Tensor, Tensor)",
    cpu=_rope_cpu,
    cuda=_rope_triton,
    fake=lambda q, k, cos, sin, positions, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions):
        ctx.save_for_backward(cos, sin, positions)
        return _rope_op(q, k, cos, sin, positions, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: torch.Tensor, dk: torch.Tensor):
        cos, sin, positions = ctx.saved_tensors
        dq, dk = _rope_op(dq, dk, cos, sin, positions, True)
        return dq, dk, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k by the position of each token; returns new contiguous (q, k).

    q [T, Hq, D], k [T, Hk, D], any strides on the first two dimensions (views of a fused qkv are fine); cos and sin
    fp32 [P, D/2], already holding any attention factor of the scaling; positions [T] int32 or int64, 0 <= position <
    P (not checked on a GPU: that would be a synchronisation). Not differentiable in the tables.
    """
    tokens, _, head_dim = q.shape
    if k.shape[0] != tokens or k.shape[2] != head_dim or positions.shape != (tokens,):
        raise ValueError(
            f"rope: q {tuple(q.shape)}, k {tuple(k.shape)} and positions {tuple(positions.shape)} do not agree; "
            "expected [T, Hq, D], [T, Hk, D] and [T]"
        )
    if head_dim % 2 or cos.shape[1:] != (head_dim // 2,) or cos.shape != sin.shape:
        raise ValueError(
            f"rope: tables cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; "
            f"head dimension {head_dim} must be even and needs [P, {head_dim // 2}]"
        )
    return _Rope.apply(q, k, cos, sin, positions)
