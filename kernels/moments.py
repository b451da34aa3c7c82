"""How AdamW's moments are stored in 16 or 8 bits without bias: stochastic rounding, and 8-bit codes in blocks.

    bf16    x becomes one of its two neighbours, each with a probability that makes the mean x
    8 bits  m = +-(code / 127)^2 * scale,   v = (code / 255)^4 * scale,   scale = largest |m| or v of 256 elements

Stored codes are roots because moments of one block differ by orders of magnitude: neighbouring codes are 1.6 % apart at
the largest of a block and 5 % at a hundredth of it, and v reaches down to 2e-10 of the largest, m to 6e-5 of it, which
is the root of nearly the same ratio. A v above zero never becomes zero: m / sqrt(v) stays bounded. As for bf16, one of
the two neighbouring codes is drawn so that the mean is the moment itself (not its root): nothing drifts, however slowly
beta2 lets v change. No table, no search: a square root each way.

Sources: Zamirai et al. 2020, arXiv:2010.06192 (stochastic rounding of bf16 weights); Dettmers et al. 2022,
arXiv:2110.02861 (8-bit moments with a scale per block). May touch: torch, triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import kernel, tl

SCALE_BLOCK = 256  # elements that share a scale
_LARGEST_BF16 = 3.3895313892515355e38
_TINY = 2.0**-96  # a block whose largest moment is below this counts as zero: the inverse must not overflow

# --- torch -----------------------------------------------------------------------------------------------------------


def round_stochastic(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 x as bf16. noise: uniform integers in [0, 2^16). inf and NaN stay; the largest bf16 never becomes inf."""
    noise = torch.where(x.abs() < _LARGEST_BF16, noise, 0).to(torch.int32)
    return (x.view(torch.int32) + noise).bitwise_and_(-0x10000).view(torch.float32).bfloat16()


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """fp32 moments [n] of int8 (exp_avg) or uint8 (exp_avg_sq) codes [n] and scales [ceil(n / 256)]."""
    root = codes.float()
    signed = codes.dtype == torch.int8
    power = root * root.abs() if signed else root.square_().square_()
    return power.mul_(_per_element(scales * (1 / 127**2 if signed else 1 / 255**4), len(codes)))


def encode(x: Tensor, codes: Tensor, scales: Tensor, noise: Tensor) -> None:
    """Write fp32 moments x [n] into codes and scales. noise: uniform integers in [0, 2^16)."""
    magnitude = x.abs()
    scale = torch.nn.functional.pad(magnitude, (0, -len(x) % SCALE_BLOCK)).view(-1, SCALE_BLOCK).amax(1)
    scale.masked_fill_(scale < _TINY, 0.0)
    scales.copy_(scale)
    signed = codes.dtype == torch.int8
    largest = 127.0**2 if signed else 255.0**4
    y = magnitude.mul_(_per_element(torch.where(scale > 0, largest / scale, 0), len(x))).clamp_(max=largest)
    root = y.sqrt() if signed else y.sqrt().sqrt_()
    low = root.sub_(0.5).round_()
    below, gap = low.square(), 2 * low + 1  # the power of the root and its distance from the next
    if not signed:
        below, gap = below.square(), gap * (2 * below + gap)
    code = low.add_((below + noise.float().mul_(2**-16) * gap < y).float())
    codes.copy_(code.copysign_(x) if signed else code.maximum((y > 0).float()))


def _per_element(per_block: Tensor, count: int) -> Tensor:
    return per_block.repeat_interleave(SCALE_BLOCK)[:count]


# --- Triton ----------------------------------------------------------------------------------------------------------


@kernel
def round_stochastic_block(x, noise):
    """As round_stochastic; noise uint32."""
    noise = tl.where(tl.abs(x) < 3.3895313892515355e38, noise, 0)
    bits = (x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@kernel
def decode_block(codes, scales, BLOCK: tl.constexpr):
    """fp32 [BLOCK] of codes [BLOCK] and scales [BLOCK / 256, 1]."""
    root = codes.to(tl.int32).to(tl.float32)
    if codes.dtype == tl.int8:
        power, unit = root * tl.abs(root), scales * (1 / 127**2)
    else:
        power, unit = root * root * (root * root), scales * (1 / 255**4)
    return power * _per_element_block(unit, BLOCK)


@kernel
def encode_block(x, noise, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(codes [BLOCK], scales [BLOCK / 256, 1]) of fp32 x [BLOCK]; noise uint32 in [0, 2^16)."""
    magnitude = tl.abs(x)
    # The largest as an integer: the order of non-negative floats, with NaN above all, which a float maximum would drop.
    bits = tl.reshape(magnitude.to(tl.int32, bitcast=True), (BLOCK // 256, 256))
    scale = tl.max(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 1.262177448e-29, 0.0, scale)
    largest = 16129.0 if SIGNED else 4228250625.0
    y = tl.minimum(magnitude * _per_element_block(tl.where(scale > 0.0, largest / scale, 0.0), BLOCK), largest)
    root = tl.sqrt(y) if SIGNED else tl.sqrt(tl.sqrt(y))
    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits: conversions run at a quarter of the rate.
    rounded = (root - 0.5) + 12582912.0
    low = rounded - 12582912.0
    below, gap = low * low, 2.0 * low + 1.0
    if not SIGNED:
        below, gap = below * below, gap * (2.0 * below + gap)
    u = (noise << 7 | 0x3F800000).to(tl.float32, bitcast=True) - 1.0  # [0, 1), likewise without a conversion
    code = (rounded.to(tl.int32, bitcast=True) & 0xFF) + (below + u * gap < y).to(tl.int32)
    if SIGNED:
        codes = tl.where(x < 0.0, -code, code).to(tl.int8)
    else:
        codes = tl.maximum(code, (y > 0.0).to(tl.int32)).to(tl.uint8)
    return codes, scale


@kernel
def _per_element_block(per_block, BLOCK: tl.constexpr):
    return tl.reshape(tl.broadcast_to(per_block, (BLOCK // 256, 256)), (BLOCK,))
