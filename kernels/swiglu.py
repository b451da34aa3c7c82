"""SwiGLU on the fused gate/up projection, forward and backward.

    h = silu(gate) * up,  silu(g) = g * s,  s = sigmoid(g)
    d_up = dh * silu(g)          d_gate = dh * up * s * (1 + g * (1 - s))

Floor (bf16, n = T * I): forward reads 2n and writes n elements, 6n bytes; backward reads 3n and writes 2n, 10n bytes
(12n where it writes h again). Saved: gate_up only; sigmoid is recomputed. Source: Shazeer 2020, arXiv:2002.05202;
arithmetic in fp32, rounded once, or where transformers' LlamaMLP rounds.
May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from ._triton import cast, cdiv, kernel, launch, round_to, tl, unit_rows

# --- torch reference -------------------------------------------------------------------------------------------------

# Rows of one block: its gate, up and results stay in the cache between the elementwise passes (the backward measured
# 1.3x faster than on whole tensors at I = 1536).
_BLOCK_ROWS = 128


def _blocks(gate_up: torch.Tensor, other: torch.Tensor, out: torch.Tensor):
    """(gate, up, other, target, out) per block of rows, the first three in the compute dtype. The passes write to
    `target`: `out` itself where it has that dtype, else one scratch block that is rounded into `out` afterwards."""
    acc = compute_dtype(gate_up.dtype)
    scratch = None if out.dtype == acc else torch.empty(_BLOCK_ROWS, out.shape[1], dtype=acc)
    for block, other_block, out_block in zip(*(x.split(_BLOCK_ROWS) for x in (gate_up, other, out))):
        target = out_block if scratch is None else scratch[: len(out_block)]
        yield *block.to(acc).chunk(2, dim=1), other_block.to(acc), target, out_block


def _activate(gate: torch.Tensor, act: torch.Tensor, dtype: torch.dtype, exact_hf: bool) -> torch.Tensor:
    """act = silu(gate), rounded to `dtype` as transformers does if asked to."""
    torch.ops.aten.silu.out(gate, out=act)
    return act.copy_(act.to(dtype)) if exact_hf else act


def _swiglu_cpu(gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    h = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    for gate, up, _, target, out in _blocks(gate_up, gate_up[:, :0], h):
        _activate(gate, target, h.dtype, exact_hf).mul_(up)
        if target is not out:
            out.copy_(target)
    return h


def _swiglu_backward_cpu(dh: torch.Tensor, gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype)
    for gate, up, dh_block, target, out in _blocks(gate_up, dh, d_gate_up):
        d_gate, d_up = target.chunk(2, dim=1)
        torch.mul(dh_block, up, out=d_gate)
        if exact_hf:
            d_gate.copy_(d_gate.to(gate_up.dtype))
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        _activate(gate, d_up, gate_up.dtype, exact_hf).mul_(dh_block)
        if target is not out:
            out.copy_(target)
    return d_gate_up


def _swiglu_backward_recompute_cpu(dh: torch.Tensor, gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    d_gate_up = _swiglu_backward_cpu(dh, gate_up, exact_hf)
    dh.copy_(_swiglu_cpu(gate_up, exact_hf))
    return d_gate_up


# --- Triton ----------------------------------------------------------------------------------------------------------
# Programs go through a row's blocks first, then to the next row: those that run together touch neighbouring memory,
# and a grid of one dimension has room for 2^31 of them.

_BLOCK = 1024


@kernel
def _forward_kernel(
    GATE_UP, H, stride, width: tl.constexpr, EXACT_HF: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    blocks: tl.constexpr = (width + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    gate = tl.load(GATE_UP + row * stride + col, mask, 0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * stride + width + col, mask, 0.0).to(tl.float32)
    act = gate * tl.sigmoid(gate)
    if EXACT_HF:
        act = round_to(act, H.dtype.element_ty, INTERPRET)
    tl.store(H + row * width + col, cast(act * up, H.dtype.element_ty, INTERPRET), mask)


@kernel
def _backward_kernel(
    DH, GATE_UP, D_GATE_UP, dh_stride, stride, width: tl.constexpr,
    RECOMPUTE: tl.constexpr, EXACT_HF: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """RECOMPUTE: h takes the place of dh, from the same products as in the forward."""
    dtype: tl.constexpr = D_GATE_UP.dtype.element_ty
    blocks: tl.constexpr = (width + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = col < width
    dh = tl.load(DH + row * dh_stride + col, mask, 0.0).to(tl.float32)
    gate = tl.load(GATE_UP + row * stride + col, mask, 0.0).to(tl.float32)
    up = tl.load(GATE_UP + row * stride + width + col, mask, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    act, d_act = gate * s, dh * up
    if EXACT_HF:
        act, d_act = round_to(act, dtype, INTERPRET), round_to(d_act, dtype, INTERPRET)
    d_gate = d_act * s * (1.0 + gate * (1.0 - s))
    out = D_GATE_UP + row * (2 * width) + col
    tl.store(out, cast(d_gate, dtype, INTERPRET), mask)
    tl.store(out + width, cast(dh * act, dtype, INTERPRET), mask)
    if RECOMPUTE:
        tl.store(DH + row * dh_stride + col, cast(act * up, DH.dtype.element_ty, INTERPRET), mask)


def _swiglu_triton(gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    gate_up = unit_rows(gate_up)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    h = gate_up.new_empty(tokens, width)
    grid = (tokens * cdiv(width, _BLOCK),)
    launch(_forward_kernel, grid, gate_up, h, gate_up.stride(0), width=width, EXACT_HF=exact_hf, BLOCK=_BLOCK)
    return h


def _launch_backward(dh: torch.Tensor, gate_up: torch.Tensor, **constexprs) -> torch.Tensor:
    gate_up = unit_rows(gate_up)
    tokens, width = dh.shape
    out = gate_up.new_empty(gate_up.shape)
    grid = (tokens * cdiv(width, _BLOCK),)
    strides = dh.stride(0), gate_up.stride(0)
    launch(_backward_kernel, grid, dh, gate_up, out, *strides, width=width, BLOCK=_BLOCK, **constexprs)
    return out


def _swiglu_backward_triton(dh: torch.Tensor, gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    return _launch_backward(unit_rows(dh), gate_up, RECOMPUTE=False, EXACT_HF=exact_hf)


def _swiglu_backward_recompute_triton(dh: torch.Tensor, gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    return _launch_backward(dh, gate_up, RECOMPUTE=True, EXACT_HF=exact_hf)


# --- operators -------------------------------------------------------------------------------------------------------

_swiglu_op = define_op(
    "swiglu",
    "(Tensor gate_up, bool exact_hf) -> Tensor",
    cpu=_swiglu_cpu,
    cuda=_swiglu_triton,
    fake=lambda gate_up, exact_hf: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
)
_swiglu_backward_op = define_op(
    "swiglu_backward",
    "(Tensor dh, Tensor gate_up, bool exact_hf) -> Tensor",
    cpu=_swiglu_backward_cpu,
    cuda=_swiglu_backward_triton,
    fake=lambda dh, gate_up, exact_hf: gate_up.new_empty(gate_up.shape),
)
_swiglu_backward_recompute_op = define_op(
    "swiglu_backward_recompute",
    "(Tensor(a!) dh, Tensor gate_up, bool exact_hf) -> Tensor",
    cpu=_swiglu_backward_recompute_cpu,
    cuda=_swiglu_backward_recompute_triton,
    fake=lambda dh, gate_up, exact_hf: gate_up.new_empty(gate_up.shape),
)


def swiglu_forward(gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
    """h, without autograd."""
    return _swiglu_op(gate_up, exact_hf)


def swiglu_backward(dh: torch.Tensor, gate_up: torch.Tensor, exact_hf: bool, *, recompute: bool) -> torch.Tensor:
    """Gradient of gate_up. recompute: the contiguous `dh` is overwritten by h, bit for bit as in the forward."""
    operator = _swiglu_backward_recompute_op if recompute else _swiglu_backward_op
    return operator(dh, gate_up, exact_hf)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: torch.Tensor, exact_hf: bool) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.exact_hf = exact_hf
        return _swiglu_op(gate_up, exact_hf)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: torch.Tensor):
        (gate_up,) = ctx.saved_tensors
        return _swiglu_backward_op(dh, gate_up, ctx.exact_hf), None


# --- public ----------------------------------------------------------------------------------------------------------


def swiglu(gate_up: torch.Tensor, *, exact_hf: bool = False) -> torch.Tensor:
    """h = silu(gate) * up; arithmetic in fp32 (fp64 for fp64), rounded once.

    Args:
        gate_up: [T, 2I] = [gate | up] in bf16, fp16 or fp32; on a CPU in fp64 too.
        exact_hf: round where transformers' LlamaMLP does instead of once: silu(gate) before it is multiplied by up; in
            backward also dh * up.

    Returns:
        h [T, I], dtype of gate_up.

    Raises:
        ValueError: gate_up of another dtype or shape.
    """
    check_gate_up("swiglu", gate_up)
    return _SwiGLU.apply(gate_up, exact_hf)


def check_gate_up(function: str, gate_up: torch.Tensor) -> None:
    """ValueError unless gate_up is what SwiGLU in `function` takes."""
    check_tensor(f"{function}: gate_up", gate_up, (None, None), dtype=float_dtypes(gate_up))
    if gate_up.shape[1] % 2:
        raise ValueError(f"{function}: gate_up has shape {tuple(gate_up.shape)}; expected [T, 2I]")
