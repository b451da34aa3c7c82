import pytest
import torch
import torch.nn.functional as F

from steep.kernels import linear
from tests.kernels.kernel_checks import check, gradients, kernel_module


@pytest.mark.parametrize("sizes", [(13, 7, 5), (1, 1, 1), (0, 4, 3), (64, 96, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_float64(sizes, dtype):
    tokens, fan_in, fan_out = sizes
    inputs = [torch.randn(tokens, fan_in), torch.randn(fan_out, fan_in), torch.randn(fan_out)]
    check(linear, F.linear, F.linear, inputs, dtype)
    check(linear, F.linear, F.linear, inputs[:2], dtype)


def test_strided_input_expanded_gradient_and_transposed_weight():
    wide, weight = torch.randn(6, 20, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    got = torch.autograd.grad(linear(wide[:, 3:11], weight.t()).sum(), (wide, weight))
    want = torch.autograd.grad((wide.double()[:, 3:11] @ weight.double()).sum(), (wide, weight))
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_asked_for():
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    y = linear(x, weight)
    y.sum().backward()
    assert x.grad is None
    assert weight.grad is not None


def test_under_autocast_it_is_torchs_own():
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
        assert linear(x, weight).dtype == torch.bfloat16


def test_without_onednn(monkeypatch):
    x, weight = torch.randn(9, 16), torch.randn(12, 16)
    with_onednn = gradients(linear, [x, weight], torch.float32)
    monkeypatch.setattr(kernel_module("linear"), "_ONEDNN", False)
    for ours, theirs in zip(gradients(linear, [x, weight], torch.float32), with_onednn):
        torch.testing.assert_close(ours, theirs)
