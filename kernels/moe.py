"""Mixture of experts on packed tokens: rows to their experts and back, and the whole block of SwiGLU experts.

    g_r = G_e x_t    h_r = silu(gate) * up    y_r = D_e h_r    out_t = sum_k w_tk y_r        r = inverse[t, k]
    a_r = D_e^T dout_t    dw_tk = a_r . h_r = dout_t . y_r    dh_r = w_tk a_r
    dD_e = sum_r dout_t (w_tk h_r)^T    dG_e = sum_r dg_r x_t^T    dx_t = sum_k G_e^T dg_r

Floor: the GEMMs, 6*R*H*I FLOPs forward and 12*R*H*I backward (R = T*K rows). The rest is bytes: bf16, 2*(2 + 2K)*T*H +
6*R*I forward and 2*(3 + 3K)*T*H + 12*R*I backward. Saved: x, weights, order, g. Neither the permuted x nor h nor y is:
dw comes from a and h (SonicMoE, arXiv:2512.14080), in the one pass that makes dg and w*h from a and g.

Source: Jiang et al. 2024, arXiv:2401.04088, as transformers' MixtralExperts. Its eager code rounds each w_tk y_r to
bf16 and adds in bf16 in the order of experts; here, as in its grouped_mm path, the sum is in fp32 in the order of k,
rounded once. No atomics. May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, tl, unit_rows
from .grouped_mm import grouped_mm, grouped_weight_grad
from .moe_routing import route, sort_by_expert
from .swiglu import swiglu

# --- torch reference -------------------------------------------------------------------------------------------------

_BLOCK_ROWS = 128  # rows whose gate, up and results stay in the cache between the elementwise passes


def _permute_cpu(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    out = x.new_empty(inverse.numel(), x.shape[1])
    for rows in inverse.T:
        out.index_copy_(0, rows.long(), x)
    return out


def _unpermute_cpu(y: torch.Tensor, weights: torch.Tensor | None, inverse: torch.Tensor) -> torch.Tensor:
    acc = compute_dtype(y.dtype)
    out = torch.zeros(inverse.shape[0], y.shape[1], dtype=acc)
    for k, rows in enumerate(inverse.T):
        part = y.index_select(0, rows).to(acc)
        if weights is None:
            out += part
        else:
            out.addcmul_(part, weights[:, k : k + 1])
    return out.to(y.dtype)


def _unpermute_backward_cpu(
    dout: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    acc = compute_dtype(y.dtype)
    dout = dout.to(acc)
    dy, dw = torch.empty(y.shape, dtype=y.dtype), torch.empty(weights.shape, dtype=weights.dtype)
    for k, rows in enumerate(inverse.T):
        torch.sum(dout * y.index_select(0, rows), 1, out=dw[:, k])
        dy.index_copy_(0, rows.long(), (dout * weights[:, k : k + 1]).to(y.dtype))
    return dy, dw


def _weighted_swiglu_backward_cpu(
    a: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype)
    dw = torch.empty(weights.numel(), dtype=weights.dtype)
    blocks = (x.split(_BLOCK_ROWS) for x in (a, gate_up, d_gate_up, gather.long()))
    for a_block, gate_up_block, out, slots in zip(*blocks):
        w = weights.view(-1)[slots].unsqueeze(1)
        a32, (gate, up) = a_block.to(w.dtype), gate_up_block.to(w.dtype).chunk(2, 1)
        silu = torch.nn.functional.silu(gate)
        h = silu * up
        dw[slots] = (a32 * h).sum(1)
        dh = a32 * w
        d_gate, d_up = out.chunk(2, 1)
        d_gate.copy_(torch.ops.aten.silu_backward(dh * up, gate))
        d_up.copy_(dh * silu)
        a_block.copy_(h.mul_(w))
    return d_gate_up, dw.view(weights.shape)


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def _permute_kernel(X, OUT, INVERSE, hidden, stride, K: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """A token's row is read once and written K times."""
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + t * stride + col, col < hidden, 0.0)
    for k in range(K):
        row = tl.load(INVERSE + t * K + k).to(tl.int64)
        tl.store(OUT + row * hidden + col, x, col < hidden)


@kernel
def _unpermute_kernel(
    Y, WEIGHTS, INVERSE, OUT, hidden,
    WEIGHTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        row = tl.load(INVERSE + t * K + k).to(tl.int64)
        y = tl.load(Y + row * hidden + col, col < hidden, 0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(WEIGHTS + t * K + k)
        acc += y
    tl.store(OUT + t * hidden + col, cast(acc, OUT.dtype.element_ty, INTERPRET), col < hidden)


@kernel
def _unpermute_backward_kernel(
    DOUT, Y, WEIGHTS, INVERSE, DY, DW, hidden, stride, K: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):
    """One slot: dy = w dout, and the dot product dw = dout . y."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(INVERSE + slot).to(tl.int64)
    w = tl.load(WEIGHTS + slot)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        col = start + tl.arange(0, BLOCK)
        dout = tl.load(DOUT + slot // K * stride + col, col < hidden, 0.0).to(tl.float32)
        y = tl.load(Y + row * hidden + col, col < hidden, 0.0).to(tl.float32)
        dot += dout * y
        tl.store(DY + row * hidden + col, cast(w * dout, DY.dtype.element_ty, INTERPRET), col < hidden)
    tl.store(DW + slot, tl.sum(dot, 0))


@kernel
def _weighted_swiglu_backward_kernel(
    A, GATE_UP, WEIGHTS, GATHER, D_GATE_UP, DW, width, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):
    """One row: from a and gate_up, d_gate_up and dw; a itself becomes w h."""
    dtype: tl.constexpr = A.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(GATHER + row)
    w = tl.load(WEIGHTS + slot)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        col = start + tl.arange(0, BLOCK)
        mask = col < width
        a = tl.load(A + row * width + col, mask, 0.0).to(tl.float32)
        gate = tl.load(GATE_UP + row * (2 * width) + col, mask, 0.0).to(tl.float32)
        up = tl.load(GATE_UP + row * (2 * width) + width + col, mask, 0.0).to(tl.float32)
        s = tl.sigmoid(gate)
        silu = gate * s
        h = silu * up
        dh = w * a
        dot += a * h
        out = D_GATE_UP + row * (2 * width) + col
        tl.store(out, cast(dh * up * s * (1.0 + gate * (1.0 - s)), dtype, INTERPRET), mask)
        tl.store(out + width, cast(dh * silu, dtype, INTERPRET), mask)
        # Several threads may hold one element of a short block: all have read it before one overwrites it.
        tl.debug_barrier()
        tl.store(A + row * width + col, cast(w * h, dtype, INTERPRET), mask)
    tl.store(DW + slot, tl.sum(dot, 0))


def _block(hidden: int) -> int:
    return min(next_power_of_2(hidden), 1024)


def _permute_triton(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    x = unit_rows(x)
    tokens, hidden = x.shape
    out = torch.empty(inverse.numel(), hidden, dtype=x.dtype, device=x.device)
    block = min(next_power_of_2(hidden), 4096)
    grid = tokens, cdiv(hidden, block)
    launch(_permute_kernel, grid, x, out, inverse, hidden, x.stride(0), K=inverse.shape[1], BLOCK=block)
    return out


def _unpermute_triton(y: torch.Tensor, weights: torch.Tensor | None, inverse: torch.Tensor) -> torch.Tensor:
    y = y.contiguous()
    tokens, hidden = inverse.shape[0], y.shape[1]
    out = torch.empty(tokens, hidden, dtype=y.dtype, device=y.device)
    weighted = weights is not None
    launch(
        _unpermute_kernel, (tokens, cdiv(hidden, _block(hidden))), y, weights if weighted else y, inverse, out, hidden,
        WEIGHTED=weighted, K=inverse.shape[1], BLOCK=_block(hidden),
    )  # fmt: skip
    return out


def _unpermute_backward_triton(
    dout: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dout, y = unit_rows(dout), y.contiguous()
    hidden = y.shape[1]
    dy, dw = torch.empty_like(y), torch.empty_like(weights)
    launch(
        _unpermute_backward_kernel, (inverse.numel(),), dout, y, weights, inverse, dy, dw, hidden, dout.stride(0),
        K=inverse.shape[1], BLOCK=_block(hidden),
    )  # fmt: skip
    return dy, dw


def _weighted_swiglu_backward_triton(
    a: torch.Tensor, gate_up: torch.Tensor, weights: torch.Tensor, gather: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = a.shape
    d_gate_up, dw = torch.empty_like(gate_up), torch.empty_like(weights)
    launch(
        _weighted_swiglu_backward_kernel, (rows,), a, gate_up, weights, gather, d_gate_up, dw, width,
        BLOCK=_block(width),
    )  # fmt: skip
    return d_gate_up, dw


# --- operators -------------------------------------------------------------------------------------------------------

_permute_op = define_op(
    "moe_permute",
    "(Tensor x, Tensor inverse) -> Tensor",
    cpu=_permute_cpu,
    cuda=_permute_triton,
    fake=lambda x, inverse: x.new_empty(inverse.numel(), x.shape[1]),
)
_unpermute_op = define_op(
    "moe_unpermute",
    "(Tensor y, Tensor? weights, Tensor inverse) -> Tensor",
    cpu=_unpermute_cpu,
    cuda=_unpermute_triton,
    fake=lambda y, weights, inverse: y.new_empty(inverse.shape[0], y.shape[1]),
)
_unpermute_backward_op = define_op(
    "moe_unpermute_backward",
    "(Tensor dout, Tensor y, Tensor weights, Tensor inverse) -> (Tensor, Tensor)",
    cpu=_unpermute_backward_cpu,
    cuda=_unpermute_backward_triton,
    fake=lambda dout, y, weights, inverse: (y.new_empty(y.shape), weights.new_empty(weights.shape)),
)
_weighted_swiglu_backward_op = define_op(
    "moe_weighted_swiglu_backward",
    "(Tensor(a!) a, Tensor gate_up, Tensor weights, Tensor gather) -> (Tensor, Tensor)",
    cpu=_weighted_swiglu_backward_cpu,
    cuda=_weighted_swiglu_backward_triton,
    fake=lambda a, gate_up, weights, gather: (gate_up.new_empty(gate_up.shape), weights.new_empty(weights.shape)),
)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return _permute_op(x, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows: torch.Tensor):
        (inverse,) = ctx.saved_tensors
        return _unpermute_op(d_rows, None, inverse), None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y, weights, inverse)
        return _unpermute_op(y, weights, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: torch.Tensor):
        dy, dw = _unpermute_backward_op(dout, *ctx.saved_tensors)
        return dy, dw, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, gate_up, down, offsets, gather, inverse, recompute):
        g = grouped_mm(_permute_op(x, inverse), gate_up, offsets)
        y = grouped_mm(swiglu(g), down, offsets)
        ctx.save_for_backward(x, weights, gate_up, down, offsets, gather, inverse, None if recompute else g)
        return _unpermute_op(y, weights, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: torch.Tensor):
        x, weights, gate_up, down, offsets, gather, inverse, g = ctx.saved_tensors
        need_dx, need_dw, need_d_gate_up, need_d_down = ctx.needs_input_grad[:4]
        if g is None:
            g = grouped_mm(_permute_op(x, inverse), gate_up, offsets)
        dout_R = _permute_op(dout, inverse)
        wh = grouped_mm(dout_R, down.transpose(1, 2), offsets)  # a, until the next line has used it up
        dg, dw = _weighted_swiglu_backward_op(wh, g, weights, gather)
        d_down = grouped_weight_grad(dout_R, wh, offsets) if need_d_down else None
        del dout_R, wh
        d_gate_up = grouped_weight_grad(dg, _permute_op(x, inverse), offsets) if need_d_gate_up else None
        dx = _unpermute_op(grouped_mm(dg, gate_up.transpose(1, 2), offsets), None, inverse) if need_dx else None
        return dx, dw if need_dw else None, d_gate_up, d_down, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def permute(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Rows [T*K, H] in the order of experts: row inverse[t, k] is x[t]. Exact; the gradient sums over k in fp32.

    x [T, H]; inverse [T, K] int32, a permutation of T*K, from `sort_by_expert`.
    """
    check_tensor("permute: x", x, (None, None))
    check_tensor("permute: inverse", inverse, (x.shape[0], None), dtype=torch.int32, like=x)
    return _Permute.apply(x, inverse.contiguous())


def unpermute(y: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """out [T, H] = sum_k weights[t, k] * y[inverse[t, k]], in fp32 in the order of k, rounded once to y.dtype.

    y [T*K, H]; weights [T, K] fp32 (fp64 with fp64 rows); inverse as in `permute`. Differentiable in y and weights:
    dw[t, k] is one dot product of a row.
    """
    check_tensor("unpermute: inverse", inverse, (None, None), dtype=torch.int32, like=y)
    check_tensor("unpermute: y", y, (inverse.numel(), None), dtype=float_dtypes(y))
    check_tensor("unpermute: weights", weights, tuple(inverse.shape), dtype=compute_dtype(y.dtype), like=y)
    return _Unpermute.apply(y, weights.contiguous(), inverse.contiguous())


def moe_experts(
    x: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    recompute: bool = False,
) -> torch.Tensor:
    """out [T, H] = sum_k weights[t, k] * down_e(silu(gate_e(x_t)) * up_e(x_t)), e = experts[t, k].

    x [T, H] in bf16, fp16 or fp32 (fp64 on a CPU); weights [T, K], cast to fp32; experts [T, K] int32 or int64, those
    outside [0, E) contribute nothing; gate_up [E, 2I, H] = [gate | up] rows and down [E, H, I] in x's dtype, as
    transformers' MixtralExperts stacks them. Differentiable in x, weights, gate_up and down, whose gradients are sums
    in fp32, rounded once. No host synchronisation; two runs give the same bits, and so does `recompute`: gate and up,
    2KI elements a token, are not saved but computed again in backward, by 4*R*H*I FLOPs.

    Raises:
        ValueError: shapes, dtypes or devices that do not agree.
    """
    check_tensor("moe_experts: x", x, (None, None), dtype=float_dtypes(x))
    check_tensor("moe_experts: gate_up", gate_up, (None, None, x.shape[1]), like=x)
    num_experts, width = gate_up.shape[0], gate_up.shape[1] // 2
    check_tensor("moe_experts: gate_up", gate_up, (None, 2 * width, None))
    check_tensor("moe_experts: down", down, (num_experts, x.shape[1], width), like=x)
    check_tensor("moe_experts: weights", weights, (x.shape[0], None), dtype=float_dtypes(x), like=x)
    check_tensor("moe_experts: experts", experts, tuple(weights.shape), dtype=(torch.int32, torch.int64), like=x)
    offsets, gather, inverse = sort_by_expert(experts, num_experts)
    weights = weights.to(compute_dtype(x.dtype)).contiguous()
    return _Experts.apply(x, weights, gate_up, down, offsets, gather, inverse, recompute)


def moe_mlp(
    x: torch.Tensor,
    router_logits: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool = True,
) -> torch.Tensor:
    """The whole block, `route` and then `moe_experts`: x [T, H], router_logits [T, E] -> out [T, H].

    Differentiable in x, router_logits, gate_up and down. Shapes, dtypes and errors as there.
    """
    check_tensor("moe_mlp: x", x, (None, None))
    check_tensor("moe_mlp: gate_up", gate_up, (None, None, None))
    check_tensor("moe_mlp: router_logits", router_logits, (x.shape[0], gate_up.shape[0]))
    weights, experts = route(router_logits, top_k, renormalize=renormalize)
    return moe_experts(x, weights, experts, gate_up, down)
