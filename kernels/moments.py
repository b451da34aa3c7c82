"""How AdamW's moments are stored in 16 or 8 bits without bias: stochastic rounding to bf16, and 8-bit floats in blocks.

Both draw one of the two neighbours of x such that the mean is x. Nothing drifts, however little a moment changes in a
step: rounded to nearest, 0.999 v would be v again.

An 8-bit moment is |x| = (z - c) * scale / (1.875 - c), where z = c * 2^e * (1 + f / 8) and 8 e + f is the code. scale
is the largest |x| of 256 elements, which gets the largest code. exp_avg: a sign bit, 7 bits of code, c = 2^-15;
exp_avg_sq: 8 bits, c = 2^-31. A code is the top bits of the fp32 number z: no table, no search, an addition each way.
Codes are 6 to 12 % apart, and evenly spaced by c / 8 near zero: 2e-6 of the largest exp_avg, 3e-11 of the largest
exp_avg_sq, whose root is 6e-6. So a few input channels a hundred times as large as the others, as language models have
them, cost the others nothing. (bitsandbytes' dynamic map is finer near the largest, and has lost the small exp_avg_sq
by then.) An exp_avg_sq above zero never becomes zero: m / sqrt(v) stays bounded.

Sources: Zamirai et al. 2020, arXiv:2010.06192 (stochastic rounding of bf16 weights); Dettmers et al. 2022,
arXiv:2110.02861 (8-bit moments with a scale per block). May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import kernel, tl

SCALE_BLOCK = 256  # elements that share a scale
_LARGEST_BF16 = 3.3895313892515355e38
_TINY = 2.0**-126  # a block whose largest moment is below this counts as zero: its inverse must not overflow


def _code(signed: bool) -> tuple[float, int, int]:
    """(c, its bit pattern, the largest code)."""
    return (2.0**-15, 0x38000000, 127) if signed else (2.0**-31, 0x30000000, 255)


# --- torch -----------------------------------------------------------------------------------------------------------


# In integers wherever possible: comparisons and torch.where are some fifty times as slow on a CPU.


def round_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 x as bf16. noise: uniform integers in [0, 2^16). inf and NaN stay; the largest bf16 never becomes inf."""
    if not x.abs().amax() < _LARGEST_BF16:
        noise = torch.where(x.abs() < _LARGEST_BF16, noise, 0)
    return (x.view(torch.int32) + noise.to(torch.int32)).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """fp32 moments [n] of uint8 codes [n] and fp32 scales [ceil(n / 256)]."""
    c, c_bits, largest = _code(signed)
    bits = _blocks(codes).to(torch.int32)
    z = ((bits & largest) << 20).add_(c_bits).view(torch.float32)
    x = z.sub_(c).mul_((scales * (1 / (1.875 - c)))[:, None])
    if signed:
        x.view(torch.int32).bitwise_or_((bits & 0x80) << 24)
    return x.view(-1)[: len(codes)]


def encode(x: Tensor, codes: Tensor, scales: Tensor, signed: bool, noise: Tensor) -> None:
    """Write fp32 moments x [n] into codes and scales. noise: uniform integers in [0, 2^16)."""
    c, c_bits, largest = _code(signed)
    x, noise = _blocks(x), _blocks(noise.to(torch.int32))
    magnitude = x.abs()
    scale = magnitude.amax(1)
    scales.copy_(scale.masked_fill_(scale < _TINY, 0.0))
    z = magnitude.mul_(((1.875 - c) / torch.where(scale > 0, scale, 1))[:, None]).add_(c)
    code = (z.view(torch.int32) - c_bits).add_(noise << 4).bitwise_right_shift_(20).clamp_(max=largest)
    bits = x.view(torch.int32)
    if signed:
        code.bitwise_or_((bits >> 24).bitwise_and_(0x80))
    else:
        code = code.maximum(bits.clamp(0, 1))  # 1 where x > 0
    codes.copy_(code.view(-1)[: len(codes)])


def _blocks(x: Tensor) -> Tensor:
    """[blocks, 256], the last one filled up with zeros."""
    if remainder := len(x) % SCALE_BLOCK:
        x = torch.nn.functional.pad(x, (0, SCALE_BLOCK - remainder))
    return x.view(-1, SCALE_BLOCK)


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def round_stochastic_block(x, noise):
    """As round_stochastic; noise uint32."""
    noise = tl.where(tl.abs(x) < 3.3895313892515355e38, noise, 0)
    bits = x.to(tl.uint32, bitcast=True) + noise
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@kernel
def decode_block(codes, scales, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 [BLOCK] of codes [BLOCK] and scales [BLOCK / 256, 1]."""
    c: tl.constexpr = 2.0**-15 if SIGNED else 2.0**-31
    c_bits: tl.constexpr = 0x38000000 if SIGNED else 0x30000000
    codes = codes.to(tl.int32)
    z = (((codes & 0x7F if SIGNED else codes) << 20) + c_bits).to(tl.float32, bitcast=True)
    x = (z - c) * _per_element_block(scales * (1 / (1.875 - c)), BLOCK)
    if SIGNED:
        x = (x.to(tl.int32, bitcast=True) | ((codes & 0x80) << 24)).to(tl.float32, bitcast=True)
    return x


@kernel
def encode_block(x, noise, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(codes uint8 [BLOCK], scales [BLOCK / 256, 1]) of fp32 x [BLOCK]; noise uint32 in [0, 2^16)."""
    c: tl.constexpr = 2.0**-15 if SIGNED else 2.0**-31
    c_bits: tl.constexpr = 0x38000000 if SIGNED else 0x30000000
    magnitude = tl.abs(x)
    # The largest as an integer: the order of non-negative floats, with NaN above all, which a float maximum would drop.
    bits = tl.reshape(magnitude.to(tl.int32, bitcast=True), (BLOCK // 256, 256))
    scale = tl.max(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    z = magnitude * _per_element_block((1.875 - c) / tl.where(scale > 0.0, scale, 1.0), BLOCK) + c
    code = (z.to(tl.int32, bitcast=True) - c_bits + (noise << 4).to(tl.int32)) >> 20
    if SIGNED:
        code = tl.minimum(code, 127) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
    else:
        code = tl.maximum(tl.minimum(code, 255), (x > 0.0).to(tl.int32))
    return code.to(tl.uint8), scale


@kernel
def _per_element_block(per_block, BLOCK: tl.constexpr):
    return tl.reshape(tl.broadcast_to(per_block, (BLOCK // 256, 256)), (BLOCK,))
