"""Fused output projection and cross-entropy: the loss of [T, H] hidden states without ever holding [T, V] logits.

    z = x W^T     nll_t = logsumexp(z_t) - z_t[label_t]     loss = sum_t scale_t * nll_t
    dz_t = scale_t * (softmax(z_t) - onehot(label_t))       dx = dz W         dW = dz^T x

Tokens are taken in a few large chunks of equal size; per chunk: one GEMM into a reused logits buffer, one pass that
turns the buffer into dz in place (cross_entropy.py, with label smoothing and z-loss), one accumulating fp32 GEMM for
dW, one GEMM for dx. Forward computes the gradients, so 6*T*H*V FLOPs in all (the floor; recomputing logits in backward
would make it 8), and backward only scales. Source: the chunked in-place scheme of Liger-Kernel, arXiv:2410.10989. No
gradient is filtered away; in bf16 are only the operands of the GEMMs (logits and dz among them, as in the unfused
model); loss and dW are summed in fp32, in fixed order. May touch: torch, triton.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, tl
from .cross_entropy import cross_entropy_cpu, cross_entropy_triton
from .linear import linear

# --- chunks ----------------------------------------------------------------------------------------------------------

# 512 rows: at V = 49152, H = 576 the three GEMMs run within 2 % of their best rate (128 rows lose 15 %) in 100 MB.
_CHUNK_TOKENS_CPU = 512
_COMPACT_BELOW = 0.95  # of the rows: gathering them then costs less than the GEMMs of the others


def _chunk_size(tokens: int, limit: int, multiple: int) -> int:
    """Rows per chunk, about `limit` at most, such that all chunks are nearly equal: no small, slow last GEMM."""
    chunks = max(cdiv(tokens, limit), 1)
    return max(cdiv(tokens, chunks * multiple), 1) * multiple


def chunk_plan(tokens: int, row_bytes: int, memory: int, chunk_tokens: int | None = None) -> tuple[int, int]:
    """(rows of a chunk, bytes of the buffers) on a GPU with `memory` bytes, where a row of the buffers has row_bytes.

    3 % of the memory, 2.58 GB of 85 (80 GB cards), and at least 4096 rows: each chunk but the first reads and writes
    all of dW once more, which with 4096 rows costs 7 % of the GEMMs' time and with 8192 3 %. T = 16384 at V = 152064 in
    bf16: two chunks of 8192 rows of 304128 bytes, 2.49 GB.
    """
    limit = chunk_tokens or max(memory // 33 // row_bytes // 128 * 128, 4096)
    chunk = _chunk_size(tokens, limit, min(limit, 128))
    return chunk, min(chunk, tokens) * row_bytes


def _device_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _run_chunks(
    cross_entropy: Callable, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor,
    rows: torch.Tensor | None, chunk: int, buffer: torch.Tensor, dx: torch.Tensor | None, dw: torch.Tensor | None,
    add: bool, options: tuple,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(nll, loss) of `rows` of x (None: all). Writes their dx; writes dW to dw, or with `add` adds it."""
    if rows is not None:
        labels = labels.index_select(0, rows)
        scale = scale.index_select(0, rows) if scale.ndim else scale
    nll, loss = torch.empty(2, len(labels), dtype=compute_dtype(x.dtype), device=x.device)
    vocab = weight.shape[0]
    # bf16 gradients of fp32 logits take the first half of each row's memory.
    dz_buffer = buffer.view(x.dtype)
    for start in range(0, len(labels), chunk):
        part = slice(start, min(start + chunk, len(labels)))
        x_c = x[part] if rows is None else x.index_select(0, rows[part])
        logits = _mm(x_c, weight.T, buffer[: len(x_c), :vocab])
        dz = dz_buffer[: len(x_c), :vocab]
        grad = dx is not None or dw is not None
        scale_c = scale[part] if scale.ndim else scale
        cross_entropy(logits, dz if grad else None, labels[part], scale_c, nll[part], loss[part], *options)
        if dw is not None:
            _weight_gradient(dz, x_c, dw, add or start > 0)
        if dx is not None:
            if rows is None:
                _input_gradient(dz, weight, dx[part])
            else:
                dx.index_copy_(0, rows[part], _input_gradient(dz, weight, x_c))
        del x_c  # or the next chunk's would be made beside it
    return nll, loss


def _mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _weight_gradient(dz: torch.Tensor, x: torch.Tensor, dw: torch.Tensor, add: bool) -> None:
    """dw = dz^T x or dw += dz^T x, in fp32: in the GEMM where one has fp32 output, else by one rounding per chunk."""
    if dz.dtype == dw.dtype or dz.is_cuda:
        if not add:
            _mm(dz.T, x, dw)
        elif dz.dtype == dw.dtype:
            dw.addmm_(dz.T, x)
        else:
            torch.addmm(dw, dz.T, x, out_dtype=dw.dtype, out=dw)
    else:
        product = torch.mm(dz.T, x)
        dw.add_(product) if add else dw.copy_(product)


def _input_gradient(dz: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(dz, weight, out=out) if dz.is_cuda else out.copy_(linear(dz, weight.T))


def _new_dw(weight: torch.Tensor, rows: int, need: bool) -> torch.Tensor:
    """Left to the first chunk to write, if there is one."""
    new = torch.empty if rows else torch.zeros
    return new(weight.shape if need else 0, dtype=compute_dtype(weight.dtype), device=weight.device)


def _refuse_recomputation() -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "linear_cross_entropy: called with main_grad inside a backward pass (activation checkpointing?), which "
            "would add dW twice; keep it out of the checkpointed region"
        )


# --- torch reference -------------------------------------------------------------------------------------------------


def _lce_cpu(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, logits_dtype: torch.dtype, chunk_tokens: int | None, num_valid: int | None,
    main_grad: torch.Tensor | None, need_dx: bool, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    # On the CPU the labels are free to look at: ignored rows are left out of all three GEMMs.
    rows = torch.nonzero(labels != ignore_index).squeeze(1)
    if num_valid is not None and num_valid != len(rows):
        raise ValueError(f"linear_cross_entropy: num_valid is {num_valid}, but {len(rows)} labels are not ignored")
    if main_grad is not None:
        _refuse_recomputation()
    scale = torch.ones((), dtype=torch.float32) if scale is None else scale
    dx = torch.zeros(x.shape if need_dx else 0, dtype=x.dtype)
    dw = _new_dw(weight, len(rows), need_dw and main_grad is None)
    target = dw if main_grad is None else main_grad
    chunk = _chunk_size(len(rows), chunk_tokens or _CHUNK_TOKENS_CPU, 1)
    buffer = torch.empty(chunk, weight.shape[0], dtype=logits_dtype)
    nll, loss = _run_chunks(
        cross_entropy_cpu, x, weight, labels, scale, rows, chunk, buffer, dx if need_dx else None,
        target if need_dw else None, main_grad is not None, (ignore_index, label_smoothing, z_loss),
    )  # fmt: skip
    return loss.sum(), nll.new_zeros(len(x)).index_copy_(0, rows, nll), dx, dw


# --- Triton ----------------------------------------------------------------------------------------------------------


def _lce_triton(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor | None, ignore_index: int,
    label_smoothing: float, z_loss: float, logits_dtype: torch.dtype, chunk_tokens: int | None, num_valid: int | None,
    main_grad: torch.Tensor | None, need_dx: bool, need_dw: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    if main_grad is not None:
        _refuse_recomputation()
    (tokens, hidden), vocab = x.shape, weight.shape[0]
    labels = labels.contiguous()
    truth = torch.ones((), dtype=torch.float32, device=x.device)
    scale = truth if scale is None else scale.contiguous()
    rows = None
    if num_valid is not None:
        valid = labels != ignore_index
        # 1, or NaN if num_valid is wrong: through the scale that reaches the loss and every gradient.
        truth = torch.where(valid.sum() == num_valid, truth, float("nan"))
        scale = scale * truth
        if num_valid < _COMPACT_BELOW * tokens:
            rows = torch.nonzero_static(valid, size=num_valid, fill_value=0).squeeze(1)
    count = tokens if rows is None else len(rows)

    if need_dx and rows is not None:
        dx = (truth - 1).to(x.dtype).expand(x.shape).contiguous()
    else:
        dx = torch.empty(x.shape if need_dx else 0, dtype=x.dtype, device=x.device)
    dw = _new_dw(weight, count, need_dw and main_grad is None)
    target = dw if main_grad is None else main_grad
    # Rows begin at multiples of 128 bytes: whole vectors for the row kernel and for the GEMMs, whatever V is.
    width = cdiv(vocab, 64) * 64
    row_bytes = width * logits_dtype.itemsize + (0 if rows is None else hidden * x.element_size())
    chunk, _ = chunk_plan(count, row_bytes, _device_memory(x.device), chunk_tokens)
    buffer = torch.empty(min(chunk, count), width, dtype=logits_dtype, device=x.device)
    nll, loss = _run_chunks(
        cross_entropy_triton, x, weight, labels, scale, rows, chunk, buffer, dx if need_dx else None,
        target if need_dw else None, main_grad is not None, (ignore_index, label_smoothing, z_loss),
    )  # fmt: skip
    if rows is not None:
        nll = nll.new_zeros(tokens).index_copy_(0, rows, nll)
    return loss.sum() * truth, nll, dx, dw


@kernel
def _scale_kernel(X, FACTOR, Y, count, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    """y = x * factor, in fp32, rounded once."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + index, index < count).to(tl.float32)
    y = x * tl.load(FACTOR).to(tl.float32)
    tl.store(Y + index, cast(y, Y.dtype.element_ty, INTERPRET), index < count)


def _scale_cpu(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (x.to(compute_dtype(x.dtype)) * factor).to(dtype)


def _scale_triton(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One kernel instead of torch's product and conversion, which would hold and move dW in fp32 once more."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        launch(_scale_kernel, (cdiv(x.numel(), 4096),), x, factor, y, x.numel(), BLOCK=4096, num_warps=8)
    return y


# --- operators -------------------------------------------------------------------------------------------------------


def _lce_fake(
    x, weight, labels, scale, ignore_index, label_smoothing, z_loss, logits_dtype, chunk_tokens, num_valid, main_grad,
    need_dx, need_dw,
):  # fmt: skip
    acc = compute_dtype(x.dtype)
    return (
        x.new_empty((), dtype=acc),
        x.new_empty(labels.shape, dtype=acc),
        x.new_empty(x.shape if need_dx else (0,)),
        x.new_empty(weight.shape if need_dw and main_grad is None else (0,), dtype=acc),
    )


_lce_op = define_op(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor labels, Tensor? scale, int ignore_index, float label_smoothing, float z_loss,"
    " ScalarType logits_dtype, SymInt? chunk_tokens, SymInt? num_valid, Tensor(a!)? main_grad, bool need_dx,"
    " bool need_dw) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_lce_cpu,
    cuda=_lce_triton,
    fake=_lce_fake,
)
_scale_op = define_op(
    "scale_gradient",
    "(Tensor x, Tensor factor, ScalarType dtype) -> Tensor",
    cpu=_scale_cpu,
    cuda=_scale_triton,
    fake=lambda x, factor, dtype: x.new_empty(x.shape, dtype=dtype),
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, scale, options, main_grad, need_dx, need_dw):
        loss, nll, dx, dw = _lce_op(x, weight, labels, scale, *options, main_grad, need_dx, need_dw)
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        ctx.buffered = main_grad is not None
        ctx.done = False
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: torch.Tensor, _):
        # Always a fresh product: no host has to ask whether dloss is 1, and a retained graph can be walked again.
        dx, dw = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[:2]
        if ctx.buffered:
            if ctx.done:
                raise RuntimeError("linear_cross_entropy: a loss with main_grad can be backpropagated once")
            ctx.done = True
            # dW has been added as it is: of another dloss nothing would be right.
            dloss = torch.where(dloss == 1, dloss, float("nan"))
        dx = _scale_op(dx, dloss, dx.dtype) if need_dx else None
        dw = _scale_op(dw, dloss, ctx.weight_dtype) if need_dw and not ctx.buffered else None
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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    num_valid: int | None = None,
    main_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, nll): loss = sum_t scale_t * (smoothed nll_t + z_loss * lse_t^2) over the rows that have a label.

    Args:
        x, weight: [T, H] and [V, H], of one dtype (bf16, fp16 or fp32; on a CPU fp64 too); the loss is differentiable
            in both.
        labels: [T] int64; ignore_index where there is no target, else 0 <= label < V. (Another one: torch's index error
            on a CPU, NaN in loss and gradients on a GPU.)
        scale: fp32, without gradient: 0-dim, usually 1 / (targets in the global batch), or a weight per token [T], by
            which gradients per token are chosen. None for 1. (In fp16 a GradScaler's factor belongs in here too: on the
            loss it comes after the gradients, which have underflowed by then.)
        chunk_tokens: rows of logits held at once, about. None: what 3 % of the GPU's memory holds (`chunk_plan`).
        label_smoothing: smoothed nll = (1 - e) * nll + e * mean over the vocabulary of -log p, as F.cross_entropy.
        z_loss: weight of the squared log-sum-exp (PaLM used 1e-4, arXiv:2204.02311).
        logits_dtype: torch.float32 keeps the logits of a bf16 product in fp32, in twice the memory; None for x's dtype,
            as transformers. dz is rounded to x's dtype in both.
        num_valid: how many labels are not ignore_index, as the packer knows it. With more than 5 % of the rows ignored
            a GPU then computes only the others. A wrong number is a ValueError on a CPU; a GPU cannot tell the host,
            there loss and gradients are NaN.
        main_grad: fp32 [V, H], contiguous. dW is added to it by this call, and weight gets no gradient from autograd:
            no other memory of that size is needed. The loss must then be backpropagated once, with upstream gradient 1
            (factors belong into `scale`): for any other one x's gradient is NaN.

    Returns:
        loss, 0-dim, and nll [T], plain -log p(label), 0 where ignored, not differentiable; both fp32, or fp64 for fp64
        arguments. Gradients of weight accumulate in fp32 and are rounded once. Where no gradient is required only the
        loss is computed.

    Raises:
        ValueError: arguments that do not agree.
        RuntimeError: main_grad in a forward pass that a backward pass runs again: dW would be added twice.
    """
    if hasattr(weight, "full_tensor"):
        raise ValueError("linear_cross_entropy: weight is a DTensor; call it in the module that owns it: FusedLMHead")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)} and labels {tuple(labels.shape)} "
            "do not agree; expected [T, H], [V, H] and [T]"
        )
    check_tensor("linear_cross_entropy: x", x, dtype=float_dtypes(x))
    acc = compute_dtype(x.dtype)
    check_tensor("linear_cross_entropy: weight", weight, like=x)
    check_tensor("linear_cross_entropy: labels", labels, dtype=torch.int64, like=x)
    if scale is not None:
        check_tensor("linear_cross_entropy: scale", scale, (len(x),) if scale.ndim else (), dtype=torch.float32, like=x)
        if scale.requires_grad:
            raise ValueError("linear_cross_entropy: scale requires a gradient, but gets none: detach it")
    if logits_dtype is None:
        logits_dtype = x.dtype
    if logits_dtype not in (x.dtype, acc):
        raise ValueError(f"linear_cross_entropy: logits_dtype is {logits_dtype}; allowed for x: {x.dtype}, {acc}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing is {label_smoothing}; it must be from 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"linear_cross_entropy: z_loss is {z_loss}; it must not be negative")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens is {chunk_tokens}; it must be positive")
    if num_valid is not None and not 0 <= num_valid <= len(x):
        raise ValueError(f"linear_cross_entropy: num_valid is {num_valid}; x has {len(x)} rows")
    need_dx, need_dw = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    if main_grad is not None:
        check_tensor("linear_cross_entropy: main_grad", main_grad, tuple(weight.shape), dtype=acc, like=x)
        if not main_grad.is_contiguous() or main_grad.requires_grad:
            raise ValueError("linear_cross_entropy: main_grad must be contiguous and require no gradient")
        if need_dw and not need_dx:
            # Nothing would carry the news of an upstream gradient other than 1.
            raise ValueError("linear_cross_entropy: main_grad is for an x that requires a gradient")
    options = (ignore_index, float(label_smoothing), float(z_loss), logits_dtype, chunk_tokens, num_valid)
    return _LinearCrossEntropy.apply(
        x, weight, labels, scale, options, main_grad if need_dw else None, need_dx, need_dw
    )
