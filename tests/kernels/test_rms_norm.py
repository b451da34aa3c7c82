import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from steep.kernels import add_rms_norm, rms_norm
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients

EPS = 1e-5


def formula(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def eager(x, weight):
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


@pytest.mark.parametrize("shape", [(13, 77), (1, 8), (0, 8), (3, 5, 64), (2, 4100)])
def test_matches_float64(path, dtype, shape):
    inputs = torch.randn(shape), torch.randn(shape[-1])
    check(lambda x, w: rms_norm(x, w, EPS), formula, eager, inputs, dtype)


def test_residual_sum_matches_float64(path, dtype):
    inputs = torch.randn(7, 96), torch.randn(7, 96), torch.randn(96)
    check(
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        lambda x, r, w: (formula(x + r, w), x + r),
        lambda x, r, w: (eager(x + r, w), x + r),
        inputs,
        dtype,
    )


def test_strided_input_and_expanded_gradient(path):
    x = torch.randn(6, 3, 40)[:, :2, 4:36].requires_grad_()
    weight = torch.randn(32, requires_grad=True)
    y = rms_norm(x, weight, EPS)
    got = torch.autograd.grad(y, (x, weight), torch.ones(()).expand(y.shape))
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    want = torch.autograd.grad(formula(x64, weight64).sum(), (x64, weight64))
    assert max(errors((y, *got), (formula(x64, weight64), *want))) < 2e-6


def test_two_runs_are_equal_and_the_graph_can_be_walked_twice(path, dtype):
    x, weight = (t.to(dtype).requires_grad_() for t in (torch.randn(9, 64), torch.randn(64)))
    first = gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight), dtype)
    second = gradients(lambda x, w: rms_norm(x, w, EPS), (x, weight), dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    y = rms_norm(x, weight, EPS).float().sum()
    once = torch.autograd.grad(y, (x, weight), retain_graph=True)
    again = torch.autograd.grad(y, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(0, 9), hidden=st.integers(8, 130), exponent=st.integers(-12, 12))
def test_any_size_and_magnitude(rows, hidden, exponent):
    x, weight = torch.randn(rows, hidden) * 2.0**exponent, torch.randn(hidden)
    check(lambda x, w: rms_norm(x, w, EPS), formula, eager, (x, weight), torch.float32)


def test_either_result_alone_is_differentiable(path):
    inputs = [torch.randn(5, 48), torch.randn(5, 48), torch.randn(48)]
    for index in (0, 1):
        got = [x.clone().requires_grad_() for x in inputs]
        want = [x.double().requires_grad_() for x in inputs]
        add_rms_norm(*got, EPS)[index].square().sum().backward()
        (formula(want[0] + want[1], want[2]), want[0] + want[1])[index].square().sum().backward()
        assert [g.grad is None for g in got] == [w.grad is None for w in want]
        pairs = [(g.grad, w.grad) for g, w in zip(got, want) if g.grad is not None]
        assert max(errors(*zip(*pairs))) < FP32_BOUND


def test_fp32_weight_with_bf16_rows(path):
    x, weight = torch.randn(9, 72).bfloat16().requires_grad_(), torch.randn(72, requires_grad=True)
    dy = torch.randn(9, 72).bfloat16()
    y = rms_norm(x, weight, EPS)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    y64 = formula(x64, weight64)
    dx64, dw64 = torch.autograd.grad(y64, (x64, weight64), dy.double())
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert errors([dw], [dw64])[0] < FP32_BOUND  # nothing about it is rounded to bf16
    assert max(errors([y, dx], [y64, dx64])) < 2.0**-9


def sixteenths(*shape):
    """bf16 numbers k/16 below 12. Sums of their squares, and of the squares of sums of two, are exact in fp32, so that
    the order of summation, which no two implementations share, makes no difference."""
    return (torch.randint(-191, 192, shape) / 16).bfloat16()


@pytest.mark.parametrize("module", [LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm])
@pytest.mark.parametrize("shape", [(33, 64), (2, 5, 32)])
def test_exact_hf_is_transformers_bit_for_bit(path, module, shape):
    norm = module(shape[-1], eps=EPS).bfloat16()
    norm.weight.data.normal_(1.0, 0.3)
    for x in (sixteenths(*shape), torch.randn(shape).bfloat16()) if path == "cpu" else (sixteenths(*shape),):
        assert torch.equal(rms_norm(x, norm.weight, EPS, exact_hf=True), norm(x))
        assert not torch.equal(rms_norm(x, norm.weight, EPS), norm(x))
    x, residual = sixteenths(*shape), sixteenths(*shape)
    y, s = add_rms_norm(x, residual, norm.weight, EPS, exact_hf=True)
    assert torch.equal(s, x + residual)
    assert not torch.equal(s.float(), x.float() + residual.float())
    assert torch.equal(y, norm(x + residual))


def test_exact_hf_gradients_are_those_of_transformers(path):
    inputs = sixteenths(24, 64), sixteenths(24, 64), torch.randn(64)
    got = gradients(lambda *args: add_rms_norm(*args, EPS, exact_hf=True), inputs, torch.bfloat16)
    want = gradients(lambda x, r, w: (eager(x + r, w), x + r), inputs, torch.bfloat16)
    assert torch.equal(got[2], got[3])
    # But for elements that the order of a sum moves over a rounding boundary. transformers rounds the terms of the
    # gradient of weight before it adds them, we do not.
    assert (got[2] != want[2]).float().mean() < 0.002
    assert errors([got[4]], [want[4]])[0] < 2.0**-8
    plain = gradients(lambda *args: add_rms_norm(*args, EPS), inputs, torch.bfloat16)
    assert (plain[2] != want[2]).float().mean() > 0.05


@pytest.mark.parametrize("exact_hf", [False, True])
def test_more_than_2_31_elements(monkeypatch, exact_hf):
    """The storage is address space, touched where the rows are; an int32 offset of the last would fall outside."""
    use_triton(monkeypatch)
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((129, 64), (2**24, 1))
    apart.copy_(torch.randn(129, 64))
    near, weight = apart.clone(), torch.randn(64).bfloat16()
    results = []
    for x in (apart, near):
        leaves = x.detach().requires_grad_(), weight.clone().requires_grad_()
        y, s = add_rms_norm(leaves[0], x, leaves[1], EPS, exact_hf=exact_hf)
        results.append((y, s, *torch.autograd.grad((y, s), leaves, (x, x))))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 8), torch.ones(8)
    for match, call in {
        r"rms_norm: weight has shape \(3,\)": lambda: rms_norm(x, weight[:3], EPS),
        "rms_norm: weight is torch.bfloat16": lambda: rms_norm(x, weight.bfloat16(), EPS),
        "rms_norm: weight is on meta": lambda: rms_norm(x, weight.to("meta"), EPS),
        "rms_norm: x is torch.int64": lambda: rms_norm(x.long(), weight, EPS),
        "rms_norm: x is a scalar": lambda: rms_norm(weight[0], weight, EPS),
        "add_rms_norm: residual is torch.bfloat16": lambda: add_rms_norm(x, x.bfloat16(), weight, EPS),
        "add_rms_norm: residual has": lambda: add_rms_norm(x, x[:1], weight, EPS),
        "add_rms_norm: weight has": lambda: add_rms_norm(x, x, x, EPS),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
