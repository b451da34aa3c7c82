"""Linear layers that compute their own input, RMSNorm or SwiGLU, and save what that is made of instead of it.

    rms_norm_linear: out = rms_norm(s) W^T + b, s = x (+ residual)      swiglu_linear: out = (silu(gate) * up) W^T + b

dW needs the input of the product once more. The backward of the norm (of SwiGLU) holds in registers all that it is made
of, so it writes it again, over the gradient that it has just read: no second reduction, no further buffer. Floor: that
of `linear`, and 2n bytes in backward for n = rows * H (rows * I) elements of bf16; in return 2n bytes less are kept per
layer. A matrix that is not trained (LoRA) has no dW, and nothing is recomputed. Gradients equal those of `rms_norm`
(`swiglu`) followed by `linear` bit for bit. May touch: torch, and the kernels that it is made of.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor
from .linear import linear
from .rms_norm import add_rms_norm, check_norm, norm_backward, norm_forward, rms_norm
from .swiglu import check_gate_up, swiglu, swiglu_backward, swiglu_forward


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` in the dtype of its operands: backward multiplies outside of the autocast region that forward ran in."""
    with torch.autocast(x.device.type, enabled=False):
        return linear(x, weight, bias)


class _RMSNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, norm_weight, weight, bias, eps: float, exact_hf: bool, return_sum: bool):
        y, s, rstd = norm_forward(x, residual, norm_weight, eps, exact_hf)
        ctx.save_for_backward(s, rstd, norm_weight, weight)
        ctx.has_residual, ctx.exact_hf = residual is not None, exact_hf
        ctx.set_materialize_grads(False)
        out = _product(y, weight, bias)
        return (out, s) if return_sum else out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor | None, ds: torch.Tensor | None = None):
        if d_out is None:
            return ds, ds if ctx.has_residual else None, None, None, None, None, None, None
        s, rstd, norm_weight, weight = ctx.saved_tensors
        need_dw, need_db = ctx.needs_input_grad[3:5]
        dy = _product(d_out, weight.t())
        dx, d_norm_weight = norm_backward(dy, ds, s, norm_weight, rstd, ctx.exact_hf, recompute=need_dw)
        dw = d_out.t() @ dy if need_dw else None  # dy holds y by now
        db = d_out.sum(0) if need_db else None
        return dx, dx if ctx.has_residual else None, d_norm_weight, dw, db, None, None, None


class _SwiGLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, bias, exact_hf: bool):
        ctx.save_for_backward(gate_up, weight)
        ctx.exact_hf = exact_hf
        return _product(swiglu_forward(gate_up, exact_hf), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: torch.Tensor):
        gate_up, weight = ctx.saved_tensors
        _, need_dw, need_db, _ = ctx.needs_input_grad
        dh = _product(d_out, weight.t())
        d_gate_up = swiglu_backward(dh, gate_up, ctx.exact_hf, recompute=need_dw)
        dw = d_out.t() @ dh if need_dw else None  # dh holds h by now
        return d_gate_up, dw, d_out.sum(0) if need_db else None, None


# --- public ----------------------------------------------------------------------------------------------------------


def rms_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
    exact_hf: bool = False,
    return_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out = rms_norm(s, norm_weight, eps) weight^T + bias with s = x, or x + residual rounded to x's dtype.

    Saves s, the reciprocal root mean squares and the weights, not the normalised rows.

    Args:
        x: [T, H]; residual: the same shape and dtype.
        norm_weight: [H], in x's dtype or in fp32.
        weight: [N, H]; bias: [N]; both in x's dtype.
        eps: added to the mean square.
        exact_hf: as in `rms_norm`.
        return_sum: return (out, s) where there is no residual too: s is x, and what flows back through s is added to
            the gradient of the norm before that is rounded, as it is where there is one.

    Returns:
        out [T, N] in x's dtype; with a residual (out, s), both differentiable.

    Raises:
        ValueError: an argument of another dtype, shape or device.
    """
    check_tensor("rms_norm_linear: x", x, (None, None))
    check_norm("rms_norm_linear", x, norm_weight, residual, weight_name="norm_weight")
    _check_linear("rms_norm_linear", x, x.shape[1], weight, bias)
    sources = (x, norm_weight) if residual is None else (x, norm_weight, residual)
    if any(source.requires_grad for source in sources):
        return_sum = return_sum or residual is not None
        return _RMSNormLinear.apply(x, residual, norm_weight, weight, bias, eps, exact_hf, return_sum)
    # Nothing below the product is trained: its input is all that backward asks for, and s is not kept.
    if residual is None:
        out = _product(rms_norm(x, norm_weight, eps, exact_hf=exact_hf), weight, bias)
        return (out, x) if return_sum else out
    y, s = add_rms_norm(x, residual, norm_weight, eps, exact_hf=exact_hf)
    return _product(y, weight, bias), s


def swiglu_linear(
    gate_up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, exact_hf: bool = False
) -> torch.Tensor:
    """out = (silu(gate) * up) weight^T + bias. Saves gate_up and weight, not the product.

    Args:
        gate_up: [T, 2I] = [gate | up].
        weight: [N, I]; bias: [N]; both in gate_up's dtype.
        exact_hf: as in `swiglu`.

    Returns:
        out [T, N], dtype of gate_up.

    Raises:
        ValueError: an argument of another dtype, shape or device.
    """
    check_gate_up("swiglu_linear", gate_up)
    _check_linear("swiglu_linear", gate_up, gate_up.shape[1] // 2, weight, bias)
    if gate_up.requires_grad:
        return _SwiGLULinear.apply(gate_up, weight, bias, exact_hf)
    return _product(swiglu(gate_up, exact_hf=exact_hf), weight, bias)  # h is all that backward asks for


def _check_linear(function: str, x: torch.Tensor, width: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    check_tensor(f"{function}: weight", weight, (None, width), like=x)
    if bias is not None:
        check_tensor(f"{function}: bias", bias, weight.shape[:1], like=x)
