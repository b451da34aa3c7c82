"""Gate and up projections of an MLP whose two weights are separate parameters, into the one buffer that `swiglu` takes.

    y = [x Wg^T | x Wu^T]      dx = dg Wg + du Wu      dWg = dg^T x      dWu = du^T x      [dg | du] = dy

Floor: 4*T*H*I FLOPs forward, 8*T*H*I backward; the GEMMs write to and read from the halves of the [T, 2I] buffers in
place (row stride 2I), so neither the weights nor the results are ever concatenated, and the two terms of dx are added
inside the second GEMM. For models that keep Hugging Face's gate_proj and up_proj apart. May touch: torch.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, define_op


def _gate_up(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    width = gate.shape[0]
    y = x.new_empty(x.shape[0], 2 * width)
    torch.mm(x, gate.T, out=y[:, :width])
    torch.mm(x, up.T, out=y[:, width:])
    return y


_gate_up_op = define_op(
    "gate_up_linear",
    "(Tensor x, Tensor gate, Tensor up) -> Tensor",
    cpu=_gate_up,
    fake=lambda x, gate, up: x.new_empty(x.shape[0], 2 * gate.shape[0]),
)


class _GateUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up):
        ctx.save_for_backward(x, gate, up)
        return _gate_up_op(x, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: torch.Tensor):
        x, gate, up = ctx.saved_tensors
        need_dx, need_gate, need_up = ctx.needs_input_grad
        d_gate, d_up = dy.chunk(2, dim=1)
        dx = torch.mm(d_gate, gate).addmm_(d_up, up) if need_dx else None
        return dx, d_gate.T @ x if need_gate else None, d_up.T @ x if need_up else None


def gate_up_linear(x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor) -> torch.Tensor:
    """[T, 2I] = [x gate_weight^T | x up_weight^T], the argument of `swiglu`.

    x [T, H]; gate_weight and up_weight [I, H], as torch.nn.Linear stores them, all of one dtype and device.
    """
    check_tensor("gate_up_linear: x", x, (None, None))
    check_tensor("gate_up_linear: gate_weight", gate_weight, (None, x.shape[1]), like=x)
    check_tensor("gate_up_linear: up_weight", up_weight, tuple(gate_weight.shape), like=x)
    return _GateUp.apply(x, gate_weight, up_weight)
