import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.kernels import grouped_mm, grouped_weight_grad
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients, kernel_module
from tests.kernels.offset_checks import narrow_products

module = kernel_module("grouped_mm")
tile_sizes = module.tile_sizes
SIZES = {
    "even": [5, 40, 4],
    "empty": [0, 9, 0, 0, 6, 0],
    "one has all": [0, 100, 0],
    "tail": [3, 0, 5, 6],  # the last expert's rows are left to nobody
}


def ends(sizes):
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def plain(x, weight, offsets):
    """A loop over the experts, rows past the last offset 0: the formula in float64, eager code in bf16."""
    starts = [0, *offsets.tolist()]
    parts = [x[a:b] @ w.T for a, b, w in zip(starts, starts[1:], weight)]
    return torch.cat([*parts, x.new_zeros(len(x) - starts[-1], weight.shape[1])])


def arguments(name, depth=40, width=72):
    offsets = ends(SIZES[name])
    rows = int(offsets[-1])
    if name == "tail":
        offsets = offsets[:-1]
    return torch.randn(rows, depth), torch.randn(len(offsets), width, depth), offsets


@pytest.mark.parametrize("name", SIZES)
def test_matches_float64(path, dtype, name):
    x, weight, offsets = arguments(name)
    check(*(lambda x, w, f=f: f(x, w, offsets) for f in (grouped_mm, plain, plain)), (x, weight), dtype)


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    tail=st.integers(0, 3),
    depth=st.integers(1, 40),
    width=st.integers(1, 40),
)
def test_any_size_interpreted(sizes, tail, depth, width):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_triton(monkeypatch)
        x, weight, offsets = torch.randn(sum(sizes) + tail, depth), torch.randn(len(sizes), width, depth), ends(sizes)
        got = gradients(lambda x, w: grouped_mm(x, w, offsets), (x, weight), torch.float32)
    want = gradients(lambda x, w: plain(x, w, offsets), (x, weight), torch.float64)
    assert max(errors(got, want)) < FP32_BOUND


def test_tiles_of_a_gpu_interpreted(monkeypatch, dtype):
    use_triton(monkeypatch)
    monkeypatch.setattr(module, "tile_sizes", tile_sizes)
    x, weight, offsets = torch.randn(132, 66), torch.randn(2, 258, 66), ends([130, 2])
    check(*(lambda x, w, f=f: f(x, w, offsets) for f in (grouped_mm, plain, plain)), (x, weight), dtype)


def test_the_tail_is_zero_whatever_was_there(path):
    x, weight = torch.full((6, 8), torch.inf), torch.randn(2, 8, 8)
    x[:4] = torch.randn(4, 8)
    x.requires_grad_()
    weight.requires_grad_()
    y = grouped_mm(x, weight, ends([1, 3]))
    dx, dw = torch.autograd.grad(y, (x, weight), torch.full_like(y, torch.nan).index_fill(0, torch.arange(4), 1.0))
    assert not y[4:].any()
    assert not dx[4:].any()
    assert dw.isfinite().all()


def test_weight_gradient_in_fp32_is_not_rounded(path):
    dy, x = torch.randn(40, 24).bfloat16(), torch.randn(40, 32).bfloat16()
    dw = grouped_weight_grad(dy, x, ends([0, 25, 15]), torch.float32)
    want = torch.stack([dy[a:b].double().T @ x[a:b].double() for a, b in ((0, 0), (0, 25), (25, 40))])
    assert dw.dtype == torch.float32
    assert errors([dw], [want])[0] < FP32_BOUND
    assert torch.equal(grouped_weight_grad(dy, x, ends([0, 25, 15])), dw.bfloat16())


def test_torchs_kernel_is_called_with_what_it_computes():
    """F.grouped_mm on the CPU: the layouts and offsets that Hopper gets."""
    x, weight, offsets = (t.bfloat16() if t.is_floating_point() else t for t in arguments("empty"))
    dy = torch.randn(len(x), weight.shape[1]).bfloat16()
    for got, want in (
        (module._grouped_mm_torch(x, weight, offsets), module._grouped_mm_cpu(x, weight, offsets)),
        (
            module._grouped_mm_torch(dy, weight.transpose(1, 2), offsets),
            module._grouped_mm_cpu(dy, weight.transpose(1, 2), offsets),
        ),
        (
            module._grouped_mm_dw_torch(dy, x, offsets),
            module._grouped_mm_dw_cpu(dy, x, offsets, torch.bfloat16),
        ),
    ):
        assert torch.equal(got, want)


def test_two_runs_expanded_gradient_and_retained_graph(path, dtype):
    x, weight, offsets = arguments("even", depth=20, width=18)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
    runs = [gradients(lambda x, w: grouped_mm(x, w, offsets), leaves, dtype) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    y = grouped_mm(*leaves, offsets)
    ones = torch.ones((), dtype=dtype).expand(y.shape)
    first = torch.autograd.grad(y, leaves, ones, retain_graph=True)
    second = torch.autograd.grad(y, leaves, ones.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(path, needed):
    x, weight, offsets = arguments("even")
    whole = gradients(lambda x, w: grouped_mm(x, w, offsets), (x, weight), torch.float32)[1:]
    x, weight = (t.clone().requires_grad_(need) for t, need in zip((x, weight), needed))
    y = grouped_mm(x, weight, offsets)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().float())
    for leaf, need, want in zip((x, weight), needed, whole):
        assert torch.equal(leaf.grad, want) if need else leaf.grad is None


def test_strided_and_transposed_arguments(path):
    x, weight, offsets = arguments("even")
    want = plain(x.double(), weight.double(), offsets)
    wide = torch.randn(len(x), 60)
    wide[:, 10:50] = x
    turned = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert errors([grouped_mm(wide[:, 10:50], turned, offsets)], [want])[0] < FP32_BOUND


def test_no_offset_wraps_around():
    x, dy, weight = (torch.empty(sizes, device="meta") for sizes in ((9, 40), (9, 72), (3, 72, 40)))
    offsets = torch.empty(3, dtype=torch.int32, device="meta")
    lengths = {"%width", "%depth", "%w_stride", "%w_row", "%w_col"}  # what else is multiplied counts tiles
    for call in (
        (module._grouped_mm_triton, x, weight, offsets),
        (module._grouped_mm_triton, dy, weight.transpose(1, 2), offsets),
        (module._grouped_mm_dw_triton, dy, x, offsets, torch.float32),
    ):
        assert not [factors for factors in narrow_products("grouped_mm", *call) if lengths & {*factors}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(2, 5, 7)}, r"weight.*\(2, 5, 7\)"),
        ({"weight": torch.ones(2, 5, 6, dtype=torch.bfloat16)}, "weight.*bfloat16"),
        ({"offsets": torch.tensor([4])}, "offsets"),
        ({"offsets": torch.tensor([1, 4])}, "offsets.*int64"),
        ({"x": torch.ones(4)}, "grouped_mm: x"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, "grouped_mm: x is torch.int64"),
        ({"offsets": torch.tensor([1, 5], dtype=torch.int32)}, r"\[1, 5\].*4 rows"),
        ({"offsets": torch.tensor([3, 2], dtype=torch.int32)}, r"\[3, 2\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"x": torch.ones(4, 6), "weight": torch.ones(2, 5, 6), "offsets": torch.tensor([1, 4], dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        grouped_mm(**good | change)


def test_wrong_gradient_dtype_is_named():
    with pytest.raises(ValueError, match="float16"):
        grouped_weight_grad(torch.ones(2, 3), torch.ones(2, 4), ends([2]), torch.float16)
