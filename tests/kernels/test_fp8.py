import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.bench import sm90_cases
from steep.bench.sm90 import compile_case
from steep.kernels import cast_blockwise, cast_rowwise
from steep.kernels._triton import kernel, launch, tl
from steep.kernels.fp8 import E4M3, _fp8_cast_cpu, _fp8_cast_triton, cast_e4m3, dequantise, fp8_cast
from tests.kernels.conftest import use_triton

SCALINGS = ["1x128", "128x128", "rowwise"]
MAX = 448.0


def amax_of(x, scaling):
    """The amax that each element of x, a tensor of padded sizes, is scaled by; NaN has none."""
    x = x.abs().nan_to_num(nan=0.0, posinf=torch.inf)
    rows, columns = {"1x128": (1, 128), "128x128": (128, 128), "rowwise": (1, x.shape[1])}[scaling]
    amax = x.view(len(x) // rows, rows, -1, columns).amax((1, 3), keepdim=True)
    return amax.expand(-1, rows, -1, columns).reshape(x.shape)


def padded(x):
    return torch.nn.functional.pad(x.float(), (0, -x.shape[1] % 128, 0, -x.shape[0] % 128))


def check_copy(x, x8, scale, scaling):
    """x8 * scale is x, padded, to within what e4m3 can do: half a unit in the last of 3 bits, or half of 2^-9."""
    x, got = padded(x), dequantise(x8, scale)
    assert x8.dtype == E4M3
    assert x8.is_contiguous()
    assert x8.shape == x.shape
    # A power of two above amax / 448 costs one bit of what lies below 2^-6.
    bound = torch.maximum(x.abs() * 2.0**-4, amax_of(x, scaling).clamp(min=MAX * 2.0**-126) / MAX * 2.0**-9)
    assert ((got - x).abs() <= bound * 1.00001).all()
    assert (got[x == 0] == 0).all()


def as_bytes(results):
    return [t.view(torch.uint8) if t.dtype == E4M3 else t for t in results]


def wide_range(shape):
    """Magnitudes over twelve orders, as gradients have."""
    return torch.randn(shape) * torch.randn(shape).mul(4).exp()


@kernel
def _elementwise_kernel(X, Y, BLOCK: tl.constexpr, INTERPRET: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, cast_e4m3(tl.load(X + i).to(tl.float32), INTERPRET))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cast_rounds_and_saturates_like_torch(dtype):
    if dtype == torch.bfloat16:  # all of them
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    else:  # every tie between neighbours and the numbers next to it, 448 and what lies around it, and any bits at all
        numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
        ties = torch.cat([(numbers[1:] + numbers[:-1]) / 2, numbers, torch.tensor([464.0, 480.0, torch.inf, 1e-45])])
        ties = torch.cat([ties, *(torch.nextafter(ties, torch.tensor(to)) for to in (0.0, torch.inf))])
        bits = torch.randint(-(2**31), 2**31, (65536 - 2 * len(ties),)).to(torch.int32).view(dtype)
        x = torch.cat([ties, -ties, bits])
    got, want = torch.empty(65536, dtype=E4M3), x.float().clamp(-MAX, MAX).to(E4M3)
    launch(_elementwise_kernel, (16,), x, got, BLOCK=4096)
    nan = x.isnan()
    assert torch.equal(got.view(torch.uint8)[~nan], want.view(torch.uint8)[~nan])  # the sign of zero, too
    assert got.float()[nan].isnan().all()
    assert got.float()[x.isinf()].abs().eq(MAX).all()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(128, 128), (130, 300), (1, 1), (3, 513)])
def test_both_copies_are_as_near_as_e4m3_gets(path, dtype, shape, scaling, power_of_two):
    x = wide_range(shape).to(dtype)
    x8, scale, xt8, scale_t = fp8_cast(x, scaling, power_of_two=power_of_two)
    check_copy(x, x8, scale, scaling)
    check_copy(x.t(), xt8, scale_t, scaling)
    if power_of_two:
        assert all((s[s > 0].frexp().mantissa == 0.5).all() for s in (scale, scale_t))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_triton_and_torch_give_the_same_bits(dtype, scaling, power_of_two):
    x = wide_range((200, 260)).to(dtype)
    for rows, columns in ((True, True), (True, False), (False, True)):
        got = _fp8_cast_triton(x, scaling, rows, columns, power_of_two)
        want = _fp8_cast_cpu(x, scaling, rows, columns, power_of_two)
        assert all(torch.equal(a, b) for a, b in zip(as_bytes(got), as_bytes(want), strict=True))
        assert [t.stride() for t in got] == [t.stride() for t in want]
        assert [t.numel() > 0 for t in got] == [rows, rows, columns, columns]


def test_shapes_and_layouts(path):
    x = torch.randn(130, 300)
    for function, sizes, strides in (
        (cast_rowwise, ((256, 1), (384, 1)), ((1, 1), (1, 1))),
        (cast_blockwise, ((256, 3), (384, 2)), ((1, 256), (1, 384))),
        (lambda x: cast_blockwise(x, block_rows=128), ((2, 4), (3, 4)), ((4, 1), (4, 1))),
    ):
        x8, scale, xt8, scale_t = function(x)
        assert (x8.shape, xt8.shape) == ((256, 384), (384, 256))
        assert (scale.shape, scale_t.shape) == sizes
        assert (scale.stride(), scale_t.stride()) == strides
        assert scale.dtype == scale_t.dtype == torch.float32


def test_the_largest_number_of_a_group_is_exact_and_square_blocks_agree_with_their_transpose(path):
    x = torch.randn(256, 384)
    for scaling in SCALINGS:
        for copy, (x8, scale) in zip((x, x.t()), pairs(fp8_cast(x, scaling))):
            largest = copy.abs() == amax_of(copy.contiguous(), scaling)
            assert torch.allclose(dequantise(x8, scale)[largest], copy[largest], rtol=1e-6)
    x8, scale, xt8, scale_t = fp8_cast(x, "128x128")
    assert torch.equal(x8.view(torch.uint8).t(), xt8.view(torch.uint8))
    assert torch.equal(scale[:2, :3].t(), scale_t[:3, :2])
    assert not scale[:, 3:].any()
    assert not scale_t[:, 2:].any()


def test_powers_of_two_give_both_copies_the_same_numbers(path):
    x = torch.randn(256, 256).sign() * (0.1 + torch.rand(256, 256))  # nothing underflows
    for x8, scale, xt8, scale_t in (cast_rowwise(x, power_of_two=True), cast_blockwise(x, power_of_two=True)):
        assert torch.equal(dequantise(x8, scale), dequantise(xt8, scale_t).t())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_zero_tiny_nan_and_infinite_elements(path, scaling, power_of_two):
    x = torch.ones(256, 256)
    x[:128] = 0.0
    x[3] = 1e-42  # 448 * 2^-126 and smaller share the scale 2^-126
    x[130, 5] = torch.nan
    results = fp8_cast(x, scaling, power_of_two=power_of_two)
    for copy, (x8, scale) in zip((x, x.t()), pairs(results)):
        used = scale[:, :2]
        assert torch.isfinite(used).all()
        assert (used >= 2.0**-126).all()
        got = dequantise(x8, scale)
        assert torch.equal(got.isnan(), copy.isnan())
        assert (got[copy == 0] == 0).all()
        assert (got[copy == 1] == 1).all()
    x[200, 200] = -torch.inf
    for copy, (x8, scale) in zip((x, x.t()), pairs(fp8_cast(x, scaling, power_of_two=power_of_two))):
        poisoned = amax_of(copy.contiguous(), scaling).isinf()
        got = dequantise(x8, scale)
        assert poisoned.any()
        assert not got[poisoned].isfinite().any()
        assert torch.equal(got[~poisoned].isnan(), copy[~poisoned].isnan())


def pairs(results):
    return results[:2], results[2:]


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 140), columns=st.integers(1, 140), exponent=st.integers(-140, 120), data=st.data())
def test_any_size_and_magnitude(rows, columns, exponent, data):
    scaling = data.draw(st.sampled_from(SCALINGS))
    x = torch.randn(rows, columns).clamp(-8, 8) * 2.0 ** (exponent / 2) * 2.0 ** (exponent / 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_triton(monkeypatch)
        x8, scale, xt8, scale_t = fp8_cast(x, scaling)
    if rows:
        check_copy(x, x8, scale, scaling)
        check_copy(x.t(), xt8, scale_t, scaling)
    else:
        assert (x8.shape, xt8.shape) == ((0, 128 * -(-columns // 128)), (128 * -(-columns // 128), 0))
        assert scale_t.isfinite().all()


def test_strided_rows_beyond_2_to_the_31_elements_and_a_transposed_input():
    # Rows of a tensor of 2^31 elements, of which only the pages of these rows ever exist.
    stride = 2**24 + 16
    x = torch.empty(2**31 + 2**27, dtype=torch.bfloat16).as_strided((130, 16), (stride, 1))
    x.copy_(torch.randn(130, 16))
    for view in (x, torch.randn(16, 130).t(), torch.randn(16).expand(130, 16)):
        got, want = _fp8_cast_triton(view, "1x128", True, True, False), fp8_cast(view.clone(), "1x128")
        assert all(torch.equal(a, b) for a, b in zip(as_bytes(got), as_bytes(want)))


def test_two_blocks_of_the_cast_fit_on_an_sm():
    for case in sm90_cases.fp8():
        for figures in compile_case(case).values():
            assert 2 * 32 * figures["num_warps"] * figures["registers"] <= 65536, case.label


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"cast_rowwise: x has shape \(3,\); expected \(\*, \*\)"):
        cast_rowwise(torch.ones(3))
    with pytest.raises(ValueError, match="cast_blockwise: x is torch.float16; allowed"):
        cast_blockwise(torch.ones(3, 4).half())
    with pytest.raises(ValueError, match="block_rows is 64; allowed: 1, 128"):
        cast_blockwise(torch.ones(3, 4), block_rows=64)
