"""Rotary embedding of the fused projection [q | k | v], in place or behind Qwen3's norms of each head.

    q, k: rotated as in rope.py; with norms y = rotate(x * rstd * w), rstd = (mean(x^2) + eps)^-1/2 over one head
    backward, n = x * rstd, m = rotate^-1(dy), g = m * w:  dx = rstd * (g - n * mean(g * n))    dw = sum(m * n)
    v: a view of the projection; its gradient is copied

Floor (bf16, one token, N = (Hq + 2 Hk) * D): forward in place or normalised reads and writes q and k, 4 (Hq + Hk) D
bytes; backward reads dq, dk, dv and writes dqkv whole, 4 N bytes, plus 2 (Hq + Hk) D for the saved projection behind
the norms. No concatenation, no zero fill. Saved: positions; behind the norms the projection and rstd per head.
Source: Su et al. 2021, arXiv:2104.09864; Qwen3 technical report, arXiv:2505.09388; arithmetic in fp32, rounded once
(`exact_hf`: where transformers rounds). May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, persistent_programs, round_to, tl
from .rope import (
    BLOCK_TOKENS,
    _rope_op,
    check_rotation,
    gather_tables,
    given_heads,
    head_pointers,
    head_tile,
    load_tables,
    rotate,
    rotate_cpu,
    rotate_kernel,
    rotation,
    unit_columns,
)

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _split(qkv: torch.Tensor, heads_q: int, heads_k: int) -> Heads:
    """Views q [T, Hq, D], k [T, Hk, D], v [T, Hk, D] of qkv [T, (Hq + 2 Hk) * D]."""
    heads = heads_q + 2 * heads_k
    x_THD = qkv.unflatten(1, (heads, qkv.shape[1] // heads))
    return x_THD[:, :heads_q], x_THD[:, heads_q : heads_q + heads_k], x_THD[:, heads_q + heads_k :]


# --- torch reference -------------------------------------------------------------------------------------------------


def _rope_qkv_cpu(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    exact_hf: bool,
) -> None:
    tables = gather_tables(cos, sin, positions, qkv.dtype, False, exact_hf)
    for x in _split(qkv, heads_q, heads_k)[:2]:
        rotate_cpu(x, x, *tables, exact_hf)


def _rope_qkv_backward_cpu(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    exact_hf: bool,
) -> torch.Tensor:
    dqkv = _empty_gradient(dq, dk, dv, cos, positions, heads_q, heads_k)
    tables = gather_tables(cos, sin, positions, dqkv.dtype, True, exact_hf)
    *rotated, dv_out = _split(dqkv, heads_q, heads_k)
    for dy, dx in zip((dq, dk), rotated):
        if dy is None:
            dx.zero_()
        else:
            rotate_cpu(dy, dx, *tables, exact_hf)
    dv_out.copy_(dv) if dv is not None else dv_out.zero_()
    return dqkv


def _norm_rope_qkv_cpu(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    eps: float,
    exact_hf: bool,
) -> Heads:
    acc = compute_dtype(qkv.dtype)
    tables = gather_tables(cos, sin, positions, qkv.dtype, False, exact_hf)
    outs, rstds = [], []
    for x, weight in zip(_split(qkv, heads_q, heads_k), (q_norm, k_norm)):
        x_THD = x.to(acc)
        rstd = x_THD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = (x_THD * rstd).to(x.dtype).mul(weight).to(x.dtype) if exact_hf else x_THD.mul(rstd).mul_(weight)
        out = torch.empty(x.shape, dtype=x.dtype)
        rotate_cpu(y, out, *tables, exact_hf)
        outs.append(out)
        rstds.append(rstd.squeeze(-1))
    return outs[0], outs[1], torch.cat(rstds, 1)


def _norm_rope_qkv_backward_cpu(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    qkv: torch.Tensor,
    rstd: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    exact_hf: bool,
) -> Heads:
    acc = rstd.dtype
    # exact_hf rounds what the rotation hands to the norm
    dq, dk, dv = (dy if dy is None or exact_hf else dy.to(acc) for dy in (dq, dk, dv))
    dqkv = _rope_qkv_backward_cpu(dq, dk, dv, cos, sin, positions, heads_q, heads_k, exact_hf).to(acc)
    dws = []
    rstds = rstd.unsqueeze(-1).split((heads_q, heads_k), 1)
    for m, x, r, weight in zip(_split(dqkv, heads_q, heads_k), _split(qkv, heads_q, heads_k), rstds, (q_norm, k_norm)):
        w, dw = weight.to(acc), torch.zeros(len(weight), dtype=acc)
        for m_block, x_block, r_block in zip(*(t.split(BLOCK_TOKENS) for t in (m, x, r))):
            n = x_block * r_block
            t = (m_block * n).flatten(0, 1)  # both reductions are of this one product
            dw += t.sum(0)
            c = torch.mv(t, w).div_(len(w)).view(r_block.shape)
            m_block.mul_(w).addcmul_(n, c, value=-1).mul_(r_block)
        dws.append(dw.to(weight.dtype))
    return dqkv.to(qkv.dtype), dws[0], dws[1]


def _empty_gradient(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cos: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
) -> torch.Tensor:
    given = next(dy for dy in (dq, dk, dv) if dy is not None)
    return given.new_empty(positions.shape[0], (heads_q + 2 * heads_k) * 2 * cos.shape[1])


# --- Triton ----------------------------------------------------------------------------------------------------------


def _rope_qkv_triton(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    exact_hf: bool,
) -> None:
    qk = _split(qkv, heads_q, heads_k)[:2]
    grid, args, constants = rotation(qk, qk, cos, sin, positions, False, exact_hf)
    launch(rotate_kernel, grid, *args, **constants)


def _rope_qkv_backward_triton(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    exact_hf: bool,
) -> torch.Tensor:
    dqkv = _empty_gradient(dq, dk, dv, cos, positions, heads_q, heads_k)
    results = _split(dqkv, heads_q, heads_k)
    grid, args, constants = rotation((dq, dk, dv), results, cos, sin, positions, True, exact_hf)
    launch(rotate_kernel, grid, *args, **constants)
    return dqkv


@kernel
def _norm_forward_kernel(
    QKV, WQ, WK, COS, SIN, POSITIONS, QO, KO, RSTD, stride_t, eps,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HALF: tl.constexpr, EXACT_HF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A block of the heads of q and k of one token."""
    dtype: tl.constexpr = QO.dtype.element_ty
    heads: tl.constexpr = HEADS_Q + HEADS_K
    blocks: tl.constexpr = (heads + BLOCK_H - 1) // BLOCK_H
    token = (tl.program_id(0) // blocks).to(tl.int64)
    head = ((tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
    col = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < heads) & (col < HALF)
    x = QKV + token * stride_t + head * (2 * HALF) + col
    x1 = tl.load(x, mask, 0.0).to(tl.float32)
    x2 = tl.load(x + HALF, mask, 0.0).to(tl.float32)
    cos, sin = load_tables(COS, SIN, POSITIONS, token, col, HALF, False)
    w1, w2 = _load_weights(WQ, WK, head, col, HEADS_Q, HALF)
    square = tl.sum(x1 * x1, 1, keep_dims=True) + tl.sum(x2 * x2, 1, keep_dims=True)
    rstd = tl.rsqrt(square / (2 * HALF) + eps)
    tl.store(RSTD + token * heads + head, rstd, head < heads)
    x1, x2 = x1 * rstd, x2 * rstd
    if EXACT_HF:
        x1 = round_to(round_to(x1, dtype, INTERPRET) * w1, dtype, INTERPRET)
        x2 = round_to(round_to(x2, dtype, INTERPRET) * w2, dtype, INTERPRET)
    else:
        x1, x2 = x1 * w1, x2 * w2
    y1, y2 = rotate(x1, x2, cos, sin, dtype, EXACT_HF, INTERPRET)
    y = head_pointers(
        QO, KO, KO, token, head, col, HEADS_Q * 2 * HALF, 2 * HALF, HEADS_K * 2 * HALF, 2 * HALF, 0, 0,
        HEADS_Q, HEADS_K,
    )  # fmt: skip
    tl.store(y, cast(y1, dtype, INTERPRET), mask)
    tl.store(y + HALF, cast(y2, dtype, INTERPRET), mask)


@kernel
def _load_weights(WQ, WK, head, col, HEADS_Q: tl.constexpr, HALF: tl.constexpr):
    """Both halves of the weight of each head, fp32."""
    q1 = tl.load(WQ + col, col < HALF, 0.0).to(tl.float32)
    q2 = tl.load(WQ + HALF + col, col < HALF, 0.0).to(tl.float32)
    k1 = tl.load(WK + col, col < HALF, 0.0).to(tl.float32)
    k2 = tl.load(WK + HALF + col, col < HALF, 0.0).to(tl.float32)
    return tl.where(head < HEADS_Q, q1, k1), tl.where(head < HEADS_Q, q2, k2)


@kernel
def _norm_backward_kernel(
    DQ, DK, DV, QKV, RSTD, WQ, WK, COS, SIN, POSITIONS, DQKV, DW, tokens, programs,
    dq_stride_t, dq_stride_h, dk_stride_t, dk_stride_h, dv_stride_t, dv_stride_h, stride_t,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, HALF: tl.constexpr,
    HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr, EXACT_HF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A persistent program walks over the tokens with one block of heads and keeps its part of dw in registers."""
    dtype: tl.constexpr = DQKV.dtype.element_ty
    heads: tl.constexpr = HEADS_Q + 2 * HEADS_K
    blocks: tl.constexpr = (heads + BLOCK_H - 1) // BLOCK_H
    head = ((tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
    col = tl.arange(0, BLOCK_D)[None, :]
    turns = head < HEADS_Q + HEADS_K
    mask = (head < heads) & (col < HALF)
    present = mask & given_heads(head, HEADS_Q, HEADS_K, HAS_Q, HAS_K, HAS_V)
    w1, w2 = _load_weights(WQ, WK, head, col, HEADS_Q, HALF)
    dw1 = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    dw2 = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for token in tl.range((tl.program_id(0) // blocks).to(tl.int64), tokens, programs, num_stages=STAGES):
        x = QKV + token * stride_t + head * (2 * HALF) + col
        dy = head_pointers(
            DQ, DK, DV, token, head, col, dq_stride_t, dq_stride_h, dk_stride_t, dk_stride_h, dv_stride_t,
            dv_stride_h, HEADS_Q, HEADS_K,
        )  # fmt: skip
        x1 = tl.load(x, mask & turns, 0.0).to(tl.float32)
        x2 = tl.load(x + HALF, mask & turns, 0.0).to(tl.float32)
        dy1 = tl.load(dy, present, 0.0).to(tl.float32)
        dy2 = tl.load(dy + HALF, present, 0.0).to(tl.float32)
        rstd = tl.load(RSTD + token * (HEADS_Q + HEADS_K) + head, turns, 0.0)
        cos, sin = load_tables(COS, SIN, POSITIONS, token, col, HALF, True)
        m1, m2 = rotate(dy1, dy2, cos, sin, dtype, EXACT_HF, INTERPRET)
        if EXACT_HF:
            m1, m2 = round_to(m1, dtype, INTERPRET), round_to(m2, dtype, INTERPRET)
        n1, n2 = x1 * rstd, x2 * rstd
        dw1 += m1 * n1
        dw2 += m2 * n2
        g1, g2 = m1 * w1, m2 * w2
        mean = (tl.sum(g1 * n1, 1, keep_dims=True) + tl.sum(g2 * n2, 1, keep_dims=True)) / (2 * HALF)
        dx1 = tl.where(turns, rstd * (g1 - n1 * mean), dy1)
        dx2 = tl.where(turns, rstd * (g2 - n2 * mean), dy2)
        out = DQKV + token * (heads * 2 * HALF) + head * (2 * HALF) + col
        tl.store(out, cast(dx1, dtype, INTERPRET), mask)
        tl.store(out + HALF, cast(dx2, dtype, INTERPRET), mask)
    out = DW + tl.program_id(0).to(tl.int64) * (4 * HALF) + col
    is_q = head < HEADS_Q
    tl.store(out, tl.sum(tl.where(is_q, dw1, 0.0), 0, keep_dims=True), col < HALF)
    tl.store(out + HALF, tl.sum(tl.where(is_q, dw2, 0.0), 0, keep_dims=True), col < HALF)
    tl.store(out + 2 * HALF, tl.sum(tl.where(is_q, 0.0, dw1), 0, keep_dims=True), col < HALF)
    tl.store(out + 3 * HALF, tl.sum(tl.where(is_q, 0.0, dw2), 0, keep_dims=True), col < HALF)


def _norm_rope_qkv_triton(
    qkv: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    eps: float,
    exact_hf: bool,
) -> Heads:
    q, k, _ = _split(qkv, heads_q, heads_k)
    tokens, heads, head_dim = q.shape[0], heads_q + heads_k, q.shape[2]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rstd = torch.empty(tokens, heads, dtype=torch.float32, device=qkv.device)
    tile = head_tile(heads, head_dim)
    launch(
        _norm_forward_kernel, (tokens * cdiv(heads, tile["BLOCK_H"]),), qkv, q_norm.contiguous(), k_norm.contiguous(),
        cos.contiguous(), sin.contiguous(), positions.contiguous(), q_out, k_out, rstd, qkv.stride(0), eps,
        HEADS_Q=heads_q, HEADS_K=heads_k, HALF=head_dim // 2, EXACT_HF=exact_hf, **tile,
    )  # fmt: skip
    return q_out, k_out, rstd


def _norm_rope_qkv_backward_triton(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    qkv: torch.Tensor,
    rstd: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    exact_hf: bool,
) -> Heads:
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    tokens, heads, head_dim = qkv.shape[0], heads_q + 2 * heads_k, q_norm.shape[0]
    tile = head_tile(heads, head_dim)
    blocks = cdiv(heads, tile["BLOCK_H"])
    # Registers allow 16 warps an SM, which hide each other's reductions; with more, a few would run alone at the end.
    # Their partial sums are added in a fixed order.
    programs = max(persistent_programs(qkv, per_sm=16 // tile["num_warps"]) // blocks, 1)
    dw = torch.empty(programs * blocks, 2, head_dim, dtype=torch.float32, device=qkv.device)
    dys = (dq, dk, dv)
    given = [out if dy is None else unit_columns(dy) for dy, out in zip(dys, _split(dqkv, heads_q, heads_k))]
    has_q, has_k, has_v = (dy is not None for dy in dys)
    launch(
        _norm_backward_kernel, (programs * blocks,), *given, qkv, rstd, q_norm.contiguous(), k_norm.contiguous(),
        cos.contiguous(), sin.contiguous(), positions.contiguous(), dqkv, dw, tokens, programs,
        *(stride for x in given for stride in x.stride()[:2]), qkv.stride(0),
        HEADS_Q=heads_q, HEADS_K=heads_k, HALF=head_dim // 2, HAS_Q=has_q, HAS_K=has_k, HAS_V=has_v,
        EXACT_HF=exact_hf, STAGES=3, **tile,
    )  # fmt: skip
    dw = dw.sum(0)
    return dqkv, dw[0].to(q_norm.dtype), dw[1].to(k_norm.dtype)


# --- operators -------------------------------------------------------------------------------------------------------

_rope_qkv_op = define_op(
    "rope_qkv",
    "(Tensor(a!) qkv, Tensor cos, Tensor sin, Tensor positions, int heads_q, int heads_k, bool exact_hf) -> ()",
    cpu=_rope_qkv_cpu,
    cuda=_rope_qkv_triton,
    fake=lambda qkv, *_: None,
)
_rope_qkv_backward_op = define_op(
    "rope_qkv_backward",
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor cos, Tensor sin, Tensor positions, int heads_q, int heads_k, "
    "bool exact_hf) -> Tensor",
    cpu=_rope_qkv_backward_cpu,
    cuda=_rope_qkv_backward_triton,
    fake=lambda dq, dk, dv, cos, sin, positions, heads_q, heads_k, exact_hf: _empty_gradient(
        dq, dk, dv, cos, positions, heads_q, heads_k
    ),
)
_norm_rope_qkv_op = define_op(
    "norm_rope_qkv",
    "(Tensor qkv, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin, Tensor positions, int heads_q, int heads_k, "
    "float eps, bool exact_hf) -> (Tensor, Tensor, Tensor)",
    cpu=_norm_rope_qkv_cpu,
    cuda=_norm_rope_qkv_triton,
    fake=lambda qkv, q_norm, k_norm, cos, sin, positions, heads_q, heads_k, *_: (
        qkv.new_empty(qkv.shape[0], heads_q, q_norm.shape[0]),
        qkv.new_empty(qkv.shape[0], heads_k, q_norm.shape[0]),
        qkv.new_empty(qkv.shape[0], heads_q + heads_k, dtype=compute_dtype(qkv.dtype)),
    ),
)
_norm_rope_qkv_backward_op = define_op(
    "norm_rope_qkv_backward",
    "(Tensor? dq, Tensor? dk, Tensor? dv, Tensor qkv, Tensor rstd, Tensor q_norm, Tensor k_norm, Tensor cos, "
    "Tensor sin, Tensor positions, int heads_q, int heads_k, bool exact_hf) -> (Tensor, Tensor, Tensor)",
    cpu=_norm_rope_qkv_backward_cpu,
    cuda=_norm_rope_qkv_backward_triton,
    fake=lambda dq, dk, dv, qkv, rstd, q_norm, k_norm, *_: (
        qkv.new_empty(qkv.shape),
        q_norm.new_empty(q_norm.shape),
        k_norm.new_empty(k_norm.shape),
    ),
)


class _RopeQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, positions, heads_q, heads_k, exact_hf, in_place):
        ctx.save_for_backward(cos, sin, positions)
        ctx.heads, ctx.exact_hf = (heads_q, heads_k), exact_hf
        ctx.set_materialize_grads(False)
        q, k, v = _split(qkv, heads_q, heads_k)
        if in_place:
            _rope_qkv_op(qkv, cos, sin, positions, heads_q, heads_k, exact_hf)
            torch.autograd.graph.increment_version(qkv)  # who saved it before must notice
            return q, k, v
        return *_rope_op(q, k, cos, sin, positions, False, exact_hf), v

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: torch.Tensor | None, dk: torch.Tensor | None, dv: torch.Tensor | None):
        if dq is dk is dv is None:
            return None, None, None, None, None, None, None, None
        dqkv = _rope_qkv_backward_op(dq, dk, dv, *ctx.saved_tensors, *ctx.heads, ctx.exact_hf)
        return dqkv, None, None, None, None, None, None, None


class _NormRopeQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_norm, k_norm, cos, sin, positions, heads_q, heads_k, eps, exact_hf):
        q, k, rstd = _norm_rope_qkv_op(qkv, q_norm, k_norm, cos, sin, positions, heads_q, heads_k, eps, exact_hf)
        ctx.save_for_backward(qkv, rstd, q_norm, k_norm, cos, sin, positions)
        ctx.heads, ctx.exact_hf = (heads_q, heads_k), exact_hf
        ctx.set_materialize_grads(False)
        return q, k, _split(qkv, heads_q, heads_k)[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: torch.Tensor | None, dk: torch.Tensor | None, dv: torch.Tensor | None):
        if dq is dk is dv is None:
            return None, None, None, None, None, None, None, None, None, None
        grads = _norm_rope_qkv_backward_op(dq, dk, dv, *ctx.saved_tensors, *ctx.heads, ctx.exact_hf)
        return *grads, None, None, None, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def rope_qkv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    heads_q: int,
    heads_k: int,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float | None = None,
    exact_hf: bool = False,
) -> Heads:
    """Rotate the q and k of a fused projection in place; returns views (q [T, Hq, D], k [T, Hk, D], v [T, Hk, D]).

    With q_norm and k_norm every head of q and k is normalised before it is rotated (Qwen3); q and k are then new, qkv
    stays as it is, and v is still a view of it.

    Args:
        qkv: [T, (Hq + 2 Hk) * D], columns contiguous, rows at any distance. Without norms it is given up: what it held
            is gone, and what autograd saved of it before raises in its backward. Under torch.compile nothing is written
            in place and the results are the same.
        cos, sin: fp32 [P, D/2], already holding any attention factor of the scaling.
        positions: [T] int32 or int64, 0 <= position < P (not checked on a GPU: that would be a synchronisation).
        q_norm, k_norm: [D] in qkv.dtype or fp32, both or neither; eps is added to the mean of squares.
        exact_hf: round as transformers does: the rotation at cos, sin, products and sum (the same bits in bf16 and
            fp16, forward and backward), the norm before and after its weight (its mean is summed in its own order).

    Raises:
        ValueError: an argument does not fit; qkv is a leaf that requires grad, or was rotated before and not written
            since (checkpointing of a region that begins between the projection and the rotation would do that).

    Not differentiable in the tables. Source: transformers' Qwen2Attention and Qwen3Attention.
    """
    head_dim = _check(qkv, heads_q, heads_k)
    check_rotation("rope_qkv", qkv, head_dim, cos, sin, positions)
    if q_norm is not None and k_norm is not None and eps is not None:
        for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
            check_tensor(f"rope_qkv: {name}", weight, (head_dim,), dtype=(qkv.dtype, torch.float32), like=qkv)
        return _NormRopeQKV.apply(qkv, q_norm, k_norm, cos, sin, positions, heads_q, heads_k, eps, exact_hf)
    if not (q_norm is k_norm is eps is None):
        raise ValueError("rope_qkv: q_norm, k_norm and eps go together; give all three or none")
    in_place = not torch.compiler.is_compiling()
    if not in_place or not (torch.is_grad_enabled() and qkv.requires_grad):
        return _RopeQKV.apply(qkv, cos, sin, positions, heads_q, heads_k, exact_hf, in_place)
    if (qkv if qkv._base is None else qkv._base).is_leaf:
        raise ValueError("rope_qkv: qkv is (a view of) a leaf that requires grad, it cannot be rotated in place")
    if getattr(qkv, "_rotated_version", None) == qkv._version:
        raise ValueError("rope_qkv: qkv has been rotated already; a checkpointed region must begin at the projection")
    rotated = _RopeQKV.apply(qkv, cos, sin, positions, heads_q, heads_k, exact_hf, True)
    qkv._rotated_version = qkv._version  # type: ignore[attr-defined]
    return rotated


def _check(qkv: torch.Tensor, heads_q: int, heads_k: int) -> int:
    """The head dimension; ValueError unless qkv is rows of whole heads, each row in its own memory."""
    heads = heads_q + 2 * heads_k
    if heads_q < 1 or heads_k < 1:
        raise ValueError(f"rope_qkv: heads_q is {heads_q} and heads_k is {heads_k}; allowed: at least 1 each")
    check_tensor("rope_qkv: qkv", qkv, dtype=float_dtypes(qkv))
    if qkv.ndim != 2 or qkv.shape[1] % heads:
        raise ValueError(f"rope_qkv: qkv has shape {tuple(qkv.shape)}; expected (*, a multiple of {heads} heads)")
    if qkv.stride(1) != 1 or (qkv.shape[0] > 1 and qkv.stride(0) < qkv.shape[1]):
        raise ValueError(
            f"rope_qkv: qkv has strides {qkv.stride()}; allowed: contiguous columns, rows that do not overlap"
        )
    return qkv.shape[1] // heads
