"""Own Triton kernels of packed causal attention: varlen, GQA, sliding window, bottom-right alignment, deterministic.

    s_ij = scale * q_i . k_j    lse_i = logsumexp_j(s_ij)    p_ij = exp(s_ij - lse_i)    o_i = sum_j p_ij v_j
    delta_i = do_i . o_i        ds_ij = p_ij * (do_i . v_j - delta_i)
    dq_i = scale * sum_j ds_ij k_j        dk_j = scale * sum_i ds_ij q_i        dv_j = sum_i p_ij do_i

Floor: 4*D FLOPs per visible (query, key, head) forward, 10*D backward (here 14*D: dq and dk/dv each recompute s and dp,
which makes both of them plain sums in a fixed order, without atomics). Saved: q, k, v, o and one fp32 lse per row and
head. Source: FlashAttention-2, arXiv:2307.08691. This is the backend that is always there; the dispatch prefers tuned
ones. May touch: torch, triton.

How the work is laid out. A launch covers the tiles that exist, at most T/BLOCK + documents, by way of a tile table made
on the device. Blocks that every query of a tile sees whole (nearly all of them in a long document) run without a mask;
the diagonal, the window's edge and the document's end go through a second, masked loop. Tiles are read through tensor
descriptors: on Hopper one thread has the TMA unit copy a block, so that registers hold accumulators instead of
addresses. The query heads of one kv head run side by side, and a document's longest tiles first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._triton import cast, cdiv, kernel, launch, next_power_of_2, operand, tl

# --- tiles -----------------------------------------------------------------------------------------------------------


@kernel
def _tile_table_kernel(
    CU, TABLE, documents, tiles, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRET: tl.constexpr
):
    """Program d writes (d, first row within it) per tile of document d; the last one (0, -1) where no tile is left."""
    doc = tl.program_id(0)
    earlier = tl.arange(0, BLOCK_N)
    mask = earlier < doc
    lengths = tl.load(CU + earlier + 1, mask, 0) - tl.load(CU + earlier, mask, 0)
    tile = tl.sum((lengths + BLOCK - 1) // BLOCK, 0)
    if doc < documents:
        for start in range(0, tl.load(CU + doc + 1) - tl.load(CU + doc), BLOCK):
            tl.store(TABLE + 2 * tile, doc)
            tl.store(TABLE + 2 * tile + 1, start)
            tile += 1
    else:
        for unused in range(tile, tiles):
            tl.store(TABLE + 2 * unused, 0)
            tl.store(TABLE + 2 * unused + 1, -1)


def _tile_table(cu_seqlens: torch.Tensor, rows: int, block: int) -> torch.Tensor:
    """int32 [rows/block + documents, 2] of (document, first row within it); first row -1: no such tile."""
    documents = cu_seqlens.shape[0] - 1
    tiles = cdiv(rows, block) + documents
    table = torch.empty((tiles, 2), dtype=torch.int32, device=cu_seqlens.device)
    launch(
        _tile_table_kernel, (documents + 1,), cu_seqlens, table, documents, tiles,
        BLOCK=block, BLOCK_N=next_power_of_2(documents), num_warps=1,
    )  # fmt: skip
    return table


@kernel
def _tile(TABLE, CU_Q, CU_K, tile):
    """First row of a tile within its document (-1: no such tile); the document's first row and length in q, in k."""
    doc, start = tl.load(TABLE + 2 * tile), tl.load(TABLE + 2 * tile + 1)
    q0, k0 = tl.load(CU_Q + doc), tl.load(CU_K + doc)
    return start, q0, tl.load(CU_Q + doc + 1) - q0, k0, tl.load(CU_K + doc + 1) - k0


@kernel
def _query_tile(tiles, groups):
    """(tile, head) of this program: the heads of a kv head side by side, the last tiles, which see most keys, first."""
    program = tl.program_id(0)
    head = program // (tiles * groups) * groups + program % groups
    return tiles - 1 - program % (tiles * groups) // groups, head


@kernel
def _rows(X, row, head, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr):
    """BLOCK rows of one head as an operand of tl.dot; zeros past the tensor's last row and past head_dim."""
    return operand(X.load([head, row, 0]).reshape(BLOCK, BLOCK_D), X.dtype, INTERPRET)


@kernel
def _store(
    OUT, x, row, rows, head, heads,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The first `rows` rows of x to OUT [*, heads, HEAD_DIM] from `row` on."""
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    out = OUT + (row.to(tl.int64) * heads + head) * HEAD_DIM + i[:, None] * (heads * HEAD_DIM) + d[None, :]
    tl.store(out, cast(x, OUT.dtype.element_ty, INTERPRET), (i < rows)[:, None] & (d < HEAD_DIM)[None, :])


@kernel
def _visible(last, key, window, WINDOW: tl.constexpr):
    """Whether a query whose last key is `last` sees `key`: 0 <= last - key, and last - key < window, in one test."""
    if WINDOW:
        return (last - key).to(tl.uint32, bitcast=True) < window
    else:
        return key <= last


@kernel
def _key_blocks(start, shift, keys, window, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, edge, full, stop): a tile of queries sees keys in [first, stop), each of its rows all in [edge, full)."""
    stop = tl.minimum(start + BLOCK_M + shift, keys)
    full = (start + shift + 1) // BLOCK_N * BLOCK_N
    first, edge = 0, 0
    if WINDOW:
        first = tl.maximum(start + shift - window + 1, 0) // BLOCK_N * BLOCK_N
        edge = (tl.maximum(start + BLOCK_M + shift - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        edge = tl.minimum(edge, stop)
        full = tl.maximum(full, edge)
    return first, edge, full, stop


# --- forward ---------------------------------------------------------------------------------------------------------


@kernel
def _attend(
    acc, row_max, row_sum, q, K, V, k0, head_k, last, keys, window, scale_log2, first, stop, edge, skip,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key blocks [first, stop); `skip` keys are left out at `edge`."""
    for n0 in range(first, stop, BLOCK_N):
        if MASKED:
            n0 += tl.where(n0 < edge, 0, skip)
        k = _rows(K, k0 + n0, head_k, BLOCK_N, BLOCK_D, INTERPRET)
        v = _rows(V, k0 + n0, head_k, BLOCK_N, BLOCK_D, INTERPRET)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            n = n0 + tl.arange(0, BLOCK_N)
            s = tl.where(_visible(last[:, None], n[None, :], window, WINDOW), s, float("-inf"))
            v = tl.where((n < keys)[:, None], v, 0.0)  # the next document's rows: 0 * NaN would be NaN
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        base = new_max
        if MASKED:  # a row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it against NaN
            base = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s * scale_log2 - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = tl.dot(operand(p, K.dtype, INTERPRET), v, acc * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@kernel
def _forward_kernel(
    OUT, LSE, Q, K, V, CU_Q, CU_K, TABLE, tiles, heads, groups, total, scale, window,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head = _query_tile(tiles, groups)
    start, q0, queries, k0, keys = _tile(TABLE, CU_Q, CU_K, tile)
    if start >= 0:
        shift, head_k, scale_log2 = keys - queries, head // groups, scale * LOG2E
        m = start + tl.arange(0, BLOCK_M)
        q = _rows(Q, q0 + start, head, BLOCK_M, BLOCK_D, INTERPRET)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        first, edge, full, stop = _key_blocks(start, shift, keys, window, WINDOW, BLOCK_M, BLOCK_N)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, K, V, k0, head_k, m + shift, keys, window, scale_log2, edge, full, 0, 0,
            WINDOW, False, BLOCK_N, BLOCK_D, PRECISION, INTERPRET,
        )  # fmt: skip
        skip = full - edge
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q, K, V, k0, head_k, m + shift, keys, window, scale_log2, first, stop - skip,
            edge, skip, WINDOW, True, BLOCK_N, BLOCK_D, PRECISION, INTERPRET,
        )  # fmt: skip
        o = acc * (1.0 / row_sum)[:, None]
        _store(OUT, o, q0 + start, queries - start, head, heads, HEAD_DIM, BLOCK_M, BLOCK_D, INTERPRET)
        lse = LSE + head.to(tl.int64) * total + q0 + m
        tl.store(lse, (row_max + tl.log2(row_sum)) / LOG2E, m < queries)


# --- backward --------------------------------------------------------------------------------------------------------
# Unlike the forward pass these kernels let 0 * NaN through from a neighbouring document: one NaN spoils a step anyway.


@kernel
def _dq_steps(
    dq, q, do, lse, delta, K, V, k0, head_k, last, window, scale_log2, first, stop, edge, skip,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    for n0 in range(first, stop, BLOCK_N):
        if MASKED:
            n0 += tl.where(n0 < edge, 0, skip)
        k = _rows(K, k0 + n0, head_k, BLOCK_N, BLOCK_D, INTERPRET)
        v = _rows(V, k0 + n0, head_k, BLOCK_N, BLOCK_D, INTERPRET)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(s * scale_log2 - lse[:, None]) * (dp - delta[:, None])
        if MASKED:
            n = n0 + tl.arange(0, BLOCK_N)
            ds = tl.where(_visible(last[:, None], n[None, :], window, WINDOW), ds, 0.0)
        dq = tl.dot(operand(ds, K.dtype, INTERPRET), k, dq, input_precision=PRECISION)
    return dq


@kernel
def _dq_kernel(
    DQ, DELTA, Q, K, V, OUT, DO, LSE, CU_Q, CU_K, TABLE, tiles, heads, groups, total, scale, window,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the next kernel."""
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, head = _query_tile(tiles, groups)
    start, q0, queries, k0, keys = _tile(TABLE, CU_Q, CU_K, tile)
    if start >= 0:
        shift, head_k, scale_log2 = keys - queries, head // groups, scale * LOG2E
        m = start + tl.arange(0, BLOCK_M)
        row = head.to(tl.int64) * total + q0
        q = _rows(Q, q0 + start, head, BLOCK_M, BLOCK_D, INTERPRET)
        do = _rows(DO, q0 + start, head, BLOCK_M, BLOCK_D, INTERPRET)
        o = _rows(OUT, q0 + start, head, BLOCK_M, BLOCK_D, INTERPRET)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        tl.store(DELTA + row + m, delta, m < queries)
        lse = tl.load(LSE + row + m, m < queries, 0.0) * LOG2E
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        first, edge, full, stop = _key_blocks(start, shift, keys, window, WINDOW, BLOCK_M, BLOCK_N)
        dq = _dq_steps(
            dq, q, do, lse, delta, K, V, k0, head_k, m + shift, window, scale_log2, edge, full, 0, 0,
            WINDOW, False, BLOCK_N, BLOCK_D, PRECISION, INTERPRET,
        )  # fmt: skip
        skip = full - edge
        dq = _dq_steps(
            dq, q, do, lse, delta, K, V, k0, head_k, m + shift, window, scale_log2, first, stop - skip, edge, skip,
            WINDOW, True, BLOCK_N, BLOCK_D, PRECISION, INTERPRET,
        )  # fmt: skip
        _store(DQ, dq * scale, q0 + start, queries - start, head, heads, HEAD_DIM, BLOCK_M, BLOCK_D, INTERPRET)


@kernel
def _dkv_steps(
    dk, dv, k, v, Q, DO, LSE, DELTA, q0, head_k, groups, total, start, shift, queries, window, scale_log2,
    first, count, edge, skip,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`count` query blocks from `first` on, of each query head in turn; `skip` queries are left out at `edge`."""
    LOG2E: tl.constexpr = 1.4426950408889634
    for i in range(count * groups):
        head = head_k * groups + i // count
        m0 = first + i % count * BLOCK_M
        if MASKED:
            m0 += tl.where(m0 < edge, 0, skip)
        m = m0 + tl.arange(0, BLOCK_M)
        row = head.to(tl.int64) * total + q0
        q = _rows(Q, q0 + m0, head, BLOCK_M, BLOCK_D, INTERPRET)
        do = _rows(DO, q0 + m0, head, BLOCK_M, BLOCK_D, INTERPRET)
        if MASKED:  # +inf makes p zero for rows of the next document
            lse = tl.load(LSE + row + m, m < queries, float("inf"))
            delta = tl.load(DELTA + row + m, m < queries, 0.0)
        else:
            lse, delta = tl.load(LSE + row + m), tl.load(DELTA + row + m)
        # Transposed tiles [keys, queries]: p and ds are then left operands, straight from registers.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - (lse * LOG2E)[None, :])
        if MASKED:
            n = start + tl.arange(0, BLOCK_N)
            p = tl.where(_visible(m[None, :], (n - shift)[:, None], window, WINDOW), p, 0.0)
        dv = tl.dot(operand(p, Q.dtype, INTERPRET), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(operand(ds, Q.dtype, INTERPRET), q, dk, input_precision=PRECISION)
    return dk, dv


@kernel
def _dkv_kernel(
    DK, DV, Q, K, V, DO, LSE, DELTA, CU_Q, CU_K, TABLE, tiles, heads_k, groups, total, scale, window,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one kv head: its group of query heads is walked in order, so the sum over it is fixed."""
    LOG2E: tl.constexpr = 1.4426950408889634
    head_k = tl.program_id(0) // tiles
    start, q0, queries, k0, keys = _tile(TABLE, CU_Q, CU_K, tl.program_id(0) % tiles)
    if start >= 0:
        shift, scale_log2 = keys - queries, scale * LOG2E
        k = _rows(K, k0 + start, head_k, BLOCK_N, BLOCK_D, INTERPRET)
        v = _rows(V, k0 + start, head_k, BLOCK_N, BLOCK_D, INTERPRET)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        # The keys [start, start + BLOCK_N) are seen by queries in [first, stop), all of them by those in [edge, full).
        first = tl.maximum(start - shift, 0) // BLOCK_M * BLOCK_M
        edge = (tl.maximum(start + BLOCK_N - 1 - shift, 0) + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        full, stop = queries, queries
        if WINDOW:
            full = tl.minimum(start + window - shift, queries)
            stop = tl.minimum(start + BLOCK_N - 1 + window - shift, queries)
        full = tl.maximum(full // BLOCK_M * BLOCK_M, edge)
        whole = (full - edge) // BLOCK_M
        parts = tl.maximum(stop - first + BLOCK_M - 1, 0) // BLOCK_M - whole
        dk, dv = _dkv_steps(
            dk, dv, k, v, Q, DO, LSE, DELTA, q0, head_k, groups, total, start, shift, queries, window, scale_log2,
            edge, whole, 0, 0, WINDOW, False, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, INTERPRET,
        )  # fmt: skip
        dk, dv = _dkv_steps(
            dk, dv, k, v, Q, DO, LSE, DELTA, q0, head_k, groups, total, start, shift, queries, window, scale_log2,
            first, parts, edge, full - edge, WINDOW, True, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, INTERPRET,
        )  # fmt: skip
        _store(DK, dk * scale, k0 + start, keys - start, head_k, heads_k, HEAD_DIM, BLOCK_N, BLOCK_D, INTERPRET)
        _store(DV, dv, k0 + start, keys - start, head_k, heads_k, HEAD_DIM, BLOCK_N, BLOCK_D, INTERPRET)


# --- host ------------------------------------------------------------------------------------------------------------


def tile_sizes(which: str, q: torch.Tensor) -> dict[str, int]:
    """Tiles of the "forward", "dq" or "dkv" kernel: on Hopper the largest that compile without a spill
    (tests/kernels/test_compile.py reads that off the machine code). fp32 is there for comparisons and is not tuned."""
    head_dim = q.shape[2]
    shared = 227 * 1024
    if q.is_cuda:
        shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    if q.dtype == torch.float32:
        tiles = {"forward": (16, 16, 8, 2), "dq": (16, 16, 8, 2), "dkv": (16, 16, 8, 2)}
    elif shared < 227 * 1024:
        tiles = {"forward": (64, 32, 8, 2), "dq": (32, 32, 8, 1), "dkv": (32, 32, 8, 1)}
    elif head_dim <= 64:
        tiles = {"forward": (128, 64, 4, 3), "dq": (128, 128, 8, 2), "dkv": (64, 128, 8, 2)}
    elif head_dim <= 128:
        tiles = {"forward": (128, 128, 8, 3), "dq": (128, 128, 8, 2), "dkv": (64, 128, 8, 2)}
    else:
        tiles = {"forward": (128, 64, 8, 2), "dq": (64, 64, 8, 2), "dkv": (16, 64, 8, 2)}
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), tiles[which]))


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x or a copy that a descriptor can describe: rows at multiples of 16 bytes, head_dim with unit stride."""
    unit = 16 // x.element_size()
    if x.shape[2] % unit:
        return F.pad(x, (0, -x.shape[2] % unit))
    strides = [stride for size, stride in zip(x.shape[:2], x.stride()) if size > 1]
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: torch.Tensor, block: int, block_d: int):
    """x [rows, heads, head_dim] for `_rows`, which reads `block` rows of one head at a time."""
    from triton.tools.tensor_descriptor import TensorDescriptor  # not there on a CPU-only installation

    rows, heads, head_dim = x.shape
    strides = [x.stride(1) if heads > 1 else head_dim, x.stride(0) if rows > 1 else head_dim, 1]
    return TensorDescriptor(x, [heads, rows, head_dim], strides, [1, block, block_d])


def _options(q: torch.Tensor, window: int | None) -> dict:
    return {
        "WINDOW": window is not None,
        "HEAD_DIM": q.shape[2],
        "BLOCK_D": max(next_power_of_2(q.shape[2]), 16),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def attention_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    window: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(o [Tq, Hq, D], lse fp32 [Hq, Tq], natural logarithm)."""
    rows, heads, groups = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    if not rows:
        return o, lse
    options, tiles = _options(q, window), tile_sizes("forward", q)
    q, k, v = map(_readable, (q, k, v))
    table = _tile_table(cu_seqlens_q, rows, tiles["BLOCK_M"])
    launch(
        _forward_kernel, (table.shape[0] * heads,), o, lse,
        _descriptor(q, tiles["BLOCK_M"], options["BLOCK_D"]),
        *(_descriptor(x, tiles["BLOCK_N"], options["BLOCK_D"]) for x in (k, v)),
        cu_seqlens_q, cu_seqlens_k, table, table.shape[0], heads, groups, rows, scale, window or 0, **tiles, **options,
    )  # fmt: skip
    return o, lse


def attention_backward_triton(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, window: int | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, heads, heads_k = q.shape[0], q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not rows:
        return dq, dk.zero_(), dv.zero_()
    options, block_d = _options(q, window), max(next_power_of_2(q.shape[2]), 16)
    delta = torch.empty((heads, rows), dtype=torch.float32, device=q.device)
    tiles, dkv_tiles = tile_sizes("dq", q), tile_sizes("dkv", q)
    q, k, v, o, do = map(_readable, (q, k, v, o, do))

    table = _tile_table(cu_seqlens_q, rows, tiles["BLOCK_M"])
    q_d, o_d, do_d = (_descriptor(x, tiles["BLOCK_M"], block_d) for x in (q, o, do))
    k_d, v_d = (_descriptor(x, tiles["BLOCK_N"], block_d) for x in (k, v))
    sizes = (heads // heads_k, rows, scale, window or 0)
    launch(
        _dq_kernel, (table.shape[0] * heads,), dq, delta, q_d, k_d, v_d, o_d, do_d, lse,
        cu_seqlens_q, cu_seqlens_k, table, table.shape[0], heads, *sizes, **tiles, **options,
    )  # fmt: skip

    table = _tile_table(cu_seqlens_k, k.shape[0], dkv_tiles["BLOCK_N"])
    q_d, do_d = (_descriptor(x, dkv_tiles["BLOCK_M"], block_d) for x in (q, do))
    k_d, v_d = (_descriptor(x, dkv_tiles["BLOCK_N"], block_d) for x in (k, v))
    launch(
        _dkv_kernel, (table.shape[0] * heads_k,), dk, dv, q_d, k_d, v_d, do_d, lse, delta,
        cu_seqlens_q, cu_seqlens_k, table, table.shape[0], heads_k, *sizes, **dkv_tiles, **options,
    )  # fmt: skip
    return dq, dk, dv
