"""The bounds: rounding to e4m3 is off by at most u = 2^-4, and over mantissas of any distribution that is smooth by
0.0266 rms (2^-3 / sqrt(12) times the rms of 1 / mantissa). So a product of two roundings is off by sqrt(2) * 0.0266,
and a sum of independent products too; elementwise never by more than sum |x| e_w + e_x |w| + e_x e_w."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from steep.kernels import fp8_linear
from steep.kernels.fp8 import fp8_cast
from steep.kernels.fp8_linear import _check_device, _mm_cublas, _mm_emulated
from tests.kernels.kernel_checks import errors, gradients, kernel_module

RECIPES = ["blockwise", "rowwise"]
RMS = 2**0.5 * 0.0266


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


def layer(recipe):
    return lambda x, w, b=None: fp8_linear(x, w, b, recipe=recipe)


@pytest.mark.parametrize("shape", [(256, 384, 128), (300, 520, 136)], ids=["aligned", "ragged"])
def test_result_and_gradients_are_as_exact_as_e4m3_allows(path, dtype, recipe, shape):
    tokens, k, n = shape
    inputs = [t.to(dtype) for t in (torch.randn(tokens, k), torch.randn(n, k), torch.randn(n))]
    got = gradients(layer(recipe), inputs, dtype)
    want = gradients(F.linear, inputs, torch.float64)
    assert [t.dtype for t in got] == [dtype] * 4
    # bf16 rounds the result once more; the sum over 300 tokens is a small sample.
    assert max(errors(got[:3], want)) < 1.05 * RMS
    assert errors(got[3:], want[3:])[0] < (1e-6 if dtype == torch.float32 else 2.0**-8)
    assert min(errors(got[:3], want)) > RMS / 2  # and fp8 it was


def test_no_element_is_further_off_than_its_roundings(path, recipe):
    x, w = (torch.randn(shape) * torch.randn(shape).exp() for shape in ((70, 300), (50, 300)))
    error_x, error_w = (torch.maximum(t.abs() * 2.0**-4, t.abs().amax() / 448 * 2.0**-10) for t in (x, w))
    bound = error_x @ w.abs().t() + x.abs() @ error_w.t() + error_x @ error_w.t()
    error = (fp8_linear(x, w, recipe=recipe) - x.double() @ w.double().t()).abs()
    assert (error <= bound * 1.0001).all()
    assert error.max() > 0


def test_an_outlier_spoils_only_its_own_group():
    x, w = torch.randn(64, 512), torch.randn(64, 512)
    x[:, 7], w[:, 7] = 1e6, 0.0
    block, row = (errors([layer(r)(x, w)], [x.double() @ w.double().t()])[0] for r in RECIPES)
    assert block < 0.55 < 0.9 < row  # one group of four against all of them


@pytest.mark.parametrize("subset", ["x", "weight", "bias"])
def test_gradients_of_some_arguments(path, recipe, subset):
    tensors = {"x": torch.randn(40, 48), "weight": torch.randn(32, 48), "bias": torch.randn(32)}
    every = [t.clone().requires_grad_() for t in tensors.values()]
    dy = torch.randn(40, 32)
    want = dict(zip(tensors, torch.autograd.grad(layer(recipe)(*every), every, dy)))
    tensors[subset].requires_grad_()
    y = layer(recipe)(*tensors.values())
    once = torch.autograd.grad(y, tensors[subset], dy, retain_graph=True)[0]
    again = torch.autograd.grad(y, tensors[subset], dy)[0]
    assert torch.equal(once, want[subset])
    assert torch.equal(again, once)


def test_expanded_and_transposed_upstream_gradients_and_leading_dimensions(path, recipe):
    x, w = torch.randn(2, 5, 33, requires_grad=True), torch.randn(20, 33, requires_grad=True)
    y = layer(recipe)(x, w)
    assert y.shape == (2, 5, 20)
    for dy in (torch.ones(()).expand(y.shape), torch.randn(20, 5, 2).permute(2, 1, 0)):
        got = torch.autograd.grad(y, (x, w), dy, retain_graph=True)
        want = torch.autograd.grad(y, (x, w), dy.clone(memory_format=torch.contiguous_format), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_weights_may_be_fp32_under_bf16_activations(recipe):
    x, w, b = torch.randn(64, 48).bfloat16(), torch.randn(32, 48, requires_grad=True), torch.randn(32)
    y = layer(recipe)(x.requires_grad_(), w, b)
    dx, dw = torch.autograd.grad(y, (x, w), torch.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert not torch.equal(dw, dw.bfloat16().float())


def saved_by(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


def test_what_is_saved_is_half_of_x_and_the_weight_itself(recipe):
    x, w = torch.randn(256, 384).bfloat16(), torch.randn(128, 384).bfloat16().requires_grad_()
    for need_dx in (False, True):
        x.requires_grad_(need_dx)
        saved = saved_by(lambda: fp8_linear(x, w, recipe=recipe))
        own = [t for t in saved if t.data_ptr() != w.data_ptr()]
        assert sum(t.nbytes for t in own) <= x.nbytes / 2 * (1 + 4 / 128)
        assert (len(saved) > len(own)) == need_dx
    assert sum(t.nbytes for t in saved_by(lambda: fp8_linear(x, w.detach(), recipe=recipe))) == w.nbytes


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_and_infinity_come_through(path, recipe):
    x, w = torch.randn(130, 64), torch.randn(48, 64)
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[3, 5] = value
        y = layer(recipe)(bad, w)
        assert not y[3].isfinite().any()
        assert y[4:].isfinite().all()
        weight = w.clone().requires_grad_()
        dy = torch.zeros(130, 48)
        dy[7, 2] = value
        dw = torch.autograd.grad(layer(recipe)(x, weight), weight, dy)[0]
        assert not dw[2].isfinite().any()
        assert dw[3:].eq(0).all()


def test_no_tokens(path, recipe):
    x, w, b = torch.randn(0, 24, requires_grad=True), torch.randn(8, 24, requires_grad=True), torch.randn(8)
    y = layer(recipe)(x, w, b)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 8)
    assert dx.shape == (0, 24)
    assert torch.equal(dw, torch.zeros(8, 24))

    _, _, xt8, scale_t = fp8_cast(x.detach(), "rowwise")
    assert torch.equal(_mm_cublas(xt8, scale_t, xt8, scale_t, None, y.dtype, "rowwise", False), torch.zeros(128, 128))


def test_torch_multiplies_the_same_operands_to_the_same_result():
    x8, scale, _, _ = fp8_cast(torch.randn(70, 200), "rowwise")
    w8, scale_w, _, _ = fp8_cast(torch.randn(90, 200), "rowwise")
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        args = x8, scale, w8, scale_w, torch.randn(128), dtype, "rowwise", False
        assert errors([_mm_cublas(*args)], [_mm_emulated(*args)])[0] < bound


@pytest.mark.parametrize("shape", [(256, 640, 384), (1, 1, 1)])
def test_operands_are_laid_out_as_scaled_mm_demands(shape):
    tokens, k, n = shape
    x, w, dy = (torch.randn(s) for s in ((tokens, k), (n, k), (tokens, n)))
    for activation, weight in (("1x128", "128x128"), ("rowwise", "rowwise")):
        x8, x8t = (fp8_cast(x, activation)[i : i + 2] for i in (0, 2))
        w8, w8t = (fp8_cast(w, weight)[i : i + 2] for i in (0, 2))
        dy8, dy8t = (fp8_cast(dy, activation)[i : i + 2] for i in (0, 2))
        for a, b, scaling in ((x8, w8, weight), (dy8, w8t, weight), (dy8t, x8t, activation)):
            # torch checks shapes and strides of what it would give to cuBLAS when it is given tensors without data.
            y = _mm_cublas(*(t.to("meta") for t in (*a, *b)), None, torch.bfloat16, scaling, False)
            assert y.shape == (len(a[0]), len(b[0]))
            with pytest.raises((RuntimeError, ValueError)):
                wrong = a[1][:-1].to("meta")
                _mm_cublas(a[0].to("meta"), wrong, *(t.to("meta") for t in b), None, torch.bfloat16, scaling, False)


def test_only_the_forward_accumulates_fast(monkeypatch):
    module, flags = kernel_module("fp8_linear"), []
    real = module._fp8_mm_op
    monkeypatch.setattr(module, "_fp8_mm_op", lambda *args: flags.append(args[-1]) or real(*args))
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    fp8_linear(x, w, recipe="rowwise", fast_accum=True).sum().backward()
    assert flags == [True, False, False]


def test_opcheck():
    x8, scale, _, _ = fp8_cast(torch.randn(6, 16), "1x128")
    w8, scale_w, _, _ = fp8_cast(torch.randn(11, 16), "128x128")
    args = x8, scale, w8, scale_w, torch.randn(128), torch.bfloat16, "128x128", False
    # Not test_schema: it does arithmetic on arguments, and e4m3 has none.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.steep.fp8_mm.default, args, test_utils=checks)


def test_compiles_as_one_graph_with_the_same_numbers(recipe):
    leaves = [torch.randn(s, requires_grad=True) for s in ((40, 48), (32, 48), (32,))]
    compiled = torch.compile(layer(recipe), fullgraph=True, backend="aot_eager")
    outputs = [f(*leaves) for f in (layer(recipe), compiled)]
    want, got = ((y, *torch.autograd.grad(y.square().sum(), leaves)) for y in outputs)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_a_network_learns_as_well_as_in_fp32(recipe):
    def final_loss(linear):
        generator = torch.Generator().manual_seed(0)
        teacher, w1, w2 = (torch.randn(s, generator=generator) / 6 for s in ((8, 32), (64, 32), (8, 64)))
        w1, w2 = w1.requires_grad_(), w2.requires_grad_()
        optimizer = torch.optim.Adam([w1, w2], lr=1e-2)
        losses = []
        for _ in range(80):
            x = torch.randn(128, 32, generator=generator)
            y = (x @ teacher.t()).relu() + 0.3 * torch.randn(128, 8, generator=generator)
            loss = F.mse_loss(linear(linear(x, w1).relu(), w2), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], sum(losses[-20:]) / 20

    (start, fp32), (_, fp8) = final_loss(F.linear), final_loss(layer(recipe))
    assert fp32 < start / 3
    assert fp8 < 1.02 * fp32


def test_wrong_arguments_are_named():
    x, w = torch.ones(4, 8), torch.ones(6, 8)
    for arguments, keywords, message in (
        ((x, torch.ones(6, 7)), {}, r"weight has shape \(6, 7\); expected \(\*, 8\)"),
        ((x.half(), w), {}, "fp8_linear: x is torch.float16"),
        ((torch.tensor(1.0), w), {}, "x is a scalar"),
        ((x, w, torch.ones(8)), {}, r"bias has shape \(8,\); expected \(6\)"),
        ((x, w.to("meta")), {}, "weight is on meta"),
        ((x, w), {"recipe": "tensorwise"}, "recipe is 'tensorwise'; allowed: blockwise, rowwise"),
        ((x, w), {"fast_accum": True}, "fast_accum is for"),
    ):
        with pytest.raises(ValueError, match=message):
            fp8_linear(*arguments, **keywords)


@pytest.mark.parametrize(
    ("capability", "cuda", "allowed"),
    [
        ((8, 0), "13.0", []),
        ((8, 9), "13.0", ["rowwise"]),
        ((9, 0), "12.8", ["rowwise"]),
        ((9, 0), "12.9", RECIPES),
        ((10, 0), "13.0", ["rowwise"]),
    ],
)
def test_a_gpu_that_cannot_is_refused_by_name(monkeypatch, capability, cuda, allowed):
    gpu = SimpleNamespace(name="some GPU", major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for recipe in RECIPES:
        if recipe in allowed:
            _check_device(torch.device("cuda"), recipe)
        else:
            with pytest.raises(ValueError, match=f"{capability[0]}.{capability[1]}"):
                _check_device(torch.device("cuda"), recipe)
