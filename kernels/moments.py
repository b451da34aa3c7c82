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
_TINY = 1.1754943508222875e-38  # below the smallest normal number a block counts as zero: its inverse must not overflow

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
    y = magnitude.mul_(_per_element(torch.where(scale > 0, 1 / scale, 0), len(x)))
    u = noise.float().mul_(2**-16)
    if codes.dtype == torch.int8:
        y.mul_(127**2)
        code = _draw(y, u, y.sqrt().floor_(), 2).clamp_(max=127)
        codes.copy_(code.copysign_(x))
    else:
        y.mul_(255**4)
        code = _draw(y, u, y.sqrt().sqrt_().floor_(), 4).clamp_(max=255)
        codes.copy_(code.maximum((y > 0).float()))


def _draw(y: Tensor, u: Tensor, low: Tensor, power: int) -> Tensor:
    """low or low + 1, such that the mean of its power is y."""
    below, above = low.square(), (low + 1).square_()
    if power == 4:
        below, above = below.square_(), above.square_()
    return low.add_((below + u * (above - below) < y).float())


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
    """fp32 [BLOCK] of codes [BLOCK] and scales [BLOCK / 256]."""
    root = codes.to(tl.float32)
    if codes.dtype == tl.int8:
        return root * tl.abs(root) * _per_element_block(scales * (1 / 127**2), BLOCK)
    root = root * root
    return root * root * _per_element_block(scales * (1 / 255**4), BLOCK)


@kernel
def encode_block(x, noise, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """(codes [BLOCK], scales [BLOCK / 256]) of fp32 x [BLOCK]; noise uint32 in [0, 2^16)."""
    magnitude = tl.abs(x)
    # The largest as an integer: the order of non-negative floats, with NaN above all, which a float maximum would drop.
    bits = tl.reshape(magnitude.to(tl.int32, bitcast=True), (BLOCK // 256, 256))
    scale = tl.max(bits, 1).to(tl.float32, bitcast=True)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    y = magnitude * _per_element_block(tl.where(scale > 0.0, 1.0 / scale, 0.0), BLOCK)
    u = noise.to(tl.float32) * (1 / 65536)
    if SIGNED:
        y = y * 16129.0
        low = tl.floor(tl.sqrt(y))
        below, above = low * low, (low + 1.0) * (low + 1.0)
        code = tl.minimum(low + tl.where(below + u * (above - below) < y, 1.0, 0.0), 127.0)
        return tl.where(x < 0.0, -code, code).to(tl.int8), scale
    y = y * 4228250625.0
    low = tl.floor(tl.sqrt(tl.sqrt(y)))
    below, above = low * low, (low + 1.0) * (low + 1.0)
    below, above = below * below, above * above
    code = tl.minimum(low + tl.where(below + u * (above - below) < y, 1.0, 0.0), 255.0)
    return tl.maximum(code, tl.where(y > 0.0, 1.0, 0.0)).to(tl.uint8), scale


@kernel
def _per_element_block(per_block, BLOCK: tl.constexpr):
    return tl.reshape(tl.broadcast_to(per_block[:, None], (BLOCK // 256, 256)), (BLOCK,))
