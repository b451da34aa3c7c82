"""AdamW over flat shards, in place: one launch for any number of parameters, for every storage of weights and moments.

    g = grad * grad_scale         m = m + (1 - beta1) (g - m)         v = beta2 v + (1 - beta2) g^2
    w = (1 - lr weight_decay) w - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Weights w are fp32; or bf16 beside an fp32 master; or bf16 and the 16 bits that make an exact fp32 master of it; or
bf16 alone, rounded stochastically. Moments m, v are fp32, bf16 or 8 bits (moments.py). Random bits are numbered by the
global index of the element: neither sharding nor world size changes a bit of the result.

Floor (bytes per element with bf16 gradients and fp32 moments): fp32 weights 26, master 28, remainder 26, bf16 alone 22;
bf16 moments 8 fewer, 8-bit moments 12 fewer. Source: Loshchilov & Hutter 2019, arXiv:1711.05101.
May touch: torch, triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ._op import check_tensor, define_op
from ._shards import shard_tables
from ._triton import cast, cdiv, kernel, launch, tl
from .moments import (
    SCALE_BLOCK,
    decode,
    decode_block,
    encode,
    encode_block,
    round_stochastic,
    round_stochastic_block,
)  # fmt: skip
from .philox import philox_bits, philox_block

# One random word (stream: the step) serves an element: its low half exp_avg, its high half exp_avg_sq, and the high
# half of its product with an odd number, which permutes the words, the weight.
_ODD = 0x9E3779B1 - (1 << 32)  # as a signed 32-bit number

# --- torch reference -------------------------------------------------------------------------------------------------

_PIECE = 1 << 18  # elements that go through fp32 temporaries at a time: those stay in the cache
_VECTOR = 16  # fp32 numbers that torch's fused kernel takes at a time


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
    rounds = _rounds(exp_avgs, exp_avg_sqs, [] if residuals else params)
    options = {
        "lr": lr.item(), "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay,
        "amsgrad": False, "maximize": False,
    }  # fmt: skip
    absent: list[None] = [None] * len(params)
    low = mixed = high = torch.empty(0, dtype=torch.int32)
    for param, grad, m_all, v_all, residual, m_scales, v_scales, first in zip(
        params, grads, exp_avgs, exp_avg_sqs, residuals or absent, exp_avg_scales or absent,
        exp_avg_sq_scales or absent, first_indices, strict=True,
    ):  # fmt: skip
        in_place = scale == 1.0 and {x.dtype for x in (param, grad, m_all, v_all)} == {torch.float32}
        length = len(param) if in_place else _PIECE
        for start in range(0, len(param), length or 1):
            piece = slice(start, start + length)
            blocks = slice(start // SCALE_BLOCK, cdiv(start + length, SCALE_BLOCK))
            m_stored = m_all[piece], None if m_scales is None else m_scales[blocks], True
            v_stored = v_all[piece], None if v_scales is None else v_scales[blocks], False
            stored = param[piece], None if residual is None else residual[piece]
            w, m, v = _read_weight(*stored), _read_moment(*m_stored), _read_moment(*v_stored)
            g = grad[piece].float()
            _fused_step(w, g if scale == 1.0 else g * scale, m, v, time, options)
            if rounds:
                word = philox_bits(seed, int(step), first + start, len(w)).to(torch.int32)
                low, high, mixed = word & 0xFFFF, (word >> 16) & 0xFFFF, (word * _ODD >> 16) & 0xFFFF
            _write_moment(m, *m_stored, low)
            _write_moment(v, *v_stored, high)
            if w is not stored[0]:
                _write_weight(w, *stored, mixed)


def _rounds(*operands: list[Tensor]) -> bool:
    """Whether one of these needs random bits."""
    return any(operand[0].dtype != torch.float32 for operand in operands if operand)


def _fused_step(w: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, options: dict) -> None:
    """torch's fused AdamW, all fp32. It rounds the elements that do not fill the last vector differently; padded here
    to a whole one, they come out the same wherever a shard begins or ends."""
    body = len(w) // _VECTOR * _VECTOR
    if body:
        torch._fused_adamw_([w[:body]], [g[:body]], [m[:body]], [v[:body]], [], [step], **options)
    if tail := len(w) - body:
        w_tail, g_tail, m_tail, v_tail = (torch.nn.functional.pad(x[body:], (0, _VECTOR - tail)) for x in (w, g, m, v))
        torch._fused_adamw_([w_tail], [g_tail], [m_tail], [v_tail], [], [step], **options)
        for x, result in ((w, w_tail), (m, m_tail), (v, v_tail)):
            x[body:] = result[:tail]


def _read_weight(weight: Tensor, residual: Tensor | None) -> Tensor:
    """The fp32 weight; the stored tensor itself if that is fp32 and alone."""
    if residual is None:
        return weight.float()
    if residual.dtype == torch.float32:
        return residual
    w = weight.float()
    w.view(torch.int32).add_(residual)
    return w


def _write_weight(w: Tensor, weight: Tensor, residual: Tensor | None, noise: Tensor) -> None:
    """Into what is stored; w itself may be overwritten."""
    if residual is None:
        weight.copy_(round_stochastic(w, noise))
    elif residual.dtype == torch.float32:
        weight.copy_(w)
    else:
        if not w.sum().isfinite():
            w.masked_fill_(w.isnan(), torch.nan)
        bits = w.view(torch.int32)
        residual.copy_(bits)  # its low half, as what is added to the high half makes it
        weight.view(torch.int16).copy_(bits.add_(1 << 15).bitwise_right_shift_(16))


def _read_moment(stored: Tensor, scales: Tensor | None, signed: bool) -> Tensor:
    return stored.float() if scales is None else decode(stored, scales, signed)


def _write_moment(x: Tensor, stored: Tensor, scales: Tensor | None, signed: bool, noise: Tensor) -> None:
    if scales is not None:
        encode(x, stored, scales, signed, noise)
    elif stored is not x:
        stored.copy_(round_stochastic(x, noise))


# --- Triton ----------------------------------------------------------------------------------------------------------

_CHUNK = 16384  # elements of one program: enough to forget its start, few enough to fill the last wave of programs


@kernel
def _adamw_kernel(
    SHARDS, OWNERS, PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, RESIDUAL, EXP_AVG_SCALE, EXP_AVG_SQ_SCALE,
    LR, STEP, GRAD_SCALE, SKIP, complement1, beta2, complement2, eps, weight_decay, seed,
    ROUNDS: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
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
        m = _load_moment(exp_avg, exp_avg_scale, True, i, mask, offset, count, BLOCK)
        v = _load_moment(exp_avg_sq, exp_avg_sq_scale, False, i, mask, offset, count, BLOCK)

        m = tl.fma(complement1, g - m, m)
        v = tl.fma(complement2 * g, g, v * beta2)
        w = w * decay - step_size * m / (tl.sqrt(v) * root_scale + eps)

        word = 0
        if ROUNDS:
            word = philox_block(seed, step, first_index + start + offset, BLOCK)
        _store_moment(exp_avg, exp_avg_scale, True, m, word & 0xFFFF, i, mask, offset, count, BLOCK)
        _store_moment(exp_avg_sq, exp_avg_sq_scale, False, v, word >> 16, i, mask, offset, count, BLOCK)
        if PARAM.dtype.element_ty == tl.float32:
            tl.store(param + i, w, mask)
        elif RESIDUAL is None:
            tl.store(param + i, round_stochastic_block(w, (word * 0x9E3779B1) >> 16), mask)
        elif RESIDUAL.dtype.element_ty == tl.float32:
            tl.store(param + i, cast(w, tl.bfloat16, INTERPRET), mask)
            tl.store(residual + i, w, mask)
        else:
            # NaN as a GPU makes it, 0x7FFFFFFF, would be rounded up to -0: the model would compute on with zeros.
            bits = tl.where(w == w, w.to(tl.int32, bitcast=True), 0x7FC00000)
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
def _load_moment(pointer, scale, SIGNED: tl.constexpr, i, mask, offset, count, BLOCK: tl.constexpr):
    stored = tl.load(pointer + i, mask, 0)
    if scale is None:
        x = stored.to(tl.float32)
    else:
        block = offset // 256 + tl.arange(0, BLOCK // 256)[:, None]
        x = decode_block(stored, tl.load(scale + block, block * 256 < count, 0.0), SIGNED, BLOCK)
    return x


@kernel
def _store_moment(pointer, scale, SIGNED: tl.constexpr, x, noise, i, mask, offset, count, BLOCK: tl.constexpr):
    if scale is None:
        if pointer.dtype.element_ty == tl.bfloat16:
            x = round_stochastic_block(x, noise)
        tl.store(pointer + i, x, mask)
    else:
        codes, scales = encode_block(x, noise, SIGNED, BLOCK)
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
    rounds = _rounds(exp_avgs, exp_avg_sqs, [] if residuals else params)
    stored = {operand[0].dtype for operand in (params, exp_avgs, exp_avg_sqs, residuals) if operand}
    for aligned, bases, table in shard_tables(operands, first_indices, _CHUNK):
        # fp32 is stored four elements (16 bytes) a thread. A thread takes eight where all is narrower, and where one
        # warp is to find the scale of 256 elements.
        eight = torch.uint8 in stored or (torch.float32 not in stored and aligned)
        launch(
            _adamw_kernel, (len(table.owners),), table.shards, table.owners, *bases, lr, step, grad_scale, skip,
            1 - beta1, beta2, 1 - beta2, eps, weight_decay, seed,
            ROUNDS=rounds, ALIGNED=aligned, CHUNK=_CHUNK, BLOCK=2048 if eight else 1024, num_warps=8,
        )  # fmt: skip


# --- operator --------------------------------------------------------------------------------------------------------

_adamw_op = define_op(
    "adamw_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] residuals,"
    " Tensor(e!)[] exp_avg_scales, Tensor(f!)[] exp_avg_sq_scales, int[] first_indices, Tensor lr, Tensor step,"
    " Tensor? grad_scale, Tensor? skip, float beta1, float beta2, float eps, float weight_decay, int seed) -> ()",
    cpu=_adamw_cpu,
    cuda=_adamw_triton,
    fake=lambda *_: None,
)

# --- public ----------------------------------------------------------------------------------------------------------

_MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


@dataclass(frozen=True)
class AdamWShard:
    """A flat piece of a parameter and its optimizer state: contiguous [n] tensors on one device.

    param: fp32 or bf16.
    exp_avg, exp_avg_sq: fp32; bf16; or uint8 codes with a scale tensor (moments.py).
    master: fp32, the exact weight of a bf16 param, which is it rounded to nearest.
    remainder: int16; the exact fp32 weight of a bf16 param has the bit pattern param * 2^16 + remainder.
        bf16 with neither: param is the weight and is rounded stochastically.
    exp_avg_scale, exp_avg_sq_scale: fp32 [ceil(n / 256)], for uint8 moments only.
    first_index: the number of the shard's first element among all elements of the model, whatever the sharding: random
        bits depend on it. Let every parameter begin at a multiple of 256; shards with uint8 moments must, others may
        begin anywhere (multiples of 4 are faster).

    Under FSDP2, or any other division, the same bits come out on one rank and on many if every rank walks over all
    parameters in the same order and gives each the numbers from the next multiple of 256 on. Of one with `rows` rows of
    `row` elements (a vector has rows of one), rank r of R holds the rows from `first` = min(r * ceil(rows / R), rows):

        local = p.to_local().detach().view(-1)              # may be empty
        shard = AdamWShard.zeros(local, ..., first_index=begin + first * row)
        begin += ceil(rows * row / 256) * 256

    uint8 moments are for parameters whose `row` is a multiple of 256, so that no scale belongs to two ranks; give the
    others, a handful of vectors mostly, bf16. Decayed and undecayed parameters are two calls of `adamw_` with the same
    step. In a checkpoint each tensor here, seen as [local rows, row], is divided as the parameter is, and so is a scale
    as [local rows, row / 256]. Load into them with copy_: a shard keeps its tensors for good.

    Raises:
        ValueError: naming the tensor that does not fit.
    """

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None = None
    remainder: Tensor | None = None
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None
    first_index: int = 0

    def __post_init__(self) -> None:
        size = (self.param.numel(),)
        expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
            "param": (size, (torch.float32, torch.bfloat16)),
            "exp_avg": (size, _MOMENT_DTYPES),
            "exp_avg_sq": (size, _MOMENT_DTYPES),
            "master": (size, (torch.float32,)),
            "remainder": (size, (torch.int16,)),
            "exp_avg_scale": ((cdiv(size[0], SCALE_BLOCK),), (torch.float32,)),
            "exp_avg_sq_scale": ((cdiv(size[0], SCALE_BLOCK),), (torch.float32,)),
        }
        for name, (shape, dtypes) in expected.items():
            if (tensor := getattr(self, name)) is not None:
                _check_flat(f"AdamWShard: {name}", tensor, shape, dtypes, self.param)
        if self.master is not None and self.remainder is not None:
            raise ValueError("AdamWShard: master and remainder are given; one of them at most")
        if self._residual is not None and self.param.dtype != torch.bfloat16:
            raise ValueError(f"AdamWShard: param is {self.param.dtype}; only bfloat16 has a master or a remainder")
        for name in ("exp_avg", "exp_avg_sq"):
            dtype, scale = getattr(self, name).dtype, getattr(self, f"{name}_scale")
            if (dtype == torch.uint8) != (scale is not None):
                raise ValueError(f"AdamWShard: {name} is {dtype}; uint8 and {name}_scale go together")
        if self.first_index < 0 or (self.first_index % SCALE_BLOCK and torch.uint8 in self._dtypes):
            raise ValueError(
                f"AdamWShard: first_index is {self.first_index}; uint8 moments need a multiple of {SCALE_BLOCK}, others"
                " a number from 0"
            )

    @classmethod
    def zeros(
        cls,
        param: Tensor,
        *,
        residual: Literal["master", "remainder"] | None = None,
        moments: torch.dtype = torch.float32,
        first_index: int = 0,
    ) -> AdamWShard:
        """The state before the first step of a flat [n] parameter, allocated on its device. A master begins as the
        parameter, a remainder as zero."""
        exp_avg, exp_avg_sq = (torch.zeros_like(param, dtype=moments) for _ in range(2))
        state = {}
        if moments == torch.uint8:
            for name in ("exp_avg_scale", "exp_avg_sq_scale"):
                state[name] = param.new_zeros(cdiv(len(param), SCALE_BLOCK), dtype=torch.float32)
        if residual == "master":
            state["master"] = param.detach().float()
        elif residual == "remainder":
            state["remainder"] = torch.zeros_like(param, dtype=torch.int16)
        return cls(param, exp_avg, exp_avg_sq, **state, first_index=first_index)

    @property
    def _residual(self) -> Tensor | None:
        return self.remainder if self.master is None else self.master

    @property
    def _dtypes(self) -> tuple[torch.dtype | None, ...]:
        residual = self._residual
        return self.param.dtype, self.exp_avg.dtype, self.exp_avg_sq.dtype, None if residual is None else residual.dtype


@torch.no_grad()
def adamw_(
    shards: Sequence[AdamWShard],
    grads: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: Tensor,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    seed: int = 0,
) -> None:
    """One AdamW step on every shard, in place, in fp32 arithmetic; one launch for all shards of one storage.

    Nothing waits for the device, and after one step on the same tensors a CUDA graph can capture the next.

    Args:
        shards: parameters and state; any mixture of storages, all on one device.
        grads: one flat [n] bf16 or fp32 gradient per shard; only read.
        lr: learning rate; a 0-dim fp32 or fp64 tensor on the device is read there.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        step: 0-dim, the number of this step, from 1: fp32 (up to 2^24) or an integer type. Read only.
        grad_scale: 0-dim fp32; gradients are multiplied by it first (the clip coefficient). None: 1.
        skip: 0-dim; if not 0, every bit of params and state stays as it is.
        seed: key of the stochastic rounding, in [0, 2^63). The same numbers come out of any division into shards.

    Raises:
        ValueError: naming the argument, what it is and what is allowed.
    """
    if len(shards) != len(grads):
        raise ValueError(f"adamw_: {len(grads)} grads for {len(shards)} shards")
    if not shards:
        return
    like = shards[0].param
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"adamw_: {name} is {value}; it must not be negative")
    if not 0 <= seed < 2**63:
        raise ValueError(f"adamw_: seed is {seed}; it must be in [0, 2^63)")
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float32 if like.is_cuda else torch.float64, device=like.device)
    for name, scalar, dtypes in (
        ("lr", lr, (torch.float32, torch.float64)),
        ("step", step, (torch.float32, torch.int32, torch.int64)),
        ("grad_scale", grad_scale, (torch.float32,)),
        ("skip", skip, (torch.float32, torch.bool, torch.int32)),
    ):
        if scalar is not None:
            check_tensor(f"adamw_: {name}", scalar, (), dtype=dtypes, like=like)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw_: betas are {betas}; each must be in [0, 1)")
    groups: dict[tuple, list[int]] = {}
    for n, (shard, grad) in enumerate(zip(shards, grads)):
        check_tensor("adamw_: a shard's param", shard.param, like=like, dtype=(torch.float32, torch.bfloat16))
        _check_flat("adamw_: grad", grad, shard.param.shape, (torch.float32, torch.bfloat16), like)
        groups.setdefault((*shard._dtypes, grad.dtype), []).append(n)
    for group in groups.values():
        members = [shards[n] for n in group]
        _adamw_op(
            [s.param for s in members], [grads[n] for n in group], [s.exp_avg for s in members],
            [s.exp_avg_sq for s in members], _present([s._residual for s in members]),
            _present([s.exp_avg_scale for s in members]), _present([s.exp_avg_sq_scale for s in members]),
            [s.first_index for s in members],
            lr, step, grad_scale, skip, *betas, eps, weight_decay, seed,
        )  # fmt: skip


def _present(tensors: list[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _check_flat(argument: str, x: Tensor, shape: tuple[int, ...], dtype: tuple[torch.dtype, ...], like: Tensor) -> None:
    check_tensor(argument, x, shape, dtype=dtype, like=like)
    if not x.is_contiguous():
        raise ValueError(f"{argument} has strides {x.stride()}; it must be contiguous")
