"""Linear layer y = x W^T + b: torch's own everywhere but for fp32 on a CPU, where oneDNN multiplies.

    dx = dy W     dW = dy^T x     db = sum(dy)

Floor: 2*T*K*N FLOPs for each of y, dx and dW. The BLAS behind torch.mm is not the fastest GEMM on every CPU: at the
shapes of a 135M decoder oneDNN's was measured 6 to 26 % faster for y and dx on an AMD core with AVX-512 (dW: no gain,
it stays where it was). torch reaches oneDNN in fp32 only through an operator made for Inductor, so its presence is
checked, and it is used for plain matrices only. May touch: torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ._op import define_op


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


_ONEDNN = _has_onednn()


def _linear_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not _ONEDNN or not x.numel():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


_linear_op = define_op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cpu=_linear_cpu,
    cuda=F.linear,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _linear_op(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        x, weight = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad
        dx = _linear_op(dy, weight.t(), None) if need_dx else None
        dw = dy.t() @ x if need_dw else None
        return dx, dw, dy.sum(0) if need_db else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y [T, N] = x [T, K] weight [N, K]^T + bias [N]; what torch.nn.functional.linear computes, under autocast too."""
    plain = x.is_cpu and x.ndim == 2 and x.dtype == weight.dtype == torch.float32
    if plain and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)
