"""Own Triton kernels of packed causal attention: varlen, GQA, sliding window, bottom-right alignment, deterministic.

    s_ij = scale * q_i . k_j    lse_i = logsumexp_j(s_ij)    p_ij = exp(s_ij - lse_i)    o_i = sum_j p_ij v_j
    delta_i = do_i . o_i        ds_ij = p_ij * (do_i . v_j - delta_i)
    dq_i = scale * sum_j ds_ij k_j        dk_j = scale * sum_i ds_ij q_i        dv_j = sum_i p_ij do_i

Floor: 4*D FLOPs per visible (query, key, head) forward, 10*D backward (here 14*D: dq and dk/dv each recompute s and dp,
which makes both of them plain sums in a fixed order, without atomics). Saved: q, k, v, o and one fp32 lse per row and
head. Source: FlashAttention-2, arXiv:2307.08691. This is the backend that is always there; the dispatch prefers tuned
ones. A launch covers the tiles that exist, at most T/BLOCK + documents, by way of a tile table made on the device.
May touch: torch, triton.
"""

from __future__ import annotations

import torch

from ._triton import cast, cdiv, kernel, launch, next_power_of_2, operand, tl


@kernel
def _tile_table_kernel(CU, TABLE, documents, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr):
    """Program d writes one row (document, first row within it) per tile of document d."""
    doc = tl.program_id(0)
    earlier = tl.arange(0, BLOCK_N)
    mask = earlier < doc
    lengths = tl.load(CU + earlier + 1, mask, 0) - tl.load(CU + earlier, mask, 0)
    tile = tl.sum((lengths + BLOCK - 1) // BLOCK, 0)
    for start in range(0, tl.load(CU + doc + 1) - tl.load(CU + doc), BLOCK):
        tl.store(TABLE + 2 * tile, doc)
        tl.store(TABLE + 2 * tile + 1, start)
        tile += 1


def _tile_table(cu_seqlens: torch.Tensor, rows: int, block: int) -> torch.Tensor:
    """int32 [rows/block + documents, 2] of (document, first row); unused entries hold document -1."""
    documents = cu_seqlens.shape[0] - 1
    table = torch.full((cdiv(rows, block) + documents, 2), -1, dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _tile_table_kernel, (documents,), cu_seqlens, table, documents,
        BLOCK=block, BLOCK_N=next_power_of_2(documents), num_warps=1,
    )  # fmt: skip
    return table


@kernel
def _document(CU_Q, CU_K, doc):
    """First row in q and in k (int64: rows are multiplied by strides), number of queries and of keys."""
    q0, k0 = tl.load(CU_Q + doc), tl.load(CU_K + doc)
    return q0.to(tl.int64), k0.to(tl.int64), tl.load(CU_Q + doc + 1) - q0, tl.load(CU_K + doc + 1) - k0


@kernel
def _visible(query, key, shift, queries, keys, window, WINDOW: tl.constexpr):
    """Which (query, key) pairs, numbered within their document, take part."""
    last = query + shift
    visible = (query < queries) & (key < keys) & (key <= last)
    if WINDOW:
        visible &= key > last - window
    return visible


@kernel
def _forward_kernel(
    Q, K, V, OUT, LSE, CU_Q, CU_K, TABLE, q_st, q_sh, k_st, k_sh, v_st, v_sh, heads, groups, head_dim, total,
    scale, window,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = Q.dtype.element_ty
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head = tl.program_id(0), tl.program_id(1)
    doc = tl.load(TABLE + 2 * tile)
    if doc >= 0:
        start = tl.load(TABLE + 2 * tile + 1)
        q0, k0, queries, keys = _document(CU_Q, CU_K, doc)
        shift = keys - queries
        m = start + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        in_m = (m[:, None] < queries) & (d[None, :] < head_dim)
        q = tl.load(Q + (q0 + m[:, None]) * q_st + head * q_sh + d[None, :], in_m, 0.0)
        k_ptr = K + k0 * k_st + (head // groups) * k_sh
        v_ptr = V + k0 * v_st + (head // groups) * v_sh

        scale_log2 = scale * LOG2E
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        first = 0
        if WINDOW:
            first = tl.maximum(start + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        for n0 in range(first, tl.minimum(start + BLOCK_M + shift, keys), BLOCK_N):
            in_n = ((n0 + n)[:, None] < keys) & (d[None, :] < head_dim)
            k = tl.load(k_ptr + (n0 + n)[:, None].to(tl.int64) * k_st + d[None, :], in_n, 0.0)
            v = tl.load(v_ptr + (n0 + n)[:, None].to(tl.int64) * v_st + d[None, :], in_n, 0.0)
            s = tl.dot(operand(q, dtype, INTERPRET), tl.trans(operand(k, dtype, INTERPRET)), input_precision=PRECISION)
            visible = _visible(m[:, None], (n0 + n)[None, :], shift, queries, keys, window, WINDOW)
            s = tl.where(visible, s * scale_log2, float("-inf"))
            # A row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it to keep exp2 free of NaN.
            new_max = tl.maximum(row_max, tl.max(s, 1))
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(s - base[:, None])
            decay = tl.exp2(row_max - base)
            row_sum = row_sum * decay + tl.sum(p, 1)
            acc = acc * decay[:, None]
            acc += tl.dot(operand(p, dtype, INTERPRET), operand(v, dtype, INTERPRET), input_precision=PRECISION)
            row_max = new_max
        o = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        rows = q0 + m
        tl.store(OUT + (rows[:, None] * heads + head) * head_dim + d[None, :], cast(o, dtype, INTERPRET), in_m)
        lse = (row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))) / LOG2E
        tl.store(LSE + head * total + rows, lse, m < queries)


@kernel
def _delta_kernel(
    OUT, DO, DELTA, do_st, do_sh, heads, head_dim, total,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):
    """delta = do . o of every head of one row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    mask = (head[:, None] < heads) & (d[None, :] < head_dim)
    o = tl.load(OUT + (row * heads + head[:, None]) * head_dim + d[None, :], mask, 0.0).to(tl.float32)
    do = tl.load(DO + row * do_st + head[:, None] * do_sh + d[None, :], mask, 0.0).to(tl.float32)
    tl.store(DELTA + head * total + row, tl.sum(o * do, 1), head < heads)


@kernel
def _dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, CU_Q, CU_K, TABLE, q_st, q_sh, k_st, k_sh, v_st, v_sh, do_st, do_sh,
    heads, groups, head_dim, total, scale, window,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = Q.dtype.element_ty
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head = tl.program_id(0), tl.program_id(1)
    doc = tl.load(TABLE + 2 * tile)
    if doc >= 0:
        start = tl.load(TABLE + 2 * tile + 1)
        q0, k0, queries, keys = _document(CU_Q, CU_K, doc)
        shift = keys - queries
        m = start + tl.arange(0, BLOCK_M)
        n = tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        rows = q0 + m
        in_m = (m[:, None] < queries) & (d[None, :] < head_dim)
        q = tl.load(Q + rows[:, None] * q_st + head * q_sh + d[None, :], in_m, 0.0)
        do = tl.load(DO + rows[:, None] * do_st + head * do_sh + d[None, :], in_m, 0.0)
        lse = tl.load(LSE + head * total + rows, m < queries, 0.0) * LOG2E
        delta = tl.load(DELTA + head * total + rows, m < queries, 0.0)
        k_ptr = K + k0 * k_st + (head // groups) * k_sh
        v_ptr = V + k0 * v_st + (head // groups) * v_sh

        scale_log2 = scale * LOG2E
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        first = 0
        if WINDOW:
            first = tl.maximum(start + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        for n0 in range(first, tl.minimum(start + BLOCK_M + shift, keys), BLOCK_N):
            in_n = ((n0 + n)[:, None] < keys) & (d[None, :] < head_dim)
            k = tl.load(k_ptr + (n0 + n)[:, None].to(tl.int64) * k_st + d[None, :], in_n, 0.0)
            v = tl.load(v_ptr + (n0 + n)[:, None].to(tl.int64) * v_st + d[None, :], in_n, 0.0)
            k = operand(k, dtype, INTERPRET)
            s = tl.dot(operand(q, dtype, INTERPRET), tl.trans(k), input_precision=PRECISION)
            visible = _visible(m[:, None], (n0 + n)[None, :], shift, queries, keys, window, WINDOW)
            p = tl.where(visible, tl.exp2(s * scale_log2 - lse[:, None]), 0.0)
            dp = tl.dot(
                operand(do, dtype, INTERPRET), tl.trans(operand(v, dtype, INTERPRET)), input_precision=PRECISION
            )
            ds = p * (dp - delta[:, None])
            dq += tl.dot(operand(ds, dtype, INTERPRET), k, input_precision=PRECISION)
        tl.store(DQ + (rows[:, None] * heads + head) * head_dim + d[None, :], cast(dq * scale, dtype, INTERPRET), in_m)


@kernel
def _dkv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, CU_Q, CU_K, TABLE, q_st, q_sh, k_st, k_sh, v_st, v_sh, do_st, do_sh,
    heads, groups, head_dim, total, scale, window,
    WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one kv head: its group of query heads is walked in order, so the sum over it is fixed."""
    dtype: tl.constexpr = Q.dtype.element_ty
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head_k = tl.program_id(0), tl.program_id(1)
    doc = tl.load(TABLE + 2 * tile)
    if doc >= 0:
        start = tl.load(TABLE + 2 * tile + 1)
        q0, k0, queries, keys = _document(CU_Q, CU_K, doc)
        shift = keys - queries
        m = tl.arange(0, BLOCK_M)
        n = start + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        rows_k = k0 + n
        in_n = (n[:, None] < keys) & (d[None, :] < head_dim)
        k = tl.load(K + rows_k[:, None] * k_st + head_k * k_sh + d[None, :], in_n, 0.0)
        v = tl.load(V + rows_k[:, None] * v_st + head_k * v_sh + d[None, :], in_n, 0.0)

        scale_log2 = scale * LOG2E
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        first = tl.maximum(start - shift, 0) // BLOCK_M * BLOCK_M
        stop = queries
        if WINDOW:
            stop = tl.minimum(start + BLOCK_N - 1 + window - shift, queries)
        for head in range(head_k * groups, head_k * groups + groups):
            for m0 in range(first, stop, BLOCK_M):
                in_m = ((m0 + m)[:, None] < queries) & (d[None, :] < head_dim)
                rows = q0 + m0 + m
                q = tl.load(Q + rows[:, None] * q_st + head * q_sh + d[None, :], in_m, 0.0)
                do = tl.load(DO + rows[:, None] * do_st + head * do_sh + d[None, :], in_m, 0.0)
                lse = tl.load(LSE + head * total + rows, m0 + m < queries, 0.0) * LOG2E
                delta = tl.load(DELTA + head * total + rows, m0 + m < queries, 0.0)
                q = operand(q, dtype, INTERPRET)
                do = operand(do, dtype, INTERPRET)
                # Transposed tiles [keys, queries]: p and ds are then left operands, straight from registers.
                s = tl.dot(operand(k, dtype, INTERPRET), tl.trans(q), input_precision=PRECISION)
                visible = _visible((m0 + m)[None, :], n[:, None], shift, queries, keys, window, WINDOW)
                p = tl.where(visible, tl.exp2(s * scale_log2 - lse[None, :]), 0.0)
                dv += tl.dot(operand(p, dtype, INTERPRET), do, input_precision=PRECISION)
                dp = tl.dot(operand(v, dtype, INTERPRET), tl.trans(do), input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk += tl.dot(operand(ds, dtype, INTERPRET), q, input_precision=PRECISION)
        out = (rows_k[:, None] * (heads // groups) + head_k) * head_dim + d[None, :]
        tl.store(DK + out, cast(dk * scale, dtype, INTERPRET), in_n)
        tl.store(DV + out, cast(dv, dtype, INTERPRET), in_n)


def _options(q: torch.Tensor, window: int | None) -> dict:
    return {
        "WINDOW": window is not None,
        "BLOCK_D": max(next_power_of_2(q.shape[2]), 16),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def tile_sizes(which: str, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the "forward", "dq" or "dkv" kernel: the largest tried that sm_90 compiles without a spill
    (tests/kernels/test_compile.py reads that off the machine code)."""
    if dtype == torch.float32 and head_dim <= 128:
        tiles = {"forward": (32, 32, 4, 2), "dq": (32, 32, 4, 2), "dkv": (16, 16, 4, 2)}[which]
    elif dtype == torch.float32:
        tiles = (16, 32, 8, 1)
    elif head_dim <= 64:
        tiles = {"forward": (128, 64, 4, 3), "dq": (64, 64, 4, 2), "dkv": (64, 128, 8, 2)}[which]
    elif head_dim <= 128:
        tiles = {"forward": (128, 64, 8, 3), "dq": (64, 64, 4, 2), "dkv": (32, 128, 8, 2)}[which]
    else:
        tiles = {"forward": (64, 64, 8, 2), "dq": (32, 32, 4, 1), "dkv": (32, 32, 8, 1)}[which]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles))


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _unit_stride(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x if x.stride(2) == 1 else x.contiguous() for x in tensors]


def attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    window: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o [Tq, Hq, D], lse fp32 [Hq, Tq], natural logarithm)."""
    q, k, v = _unit_stride(q, k, v)
    rows, heads, head_dim = q.shape
    tiles = tile_sizes("forward", head_dim, q.dtype)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    table = _tile_table(cu_seqlens_q, rows, tiles["BLOCK_M"])
    launch(
        _forward_kernel, (table.shape[0], heads), q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, table,
        *_strides(q, k, v), heads, heads // k.shape[1], head_dim, rows, scale, window or 0,
        **tiles, **_options(q, window),
    )  # fmt: skip
    return o, lse


def attention_backward_triton(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, window: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v, do = _unit_stride(q, k, v, do)
    rows, heads, head_dim = q.shape
    rows_k, heads_k = k.shape[:2]
    options = _options(q, window)
    delta = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    launch(
        _delta_kernel, (rows,), o, do, delta, *_strides(do), heads, head_dim, rows,
        BLOCK_H=next_power_of_2(heads), BLOCK_D=options["BLOCK_D"],
    )  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    sizes = (heads, heads // heads_k, head_dim, rows, scale, window or 0)
    inputs, strides = (q, k, v, do, lse, delta), _strides(q, k, v, do)
    tiles = tile_sizes("dq", head_dim, q.dtype)
    table = _tile_table(cu_seqlens_q, rows, tiles["BLOCK_M"])
    launch(
        _dq_kernel, (table.shape[0], heads), *inputs, dq, cu_seqlens_q, cu_seqlens_k, table, *strides, *sizes,
        **tiles, **options,
    )  # fmt: skip
    tiles = tile_sizes("dkv", head_dim, q.dtype)
    table = _tile_table(cu_seqlens_k, rows_k, tiles["BLOCK_N"])
    launch(
        _dkv_kernel, (table.shape[0], heads_k), *inputs, dk, dv, cu_seqlens_q, cu_seqlens_k, table, *strides, *sizes,
        **tiles, **options,
    )  # fmt: skip
    return dq, dk, dv
