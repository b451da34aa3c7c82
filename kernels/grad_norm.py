"""The 2-norm of all gradients, and what clipping to it means for the step.

    norm = sqrt(sum over gradients of sum g^2)        grad_scale = min(max_norm / norm, 1)        skip = norm not finite

Floor: one read of the gradients (2 bytes per element in bf16). Squares are summed in fp32 over 16,384 elements (512 on
a CPU), the partial sums in fp64, in a fixed order: no atomics, no synchronisation, the same bits in every run. Relative
error: each lane adds 4 squares (32) and a tree the lanes, 20 (40) roundings at most, so 1.2e-6 (2.4e-6) of the squared
norm in the worst case and about 1e-8 of a model's, however many elements it has. Squares overflow beyond 1.8e19: such a
gradient counts as not finite. Source: Pascanu et al. 2013, arXiv:1211.5063; torch.nn.utils.clip_grad_norm_ (which adds
1e-6 to the norm). May touch: torch, triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._op import check_tensor, define_op
from ._shards import shard_tables
from ._triton import kernel, launch, tl

# --- torch reference -------------------------------------------------------------------------------------------------

_PIECE = 1 << 18  # bf16 elements that are converted at a time: their fp32 copy stays in the cache
_ROW = 512  # elements whose squares are summed in fp32, 32 by each lane of the widest vectors


def _squared_norm_cpu(grads: list[Tensor]) -> Tensor:
    norms = [torch.zeros(1)]
    for grad in grads:
        for piece in grad.view(-1).split(_PIECE if grad.dtype == torch.bfloat16 else max(grad.numel(), 1)):
            body = len(piece) // _ROW * _ROW
            norms.append(torch.linalg.vector_norm(piece[:body].float().view(-1, _ROW), dim=1))
            norms.append(torch.linalg.vector_norm(piece[body:].float()).view(1))
    return torch.cat(norms).double().square_().sum()


# --- Triton ----------------------------------------------------------------------------------------------------------

_CHUNK = 16384
_BLOCK = 4096  # 16 elements a thread: 64 KB of loads in flight on an SM


@kernel
def _squares_kernel(
    SHARDS, OWNERS, GRAD, PARTIAL,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one chunk."""
    program = tl.program_id(0)
    shard = SHARDS + tl.load(OWNERS + program) * 4
    start = (program - tl.load(shard + 2)) * CHUNK
    count = tl.minimum(tl.load(shard) - start, CHUNK)
    begin = tl.load(shard + 3)
    if ALIGNED:
        count, begin = tl.multiple_of(count, 16), tl.multiple_of(begin, 128 // GRAD.dtype.element_ty.primitive_bitwidth)
    total = tl.zeros((BLOCK,), tl.float32)
    for offset in range(0, count, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        x = tl.load(GRAD + begin + start + i, i < count, 0.0).to(tl.float32)
        total += x * x
    tl.store(PARTIAL + program, tl.sum(total, 0))


def _squared_norm_triton(grads: list[Tensor]) -> Tensor:
    flat = [grad.view(-1) for grad in grads]
    partial = []
    for dtype in (torch.bfloat16, torch.float32):
        chosen = [grad for grad in flat if grad.dtype == dtype]
        for aligned, bases, table in shard_tables([chosen], [0] * len(chosen), _CHUNK) if chosen else ():
            sums = torch.empty(len(table.owners), dtype=torch.float32, device=table.owners.device)
            launch(
                _squares_kernel, (len(sums),), table.shards, table.owners, *bases, sums,
                ALIGNED=aligned, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=8,
            )  # fmt: skip
            partial.append(sums)
    if not partial:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    return torch.cat(partial).sum(dtype=torch.float64)


# --- operators -------------------------------------------------------------------------------------------------------

_squared_norm_op = define_op(
    "squared_norm",
    "(Tensor[] grads) -> Tensor",
    cpu=_squared_norm_cpu,
    cuda=_squared_norm_triton,
    fake=lambda grads: grads[0].new_empty((), dtype=torch.float64),
)

# --- public ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def squared_norm(grads: Sequence[Tensor]) -> Tensor:
    """Sum of the squares of all elements: fp64, 0-dim, on the gradients' device.

    What a rank contributes when gradients are sharded: all-reduce it, then take the root. grads: at least one tensor,
    bf16 or fp32, any shapes, contiguous, on one device.

    Raises:
        ValueError: no gradient, or one of another kind.
    """
    if not grads:
        raise ValueError("squared_norm: grads is empty; expected at least one tensor")
    for grad in grads:
        check_tensor("squared_norm: grad", grad, dtype=(torch.bfloat16, torch.float32), like=grads[0])
        if not grad.is_contiguous():
            raise ValueError(f"squared_norm: grad has strides {grad.stride()}; it must be contiguous")
    return _squared_norm_op(list(grads))


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The global 2-norm of gradients that this process holds whole: fp32, 0-dim. Otherwise as squared_norm."""
    return squared_norm(grads).sqrt().float()


@torch.no_grad()
def clip_coefficient(norm: Tensor, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """(grad_scale, skip) for adamw_, fp32 0-dim on the norm's device; nothing waits for it.

    grad_scale: max_norm / norm where the norm exceeds max_norm, else exactly 1; None: never clip.
    skip: 1 if the norm is inf or NaN, else 0.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"clip_coefficient: max_norm is {max_norm}; it must be positive, or None")
    skip = 1.0 - torch.isfinite(norm).float()
    if max_norm is None:
        return torch.ones_like(norm, dtype=torch.float32), skip
    return (max_norm / norm).clamp(max=1.0).float(), skip
