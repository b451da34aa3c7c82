"""AdamW over flat shards, in place: one launch for any number of parameters, for every storage of weights and moments.

    g = grad * grad_scale         m = m + (1 - beta1) (g - m)         v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Weights w are fp32; or bf16 beside an fp32 master; or bf16 and the 16 bits that make an exact fp32 master of it; or bf16
alone, rounded stochastically. Moments m, v are fp32, bf16 or 8 bits (moments.py). Random bits are numbered by the global
index of the element: neither sharding nor world size changes a bit of the result.

Floor (bytes per element with bf16 gradients and fp32 moments): fp32 weights 26, master 28, remainder 26, bf16 alone 22;
bf16 moments 8 fewer, 8-bit moments 12 fewer. Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
May touch: torch, triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ._op import check_tensor, define_op
from ._triton import cast, cdiv, kernel, launch, tl
from .moments import (
    SCALE_BLOCK, decode, decode_block, encode, encode_block, round_stochastic, round_stochastic_block,
)  # fmt: skip
from .philox import philox_bits, philox_block

# One random word (stream: the step) serves an element: its low half exp_avg, its high half exp_avg_sq, and the high half
# of its product with an odd number, which permutes the words, the weight.
_ODD = 0x9E3779B1

# --- torch reference -------------------------------------------------------------------------------------------------

_PIECE = 1 << 19  # elements that go through fp32 temporaries at a time: those stay in the cache


def _adamw_cpu(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    residuals: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], first_indices: list[int],
    lr: Tensor, step: Tensor, grad_scale: Tensor | None, skip: Tensor | None,
    beta1: float, beta2: float, eps: float, weight_decay: float, seed: int,
) -> None:  # fmt: skip
    if skip is not None and skip.item() != 0:
        return
    scale = 1.0 if grad_scale is None else grad_scale.item()
    time = step.float()
    options = {
        "lr": lr.item(), "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay,
        "amsgrad": False, "maximize": False,
    }  # fmt: skip
    absent: list[None] = [None] * len(params)
    for param, grad, m_all, v_all, residual, m_scales, v_scales, first in zip(
        params, grads, exp_avgs, exp_avg_sqs, residuals or absent, exp_avg_scales or absent,
        exp_avg_sq_scales or absent, first_indices, strict=True,
    ):  # fmt: skip
        for start in range(0, len(param), _PIECE):
            piece = slice(start, start + _PIECE)
            blocks = slice(start // SCALE_BLOCK, (start + _PIECE) // SCALE_BLOCK)
            m_stored = m_all[piece], None if m_scales is None else m_scales[blocks]
            v_stored = v_all[piece], None if v_scales is None else v_scales[blocks]
            stored = param[piece], None if residual is None else residual[piece]
            w, m, v = _read_weight(*stored), _read_moment(*m_stored), _read_moment(*v_stored)
            g = grad[piece].float()
            _fused_step([w, g if scale == 1.0 else g * scale, m, v], time, options)
            word = None
            if m is not m_stored[0] or v is not v_stored[0] or (w is not stored[0] and residual is None):
                word = philox_bits(seed, int(step), first + start, len(w))
            _write_moment(m, *m_stored, None if word is None else word & 0xFFFF)
            _write_moment(v, *v_stored, None if word is None else word >> 16)
            if w is not stored[0]:
                _write_weight(w, *stored, None if word is None else (word * _ODD & 0xFFFFFFFF) >> 16)


def _fused_step(tensors: list[Tensor], step: Tensor, options: dict) -> None:
    """torch's fused AdamW on [w, g, m, v], all fp32. Elements that do not fill a vector of the last thread's part are
    rounded by other code there; padded, they are not, and where a shard begins or ends does not change its bits."""
    unit = 16 * torch.get_num_threads()
    count = len(tensors[0])
    body = count // unit * unit
    tails = [torch.nn.functional.pad(x[body:], (0, body + unit - count)) for x in tensors if body < count]
    for w, g, m, v in ([x[:body] for x in tensors], tails):
        torch._fused_adamw_([w], [g], [m], [v], [], [step], **options)
    for x, tail in zip(tensors, tails):
        x[body:] = tail[: count - body]


def _read_weight(weight: Tensor, residual: Tensor | None) -> Tensor:
    """The fp32 weight; the stored tensor itself if that is fp32 and alone."""
    if residual is None:
        return weight.float()
    if residual.dtype == torch.float32:
        return residual
    return (weight.view(torch.int16).to(torch.int32) << 16).add_(residual).view(torch.float32)


def _write_weight(w: Tensor, weight: Tensor, residual: Tensor | None, noise: Tensor) -> None:
    if residual is None:
        weight.copy_(round_stochastic(w, noise))
    elif residual.dtype == torch.float32:
        weight.copy_(w)
    else:
        bits = w.view(torch.int32)
        high = (bits + (1 << 15)) >> 16
        weight.view(torch.int16).copy_(high)
        residual.copy_(bits - (high << 16))


def _read_moment(stored: Tensor, scales: Tensor | None) -> Tensor:
    return stored.float() if scales is None else decode(stored, scales)


def _write_moment(x: Tensor, stored: Tensor, scales: Tensor | None, noise: Tensor) -> None:
    if scales is not None:
        encode(x, stored, scales, noise)
    elif stored is not x:
        stored.copy_(round_stochastic(x, noise))


# --- Triton ----------------------------------------------------------------------------------------------------------

_CHUNK = 16384  # elements of one program: enough to forget its start, few enough to fill the last wave of programs


@kernel
def _adamw_kernel(
    SHARDS, OWNERS, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, RESIDUAL, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE,
    LR, STEP, GRAD_SCALE, SKIP, complement1, beta2, complement2, eps, weight_decay, seed,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One chunk of the shard that owns this program. A row of SHARDS: length, first index, first program, and where
    each operand begins, in elements from its base pointer."""
    shard = SHARDS + tl.load(OWNERS + tl.program_id(0)) * 10
    length, first_index, first_program = tl.load(shard), tl.load(shard + 1), tl.load(shard + 2)
    # A block of random words starts at a multiple of four; so does the chunk, if need be before the shard's beginning.
    shift = 0 if ALIGNED else first_index % 4
    start = (tl.program_id(0) - first_program) * CHUNK - shift
    count = tl.minimum(length - start, CHUNK)
    if SKIP is not None:
        count = tl.where(tl.load(SKIP) != 0, 0, count)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    param = _at(PARAM, shard + 3, start, ALIGNED)
    grad = _at(GRAD, shard + 4, start, ALIGNED)
    exp_avg = _at(EXP_AVG, shard + 5, start, ALIGNED)
    exp_avg_sq = _at(EXP_AVG_SQ, shard + 6, start, ALIGNED)
    residual = None if RESIDUAL is None else _at(RESIDUAL, shard + 7, start, ALIGNED)
    exp_avg_scale = None if EXP_AVG_SCALE is None else EXP_AVG_SCALE + tl.load(shard + 8) + start // 256
    exp_avg_sq_scale = None if EXP_AVG_SQ_SCALE is None else EXP_AVG_SQ_SCALE + tl.load(shard + 9) + start // 256

    step = tl.load(STEP).to(tl.int64)
    lr = tl.load(LR).to(tl.float64)
    step_size = (lr / _bias_correction(complement1, step)).to(tl.float32)
    root_scale = tl.div_rn(1.0, tl.sqrt_rn(_bias_correction(complement2, step).to(tl.float32)))
    decay = (1.0 - lr * weight_decay).to(tl.float32)
    grad_scale = 1.0 if GRAD_SCALE is None else tl.load(GRAD_SCALE).to(tl.float32)

    for offset in range(0, count, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        mask = i < count if ALIGNED else (i < count) & (start + i >= 0)
        g = tl.load(grad + i, mask, 0.0).to(tl.float32) * grad_scale
        if RESIDUAL is None:
            w = tl.load(param + i, mask, 0.0).to(tl.float32)
        elif RESIDUAL.dtype.element_ty == tl.float32:
            w = tl.load(residual + i, mask, 0.0)
        else:
            bits = tl.load(param + i, mask, 0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
            w = (bits + tl.load(residual + i, mask, 0)).to(tl.float32, bitcast=True)
        m = _load_moment(exp_avg, exp_avg_scale, i, mask, offset, count, BLOCK)
        v = _load_moment(exp_avg_sq, exp_avg_sq_scale, i, mask, offset, count, BLOCK)

        m = tl.fma(complement1, g - m, m)
        v = tl.fma(complement2 * g, g, v * beta2)
        w = w * decay - step_size * m / (tl.sqrt(v) * root_scale + eps)

        if EXP_AVG.dtype.element_ty == tl.float32 and EXP_AVG_SQ.dtype.element_ty == tl.float32 and (
            PARAM.dtype.element_ty == tl.float32 or RESIDUAL is not None
        ):
            word = 0  # nothing is rounded
        else:
            word = philox_block(seed, step, first_index + start + offset, BLOCK)
        _store_moment(exp_avg, exp_avg_scale, m, word & 0xFFFF, i, mask, offset, count, BLOCK)
        _store_moment(exp_avg_sq, exp_avg_sq_scale, v, word >> 16, i, mask, offset, count, BLOCK)
        if PARAM.dtype.element_ty == tl.float32:
            tl.store(param + i, w, mask)
        elif RESIDUAL is None:
            tl.store(param + i, round_stochastic_block(w, (word * 0x9E3779B1) >> 16), mask)
        elif RESIDUAL.dtype.element_ty == tl.float32:
            tl.store(param + i, cast(w, tl.bfloat16, INTERPRET), mask)
            tl.store(residual + i, w, mask)
        else:
            bits = w.to(tl.int32, bitcast=True)
            high = (bits + 0x8000) >> 16
            tl.store(param + i, high.to(tl.int16).to(tl.bfloat16, bitcast=True), mask)
            tl.store(residual + i, (bits - (high << 16)).to(tl.int16), mask)


@kernel
def _at(BASE, offset, start, ALIGNED: tl.constexpr):
    """The operand's element `start`. ALIGNED: it begins at a multiple of 16 bytes."""
    begin = tl.load(offset)
    if ALIGNED:
        begin = tl.multiple_of(begin, 128 // BASE.dtype.element_ty.primitive_bitwidth)
    return BASE + begin + start


@kernel
def _bias_correction(complement, step):
    """1 - (1 - complement)^step in fp64, by repeated squaring: no rounding error worth a bit of an fp32."""
    base = 1.0 - tl.full((), complement, tl.float32).to(tl.float64)
    power = base * 0.0 + 1.0
    for _ in tl.static_range(31):
        power = tl.where(step % 2 == 1, power * base, power)
        base = base * base
        step = step // 2
    return 1.0 - power


@kernel
def _load_moment(pointer, scale, i, mask, offset, count, BLOCK: tl.constexpr):
    stored = tl.load(pointer + i, mask, 0)
    if scale is None:
        x = stored.to(tl.float32)
    else:
        block = offset // 256 + tl.arange(0, BLOCK // 256)[:, None]
        x = decode_block(stored, tl.load(scale + block, block * 256 < count, 0.0), BLOCK)
    return x


@kernel
def _store_moment(pointer, scale, x, noise, i, mask, offset, count, BLOCK: tl.constexpr):
    if scale is None:
        if pointer.dtype.element_ty == tl.bfloat16:
            x = round_stochastic_block(x, noise)
        tl.store(pointer + i, x, mask)
    else:
        codes, scales = encode_block(x, noise, pointer.dtype.element_ty == tl.int8, BLOCK)
        tl.store(pointer + i, codes, mask)
        block = offset // 256 + tl.arange(0, BLOCK // 256)[:, None]
        tl.store(scale + block, scales, block * 256 < count)


def _adamw_triton(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    residuals: list[Tensor], exp_avg_scales: list[Tensor], exp_avg_sq_scales: list[Tensor], first_indices: list[int],
    lr: Tensor, step: Tensor, grad_scale: Tensor | None, skip: Tensor | None,
    beta1: float, beta2: float, eps: float, weight_decay: float, seed: int,
) -> None:  # fmt: skip
    operands = [params, grads, exp_avgs, exp_avg_sqs, residuals, exp_avg_scales, exp_avg_sq_scales]
    scalars = lr, step, grad_scale, skip, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, seed
    addresses = [[tensor.data_ptr() for tensor in operand] for operand in operands]
    lengths = [len(param) for param in params]
    # Shards whose every vector of 16 elements lies on 16-byte boundaries take wide accesses, the others narrow ones.
    aligned = [
        length % 16 == 0 and first % 4 == 0 and all(column[n] % 16 == 0 for column in addresses[:5] if column)
        for n, (length, first) in enumerate(zip(lengths, first_indices))
    ]
    block = 1024 if exp_avgs[0].dtype == torch.float32 else 2048
    for wide in (True, False):
        chosen = [n for n in range(len(params)) if aligned[n] == wide and lengths[n]]
        if not chosen:
            continue
        bases = [operand[chosen[0]] if operand else None for operand in operands]
        offsets = [
            [(column[n] - column[chosen[0]]) // operand[0].element_size() for n in chosen] if operand else [0] * len(chosen)
            for operand, column in zip(operands, addresses)
        ]
        firsts = [first_indices[n] for n in chosen]
        shards, owners = _table(params[0].device, wide, (*zip([lengths[n] for n in chosen], firsts, *offsets),))
        launch(
            _adamw_kernel, (len(owners),), shards, owners, *bases, *scalars, ALIGNED=wide, CHUNK=_CHUNK, BLOCK=block,
            num_warps=8,
        )  # fmt: skip


@lru_cache(maxsize=32)
def _table(device: torch.device, aligned: bool, rows: tuple[tuple[int, ...], ...]) -> tuple[Tensor, Tensor]:
    """(shards int64 [n, 10], the shard that each program works on, int32), on the device."""
    chunks = [cdiv(length + (0 if aligned else first % 4), _CHUNK) for length, first, *_ in rows]
    firsts = [sum(chunks[:n]) for n in range(len(chunks))]
    shards = torch.tensor([(length, first, p, *offsets) for (length, first, *offsets), p in zip(rows, firsts)])
    owners = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(chunks))
    return shards.to(device), owners.to(device)
