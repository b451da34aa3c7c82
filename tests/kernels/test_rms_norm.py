import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.kernels import add_rms_norm, rms_norm
from tests.kernels.kernel_checks import check, errors, gradients

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


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3,\).*\(8,\)"):
        rms_norm(torch.ones(2, 8), torch.ones(3), EPS)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.ones(2, 8), torch.ones(2, 8).bfloat16(), torch.ones(8), EPS)
