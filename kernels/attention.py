"""Packed (varlen) causal attention: the dispatch between backends, and the CPU path.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that query i of the same document sees:
    j <= i + (nk - nq)  (causal, bottom-right aligned)  and  j > i + (nk - nq) - window
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import compute_dtype, define_op

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _pieces(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, window: int | None) -> list[tuple[int, int, int, int]]:
    """(q0, q1, k0, k1) per piece of work, bottom-right aligned. Documents longer than the window are cut into blocks of `window`
    queries, each with the keys it can see, so that masks stay small and the work linear in the document length."""
    pieces = []
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        if q1 - q0 > k1 - k0:
            raise ValueError(f"attention: a sequence has {q1 - q0} queries but only {k1 - k0} keys")
        if q1 == q0:
            continue
        if window is None or k1 - k0 <= window:
            pieces.append((q0, q1, k0, k1))
            continue
        shift = (k1 - k0) - (q1 - q0)
        for a in range(q0, q1, window):
            b = min(a + window, q1)
            last = k0 + shift + (b - q0)
            first = max(k0, k0 + shift + (a - q0) + 1 - window)
            pieces.append((a, b, first, last))
    return pieces


def _mask(queries: int, keys: int, window: int | None, q: torch.Tensor) -> torch.Tensor | None:
    """Additive mask [queries, keys], or None where every query sees every key (a decoding step)."""
    if queries == 1:
        return None
    last = torch.arange(keys - queries, keys).unsqueeze(1)
    key = torch.arange(keys)
    hidden = key > last
    if window is not None:
        hidden |= key <= last - window
    return q.new_zeros(queries, keys).masked_fill_(hidden, float("-inf"))


def _causal(piece: tuple[int, int, int, int], window: int | None) -> bool:
    q0, q1, k0, k1 = piece
    return q1 - q0 == k1 - k0 and (window is None or k1 - k0 <= window)


def _heads_first(x_LHD: torch.Tensor) -> torch.Tensor:
    return x_LHD.transpose(0, 1).unsqueeze(0)


def _attention_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, window, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q.dtype))
    # Document by document on views of the packed tensors: batching padded documents was measured no faster, and gathers.
    for piece in _pieces(cu_seqlens_q, cu_seqlens_k, window):
        q0, q1, k0, k1 = piece
        causal = _causal(piece, window)
        mask = None if causal else _mask(q1 - q0, k1 - k0, window, q)
        o_p, lse_p = _flash_cpu(
            _heads_first(q[q0:q1]), _heads_first(k[k0:k1]), _heads_first(v[k0:k1]), 0.0, causal, attn_mask=mask, scale=scale
        )
        o[q0:q1], lse[q0:q1] = o_p[0].transpose(0, 1), lse_p[0].transpose(0, 1)
    return o, lse


def _attention_backward_cpu(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, window, scale):
    heads_k = k.shape[1]
    groups = q.shape[1] // heads_k
    k_full, v_full = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk = torch.zeros(k.shape, dtype=lse.dtype)
    dv = torch.zeros(v.shape, dtype=lse.dtype)
    for piece in _pieces(cu_seqlens_q, cu_seqlens_k, window):
        q0, q1, k0, k1 = piece
        causal = _causal(piece, window)
        mask = None if causal else _mask(q1 - q0, k1 - k0, window, q)
        dq_p, dk_p, dv_p = _flash_cpu_backward(
            _heads_first(do[q0:q1]), _heads_first(q[q0:q1]), _heads_first(k_full[k0:k1]), _heads_first(v_full[k0:k1]),
            _heads_first(o[q0:q1]), _heads_first(lse[q0:q1]).squeeze(0).unsqueeze(0), 0.0, causal, attn_mask=mask, scale=scale,
        )  # fmt: skip
        dq[q0:q1] = dq_p[0].transpose(0, 1)
        for total, part in ((dk, dk_p), (dv, dv_p)):
            part_LHGD = part[0].transpose(0, 1).unflatten(1, (heads_k, groups))
            total[k0:k1] += part_LHGD.sum(2, dtype=total.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


_forward_op = define_op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k, SymInt? window, float scale)"
    " -> (Tensor, Tensor)",
    cpu=_attention_cpu,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=compute_dtype(q.dtype))),
)
_backward_op = define_op(
    "attention_backward",
    "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q,"
    " SymInt max_k, SymInt? window, float scale) -> (Tensor, Tensor, Tensor)",
    cpu=_attention_backward_cpu,
    fake=lambda do, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, window, scale):
        o, lse = _forward_op(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, window, scale)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.args = (max_q, max_k, window, scale)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: torch.Tensor):
        q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        dq, dk, dv = _backward_op(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, *ctx.args)
        return dq, dk, dv, None, None, None, None, None, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of packed documents -> o [Tq, Hq, D] in q.dtype."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale)


def attention_backend(device_type: str) -> str:
    """Name of the backend that `attention` uses on a device type: for manifests."""
    return "cpu-sdpa-per-document"
