"""Fused output projection and cross-entropy: the loss of [T, H] hidden states without ever holding [T, V] logits.

    z = x W^T     nll_t = logsumexp(z_t) - z_t[label_t]     loss = scale * sum(nll)
    dz_t = scale * (softmax(z_t) - onehot(label_t))         dx = dz W         dW = dz^T x

Tokens are taken in a few large chunks of equal size; per chunk: one GEMM into a reused logits buffer, one pass that
turns the buffer into dz in place and emits nll, one GEMM for dx, one accumulating fp32 GEMM for dW. Forward computes
the gradients, so 6*T*H*V FLOPs in all (the floor; recomputing logits in backward would make it 8), and backward only
scales. Source: the chunked in-place scheme of Liger-Kernel, arXiv:2410.10989. No gradient is filtered away; in bf16
are only the operands of the GEMMs (logits and dz among them, as in the unfused model); loss and dW are summed in
fp32, in fixed order. May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import compute_dtype, define_op
from ._triton import cast, cdiv, kernel, launch, next_power_of_2, tl
from .linear import linear

# --- torch reference -------------------------------------------------------------------------------------------------

# 512 rows: at V = 49152, H = 576 the three GEMMs run within 2 % of their best rate (128 rows lose 15 %) in 100 MB.
_CHUNK_TOKENS_CPU = 512
_BLOCK_ROWS = 16


def _chunk_size(tokens: int, limit: int, multiple: int) -> int:
    """Rows per chunk, about `limit` at most, such that all chunks are nearly equal: no small, slow last GEMM."""
    chunks = max(cdiv(tokens, limit), 1)
    return max(cdiv(tokens, chunks * multiple), 1) * multiple


def _accumulate(dw: torch.Tensor, dz: torch.Tensor, x: torch.Tensor) -> None:
    """dw += dz^T x in fp32: in the GEMM where there is one with fp32 output, else by one rounding per chunk."""
    if dz.dtype == dw.dtype:
        dw.addmm_(dz.T, x)
    elif dz.is_cuda:
        torch.addmm(dw, dz.T, x, out_dtype=dw.dtype, out=dw)
    else:
        dw.add_(torch.mm(dz.T, x))


def _cross_entropy_cpu(logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """nll [rows]; logits [rows, V] become dz in place, in row blocks that stay in the cache between the passes."""
    acc = compute_dtype(logits.dtype)
    nll = torch.empty(labels.shape, dtype=acc)
    for z_out, label, nll_out in zip(*(t.split(_BLOCK_ROWS) for t in (logits, labels.unsqueeze(1), nll.unsqueeze(1)))):
        z = z_out.to(acc)
        # The fused softmax is half the price of log_softmax and exp; the largest probability, 1 / sum(exp(z - top)),
        # gives the logarithm of the sum without the underflow that the label's own probability could have.
        distance = z.amax(1, keepdim=True) - z.gather(1, label)
        p = torch.softmax(z, 1, out=z)
        torch.sub(distance, p.amax(1, keepdim=True).log_(), out=nll_out)
        p.scatter_add_(1, label, p.new_full((1, 1), -1.0).expand(len(label), 1))
        if scale is not None:
            p.mul_(scale)
        if p is not z_out:
            z_out.copy_(p)
    return nll


def _lce_cpu(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None,
    ignore_index: int, chunk_tokens: int | None, need_dx: bool, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    acc = compute_dtype(x.dtype)
    nll = torch.zeros(labels.shape, dtype=acc)
    dx = torch.zeros(x.shape if need_dx else 0, dtype=x.dtype)
    dw = torch.zeros(weight.shape if need_dw else 0, dtype=acc)
    # On the CPU the labels are free to look at: ignored rows are left out of all three GEMMs.
    rows = torch.nonzero(labels != ignore_index).squeeze(1)
    if not len(rows):
        return nll, dx, dw
    chunk = _chunk_size(len(rows), chunk_tokens or _CHUNK_TOKENS_CPU, 1)
    buffer = torch.empty(chunk, weight.shape[0], dtype=x.dtype)
    for rows_c in rows.split(chunk):
        x_c, labels_c = x.index_select(0, rows_c), labels.index_select(0, rows_c)
        dz = torch.mm(x_c, weight.T, out=buffer[: len(rows_c)])
        nll.index_copy_(0, rows_c, _cross_entropy_cpu(dz, labels_c, scale))
        if need_dx:
            dx.index_copy_(0, rows_c, linear(dz, weight.T))
        if need_dw:
            _accumulate(dw, dz, x_c)
    return nll, dx, dw


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def _cross_entropy_kernel(
    LOGITS, LABELS, SCALE, NLL, vocab, stride, ignore_index,
    HAS_SCALE: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row: online maximum and sum, then (GRAD) the row is overwritten by dz. The second read mostly hits the L2."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * stride
    label = tl.load(LABELS + row)
    valid = label != ignore_index
    col = tl.arange(0, BLOCK)
    if valid:
        top = float("-inf")
        total = 0.0
        for start in range(0, vocab, BLOCK):
            z = tl.load(logits + start + col, start + col < vocab, float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(z, 0))
            total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top), 0)
            top = new_top
        lse = top + tl.log(total)
        tl.store(NLL + row, lse - tl.load(logits + label).to(tl.float32))
        if GRAD:
            # Every thread must have read the label's logit before another one overwrites it.
            tl.debug_barrier()
            scale = 1.0
            if HAS_SCALE:
                scale = tl.load(SCALE)
            for start in range(0, vocab, BLOCK):
                z = tl.load(logits + start + col, start + col < vocab, 0.0).to(tl.float32)
                dz = scale * (tl.exp(z - lse) - tl.where(start + col == label, 1.0, 0.0))
                tl.store(logits + start + col, cast(dz, LOGITS.dtype.element_ty, INTERPRET), start + col < vocab)
    else:
        tl.store(NLL + row, 0.0)
        if GRAD:
            for start in range(0, vocab, BLOCK):
                zero = tl.zeros((BLOCK,), tl.float32)
                tl.store(logits + start + col, zero.to(LOGITS.dtype.element_ty), start + col < vocab)


def _cross_entropy_triton(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None, nll: torch.Tensor,
    ignore_index: int, grad: bool,
) -> None:  # fmt: skip
    """Write nll [rows] and, with `grad`, turn logits [rows, V] into dz in place."""
    rows, vocab = logits.shape
    launch(
        _cross_entropy_kernel, (rows,), logits, labels, nll if scale is None else scale, nll, vocab, logits.stride(0),
        ignore_index, HAS_SCALE=scale is not None, GRAD=grad, BLOCK=min(next_power_of_2(vocab), 8192), num_warps=8,
    )  # fmt: skip


def _lce_triton(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None,
    ignore_index: int, chunk_tokens: int | None, need_dx: bool, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens, vocab = x.shape[0], weight.shape[0]
    labels = labels.contiguous()
    nll = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    dw = torch.zeros(weight.shape if need_dw else 0, dtype=torch.float32, device=x.device)
    chunk = _chunk_size(tokens, chunk_tokens or _chunk_limit(x, vocab), 128)
    buffer = torch.empty(min(chunk, tokens), vocab, dtype=x.dtype, device=x.device)
    for start in range(0, tokens, chunk):
        part = slice(start, min(start + chunk, tokens))
        z = torch.mm(x[part], weight.T, out=buffer[: part.stop - part.start])
        _cross_entropy_triton(z, labels[part], scale, nll[part], ignore_index, need_dx or need_dw)
        if need_dx:
            torch.mm(z, weight, out=dx[part])
        if need_dw:
            _accumulate(dw, z, x[part])
    return nll, dx, dw


def _chunk_limit(x: torch.Tensor, vocab: int) -> int:
    """Rows of logits that fit in 1/32 of the device's memory (2.5 GB of 80), at least 4096: GEMMs at full rate."""
    memory = torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else 0
    return max(memory // 32 // (vocab * x.element_size()) // 1024 * 1024, 4096)


# --- operators -------------------------------------------------------------------------------------------------------


def _lce_fake(x, weight, labels, scale, ignore_index, chunk_tokens, need_dx, need_dw):
    acc = compute_dtype(x.dtype)
    return (
        x.new_empty(labels.shape, dtype=acc),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw else (0,), dtype=acc),
    )


_lce_op = define_op(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor labels, Tensor? scale, int ignore_index, SymInt? chunk_tokens, bool need_dx,"
    " bool need_dw) -> (Tensor, Tensor, Tensor)",
    cpu=_lce_cpu,
    cuda=_lce_triton,
    fake=_lce_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, scale, ignore_index, chunk_tokens, need_dx, need_dw):
        nll, dx, dw = _lce_op(x, weight, labels, scale, ignore_index, chunk_tokens, need_dx, need_dw)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll)
        loss = nll.sum()
        return (loss if scale is None else loss * scale), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: torch.Tensor, _):
        # Always a fresh product: no host has to ask whether dloss is 1, and a retained graph can be walked again.
        dx, dw = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        dx = (dx * dloss).to(dx.dtype) if need_dx else None
        dw = (dw * dloss).to(ctx.weight_dtype) if need_dw else None
        return dx, dw, None, None, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, nll): loss = scale * sum(nll), a 0-dim fp32 tensor differentiable in x and weight.

    x [T, H] and weight [V, H] of one dtype; labels [T] int64, `ignore_index` where there is no target, else 0 <=
    label < V (not checked on a GPU). scale: fp32 0-dim tensor on x's device, usually 1 / (targets in the global
    batch); None for 1. nll [T] fp32, 0 where ignored, not differentiable. Gradients of weight accumulate in fp32 and
    are rounded once. Without gradients required only the loss is computed. chunk_tokens: rows of logits held at once,
    about.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} "
            "do not agree; expected [T, H], [V, H] and [T]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy: x is {x.dtype} and weight {weight.dtype}; one dtype is needed")
    need_dx, need_dw = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    return _LinearCrossEntropy.apply(x, weight, labels, scale, ignore_index, chunk_tokens, need_dx, need_dw)
