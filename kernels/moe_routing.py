"""Mixture-of-experts routing: which experts a token goes to and with what weight, and the order of rows by expert.

    p = softmax(z)    S = sum of the K largest p    w_k = p_k / S (renormalised, Mixtral) or p_k
    c = sum_k w_k dw_k        dz_e = w_e (dw_e - c) for the chosen, 0 for the others (renormalised)
                              dz_e = p_e (dw_e [chosen] - c)

Renormalised weights are the softmax over the chosen logits, so S cancels in the gradient: it needs neither p nor z.

Order: slot s = t*K + k is token t's k-th choice. A stable counting sort puts slots of one expert side by side, in their
order: counts per (expert, block of slots), one running sum over them, and each slot's rank within its block.

Floor: bytes, T*E logits once and some 20 a slot: microseconds beside the experts' milliseconds; what counts is that no
count ever goes to the host. Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024, arXiv:2401.04088; load
balancing loss: Fedus et al. 2021, arXiv:2101.03961, (4)-(6). May touch: torch, triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, tl, unit_rows

# --- torch reference -------------------------------------------------------------------------------------------------


def _route_cpu(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    z = logits.to(compute_dtype(logits.dtype))
    order = torch.sort(z.masked_fill(z.isnan(), -torch.inf), dim=1, descending=True, stable=True).indices
    experts = order[:, :top_k]
    weights = torch.softmax(z, 1).gather(1, experts)
    if renormalize:
        weights /= weights.sum(1, keepdim=True)
    return weights, experts.to(torch.int32)


def _route_backward_cpu(
    dw: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, logits: torch.Tensor, renormalize: bool
) -> torch.Tensor:
    index = experts.long()
    c = (dw * weights).sum(1, keepdim=True)
    if renormalize:
        dz = torch.zeros(logits.shape, dtype=weights.dtype).scatter_(1, index, weights * (dw - c))
    else:
        p = torch.softmax(logits.to(weights.dtype), 1)
        dz = p * (torch.zeros_like(p).scatter_(1, index, dw) - c)
    return dz.to(logits.dtype)


def _ids(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[slots] with every id outside [0, num_experts) as num_experts: nobody's."""
    ids = experts.reshape(-1).long()
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def _sort_cpu(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = _ids(experts, num_experts)
    gather = torch.argsort(ids, stable=True).to(torch.int32)
    inverse = torch.empty_like(gather)
    inverse[gather] = torch.arange(len(ids), dtype=torch.int32)
    offsets = torch.bincount(ids, minlength=num_experts + 1)[:num_experts].cumsum(0)
    return offsets.to(torch.int32), gather, inverse.view(experts.shape)


def _expert_load_cpu(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return torch.bincount(_ids(experts, num_experts), minlength=num_experts + 1)[:num_experts].to(torch.int32)


# --- Triton: routing -------------------------------------------------------------------------------------------------


@kernel
def _softmax(z, valid):
    z = tl.where(valid, z, float("-inf"))
    p = tl.exp(z - tl.max(z, 1, keep_dims=True))
    return p / tl.sum(p, 1, keep_dims=True)


@kernel
def _route_kernel(
    LOGITS, WEIGHTS, EXPERTS, tokens, experts, stride, top_k,
    RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    z = tl.load(LOGITS + t.to(tl.int64) * stride + e, (t < tokens) & (e < experts), 0.0).to(tl.float32)
    p = _softmax(z, e < experts)
    z = tl.where(z == z, z, float("-inf"))
    free = tl.broadcast_to(e < experts, (BLOCK_T, BLOCK_E))
    weights = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for i in range(0, top_k):
        top = tl.max(tl.where(free, z, float("-inf")), 1, keep_dims=True)
        best = tl.min(tl.where(free & (z == top), e, experts), 1, keep_dims=True)
        weights = tl.where(k == i, tl.sum(tl.where(e == best, p, 0.0), 1, keep_dims=True), weights)
        chosen = tl.where(k == i, best, chosen)
        free = free & (e != best)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 1, keep_dims=True)
    out = t.to(tl.int64) * top_k + k
    mask = (t < tokens) & (k < top_k)
    tl.store(WEIGHTS + out, weights, mask)
    tl.store(EXPERTS + out, chosen, mask)


@kernel
def _route_backward_kernel(
    DW, WEIGHTS, EXPERTS, LOGITS, DLOGITS, tokens, experts, dw_stride_t, dw_stride_k, stride, top_k,
    RENORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    e = tl.arange(0, BLOCK_E)[None, :]
    row = t.to(tl.int64)
    c = tl.zeros((BLOCK_T, 1), tl.float32)
    p = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    dp = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for i in range(0, top_k):
        w = tl.load(WEIGHTS + row * top_k + i, t < tokens, 0.0)
        dw = tl.load(DW + row * dw_stride_t + i * dw_stride_k, t < tokens, 0.0)
        mine = e == tl.load(EXPERTS + row * top_k + i, t < tokens, 0)
        c += w * dw
        dp = tl.where(mine, dw, dp)
        p = tl.where(mine, w, p)
    mask = (t < tokens) & (e < experts)
    if not RENORMALIZE:
        p = _softmax(tl.load(LOGITS + row * stride + e, mask, 0.0).to(tl.float32), e < experts)
    tl.store(DLOGITS + row * experts + e, cast(p * (dp - c), DLOGITS.dtype.element_ty, INTERPRET), mask)


def _tile(experts: int) -> dict[str, int]:
    block = next_power_of_2(experts)
    return {"BLOCK_T": max(1024 // block, 1), "BLOCK_E": block}


def _route_triton(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = unit_rows(logits)
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    tile = _tile(experts)
    launch(
        _route_kernel, (cdiv(tokens, tile["BLOCK_T"]),), logits, weights, chosen, tokens, experts, logits.stride(0),
        top_k, RENORMALIZE=renormalize, BLOCK_K=next_power_of_2(top_k), **tile,
    )  # fmt: skip
    return weights, chosen


def _route_backward_triton(
    dw: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, logits: torch.Tensor, renormalize: bool
) -> torch.Tensor:
    logits = unit_rows(logits)
    tokens, num_experts = logits.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    tile = _tile(num_experts)
    launch(
        _route_backward_kernel, (cdiv(tokens, tile["BLOCK_T"]),), dw, weights, experts, logits, dlogits,
        tokens, num_experts, *dw.stride(), logits.stride(0), weights.shape[1], RENORMALIZE=renormalize, **tile,
    )  # fmt: skip
    return dlogits


# --- Triton: order ---------------------------------------------------------------------------------------------------

_BLOCK_SLOTS = 128


@kernel
def _expert_ids(IDS, slot, slots, experts):
    """Expert of each slot; `experts` for those of nobody, experts + 1 past the last slot."""
    i = tl.load(IDS + slot, slot < slots, 0)
    i = tl.where((i >= 0) & (i < experts), i, experts).to(tl.int32)
    return tl.where(slot < slots, i, experts + 1)


@kernel
def _count_kernel(
    IDS, COUNTS, slots, experts, blocks, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, INTERPRET: tl.constexpr
):
    """COUNTS [experts + 1, blocks]: how often each expert occurs in each block of slots."""
    block = tl.program_id(0)
    ids = _expert_ids(IDS, block * BLOCK + tl.arange(0, BLOCK)[None, :], slots, experts)
    for first in range(0, experts + 1, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        count = tl.sum((ids == e[:, None]).to(tl.int32), 1)
        tl.store(COUNTS + e.to(tl.int64) * blocks + block, count, e <= experts)


@kernel
def _scatter_kernel(
    IDS, COUNTS, SUMS, GATHER, INVERSE, slots, experts, blocks, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):
    """Row of each slot: all of its expert in earlier blocks and of smaller experts, then its rank in the block."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    ids = _expert_ids(IDS, slot, slots, experts)
    other = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    same = _expert_ids(IDS, other, slots, experts) == ids[:, None]
    rank = tl.sum((same & (other < slot[:, None])).to(tl.int32), 1)
    mask = slot < slots
    at = ids.to(tl.int64) * blocks + block
    row = tl.load(SUMS + at, mask, 0) - tl.load(COUNTS + at, mask, 0) + rank
    tl.store(GATHER + row, slot, mask)
    tl.store(INVERSE + slot, row, mask)


def _counts(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    blocks = max(cdiv(ids.numel(), _BLOCK_SLOTS), 1)
    counts = torch.empty(num_experts + 1, blocks, dtype=torch.int32, device=ids.device)
    launch(_count_kernel, (blocks,), ids, counts, ids.numel(), num_experts, blocks, BLOCK=_BLOCK_SLOTS, BLOCK_E=16)
    return counts


def _sort_triton(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = experts.contiguous()
    counts = _counts(ids, num_experts)
    sums = counts.view(-1).cumsum(0, dtype=torch.int32).view_as(counts)
    gather = torch.empty(ids.numel(), dtype=torch.int32, device=ids.device)
    inverse = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    blocks = counts.shape[1]
    launch(
        _scatter_kernel, (blocks,), ids, counts, sums, gather, inverse, ids.numel(), num_experts, blocks,
        BLOCK=_BLOCK_SLOTS,
    )  # fmt: skip
    return sums[:num_experts, -1].contiguous(), gather, inverse


def _expert_load_triton(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    return _counts(experts.contiguous(), num_experts)[:num_experts].sum(1, dtype=torch.int32)


# --- operators -------------------------------------------------------------------------------------------------------

_route_op = define_op(
    "moe_route",
    "(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor)",
    cpu=_route_cpu,
    cuda=_route_triton,
    fake=lambda logits, top_k, renormalize: (
        logits.new_empty(logits.shape[0], top_k, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(logits.shape[0], top_k, dtype=torch.int32),
    ),
)
_route_backward_op = define_op(
    "moe_route_backward",
    "(Tensor dw, Tensor weights, Tensor experts, Tensor logits, bool renormalize) -> Tensor",
    cpu=_route_backward_cpu,
    cuda=_route_backward_triton,
    fake=lambda dw, weights, experts, logits, renormalize: logits.new_empty(logits.shape),
)
_sort_op = define_op(
    "moe_sort",
    "(Tensor experts, int num_experts) -> (Tensor, Tensor, Tensor)",
    cpu=_sort_cpu,
    cuda=_sort_triton,
    fake=lambda experts, num_experts: (
        experts.new_empty(num_experts, dtype=torch.int32),
        experts.new_empty(experts.numel(), dtype=torch.int32),
        experts.new_empty(experts.shape, dtype=torch.int32),
    ),
)
_expert_load_op = define_op(
    "moe_expert_load",
    "(Tensor experts, int num_experts) -> Tensor",
    cpu=_expert_load_cpu,
    cuda=_expert_load_triton,
    fake=lambda experts, num_experts: experts.new_empty(num_experts, dtype=torch.int32),
)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, top_k: int, renormalize: bool):
        weights, experts = _route_op(logits, top_k, renormalize)
        ctx.save_for_backward(weights, experts, logits)
        ctx.renormalize = renormalize
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx, dw: torch.Tensor, _):
        return _route_backward_op(dw, *ctx.saved_tensors, ctx.renormalize), None, None


# --- public ----------------------------------------------------------------------------------------------------------


def route(router_logits: torch.Tensor, top_k: int, *, renormalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K] fp32, experts [T, K] int32): softmax over all experts in fp32, then the `top_k` largest.

    router_logits [T, E] in bf16, fp16 or fp32 (on a CPU fp64, and then fp64 weights); 1 <= top_k <= E <= 1024. Best
    first; equal logits in order of their index, on every device (torch.topk promises nothing there, and with bf16
    logits ties are common). renormalize: a token's weights sum to 1 (Mixtral); False: they stay as the softmax left
    them (norm_topk_prob=False). Weights are differentiable. A row with a NaN gets NaN weights and some valid experts.

    Raises:
        ValueError: a wrong shape or dtype, top_k out of range.
    """
    check_tensor("route: router_logits", router_logits, (None, None), dtype=float_dtypes(router_logits))
    if not 1 <= top_k <= router_logits.shape[1] <= 1024:
        raise ValueError(f"route: top_k is {top_k}, experts {router_logits.shape[1]}; allowed: 1 <= top_k <= E <= 1024")
    return _Route.apply(router_logits, top_k, renormalize)


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(offsets [E], gather [slots], inverse like experts), all int32: slots in stable order of their expert.

    experts: int32 or int64 of any shape, usually [T, K]; slot s is its s-th element. offsets[e] is the end of expert
    e's rows; gather[row] is the slot that a row holds, inverse[slot] the row where a slot went. Ids outside [0, E)
    are nobody's, say another rank's: they come last, past offsets[-1]. No host synchronisation, no atomics.

    Raises:
        ValueError: a wrong dtype, no experts, more than 2^30 slots.
    """
    _check_experts("sort_by_expert", experts, num_experts)
    return _sort_op(experts, num_experts)


def expert_load(experts: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Slots per expert [E] int32, on the device; experts as in `sort_by_expert`, ids outside [0, E) not counted."""
    _check_experts("expert_load", experts, num_experts)
    return _expert_load_op(experts, num_experts)


def _check_experts(function: str, experts: torch.Tensor, num_experts: int) -> None:
    check_tensor(f"{function}: experts", experts, dtype=(torch.int32, torch.int64))
    slots = experts.numel()
    if num_experts < 1 or slots > 2**30:
        raise ValueError(f"{function}: {num_experts} experts, {slots} slots; allowed: 1 or more, 2^30 at most")


def load_balancing_loss(
    router_logits: torch.Tensor | Sequence[torch.Tensor], top_k: int, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """E * sum_e f_e P_e, a 0-dim fp32 tensor: K where every expert has its share, up to E where one has all.

    f_e: slots that expert e got per token; P_e: its mean probability, through which alone the gradient flows. Given
    the logits [T, E] of several layers, f and P are means over all of them, as in transformers'
    load_balancing_loss_func (whose softmax is in the logits' dtype; here fp32). mask [T]: tokens that count (not 0).
    Where none does, the loss is 0.

    Raises:
        ValueError: as `route`; layers or a mask of different shapes.
    """
    layers = [router_logits] if isinstance(router_logits, torch.Tensor) else list(router_logits)
    if not layers:
        raise ValueError("load_balancing_loss: router_logits is empty; expected the logits of one layer or more")
    num_experts = layers[0].shape[-1]
    acc = compute_dtype(layers[0].dtype)
    slots, probability = (torch.zeros(num_experts, dtype=acc, device=layers[0].device) for _ in range(2))
    tokens = torch.zeros((), dtype=acc, device=layers[0].device)
    for logits in layers:
        check_tensor("load_balancing_loss: router_logits", logits, tuple(layers[0].shape), like=layers[0])
        experts = route(logits.detach(), top_k)[1]
        p = torch.softmax(logits.to(acc), 1)
        if mask is None:
            tokens = tokens + len(logits)
        else:
            check_tensor("load_balancing_loss: mask", mask, tuple(logits.shape[:1]), dtype=mask.dtype, like=logits)
            counts = (mask != 0).unsqueeze(1)
            experts = torch.where(counts, experts, num_experts)
            p = torch.where(counts, p, 0.0)
            tokens = tokens + counts.sum()
        slots = slots + expert_load(experts, num_experts)
        probability = probability + p.sum(0)
    tokens = tokens.clamp(min=1)
    return num_experts * torch.sum((slots / tokens) * (probability / tokens))
