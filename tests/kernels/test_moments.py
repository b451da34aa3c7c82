"""Stochastic rounding and 8-bit codes. Every value of the noise is tried: unbiased is a fact here, not a statistic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.kernels._triton import kernel, launch, tl
from steep.kernels.moments import (
    SCALE_BLOCK,
    decode,
    decode_block,
    encode,
    encode_block,
    round_stochastic,
    round_stochastic_block,
)

NOISE = torch.arange(1 << 16)


@kernel
def _moment_kernel(
    X, NOISE, CODES, SCALES, DECODED, ROUNDED, SIGNED: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    x, noise = tl.load(X + i), tl.load(NOISE + i).to(tl.uint32)
    codes, scales = encode_block(x, noise, SIGNED, BLOCK)
    tl.store(CODES + i, codes)
    tl.store(SCALES + tl.arange(0, BLOCK // 256)[:, None], scales)
    tl.store(DECODED + i, decode_block(codes, scales, SIGNED, BLOCK))
    tl.store(ROUNDED + i, round_stochastic_block(x, noise))


def moments(seed: int, count: int, signed: bool) -> torch.Tensor:
    """Over many orders of magnitude, as gradients of outlier channels have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp(4 * torch.randn(count, generator=generator))
    return x if signed else x.square()


def stored(x: torch.Tensor, signed: bool, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(len(x), dtype=torch.uint8)
    scales = torch.empty(-(-len(x) // SCALE_BLOCK))
    encode(x, codes, scales, signed, noise)
    return codes, scales


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), signed=st.booleans())
def test_triton_gives_the_same_bits(seed, signed):
    x = moments(seed, 512, signed)
    x[:3] = torch.tensor([0.0, 1e-44, 3e-39])
    noise = torch.randint(0, 1 << 16, (512,), generator=torch.Generator().manual_seed(seed))
    got = [
        torch.empty(512, dtype=torch.uint8),
        torch.empty(2),
        torch.empty(512),
        torch.empty(512, dtype=torch.bfloat16),
    ]
    launch(_moment_kernel, (1,), x, noise, *got, SIGNED=signed, BLOCK=512)
    codes, scales = stored(x, signed, noise)
    for a, b in zip(got, (codes, scales, decode(codes, scales, signed), round_stochastic(x, noise))):
        assert torch.equal(a, b)


@pytest.mark.parametrize("x", [1.0, -1.00390625 * 1.3, 3.3e-5, -7e20, 1e-39])
def test_bf16_is_exactly_unbiased(x):
    x = torch.tensor(x).float().expand(1 << 16).contiguous()
    rounded = round_stochastic(x, NOISE).double()
    assert rounded.unique().numel() == (1 if x[0] == 1 else 2)
    assert rounded.mean() == x[0].double()


def test_bf16_keeps_what_must_not_be_rounded():
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([0.0, -0.0, 1.5, largest, -largest, torch.inf, -torch.inf, torch.finfo(torch.float32).max])
    for noise in (0, 0xFFFF):
        rounded = round_stochastic(x, torch.full((8,), noise))
        assert torch.equal(rounded[:7].float(), x[:7])
        assert rounded[7] == largest
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert round_stochastic(nan, torch.full((2,), 0xFFFF)).isnan().all()


@pytest.mark.parametrize("signed", [True, False], ids=["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("part", [1.0, 0.7, 0.013, 3e-5, 1e-6])
def test_a_code_is_unbiased_and_a_neighbour(signed, part):
    # Every block holds its largest and 255 times one value, with every noise.
    value = -part if signed else part
    x = torch.full((1 << 16,), value)
    x[::SCALE_BLOCK] = 1.0
    decoded = decode(*stored(x, signed, NOISE), signed).double()
    decoded = decoded.view(-1, SCALE_BLOCK)[:, 1:].flatten()
    true = x[1].double()
    c = 2.0**-15 if signed else 2.0**-31
    spacing = (part + c) / 8  # at most: an eighth of the octave below
    assert (decoded - true).abs().max() <= spacing * 1.0001
    # 1/256 of the noise values are missing, evenly spaced: the mean is off by less than that part of a spacing.
    assert (decoded.mean() - true).abs() <= spacing / 256 + 1e-7 * part


@pytest.mark.parametrize("signed", [True, False], ids=["exp_avg", "exp_avg_sq"])
def test_every_code_survives(signed):
    codes = torch.arange(256, dtype=torch.uint8).repeat(2)
    if signed:
        codes[codes == 128] = 0  # minus zero
    scales = torch.tensor([1.0, 3e-9])
    again, scales_again = stored(decode(codes, scales, signed), signed, torch.full((512,), 0x8000))
    assert torch.equal(again, codes)
    assert torch.allclose(scales_again, scales, rtol=2e-7, atol=0)


def test_zero_stays_zero_and_a_second_moment_above_zero_does_not_become_zero():
    x = torch.zeros(600)
    assert not any(t.any() for t in stored(x, False, torch.full((600,), 0xFFFF)))
    x[0], x[1] = 1.0, 1e-30
    codes, scales = stored(x, False, torch.zeros(600, dtype=torch.int64))
    assert codes[:3].tolist() == [255, 1, 0]
    assert scales.tolist() == [1.0, 0.0, 0.0]


def test_a_nan_is_not_repaired():
    x = torch.ones(256)
    x[7] = torch.nan
    assert decode(*stored(x, True, torch.zeros(256, dtype=torch.int64)), True).isnan().all()
