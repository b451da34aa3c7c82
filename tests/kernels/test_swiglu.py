import pytest
import torch
from torch.nn.functional import silu

from steep.kernels import swiglu
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients


def formula(gate_up):
    gate, up = gate_up.chunk(2, 1)
    return gate * torch.sigmoid(gate) * up


def eager(gate_up):
    gate, up = gate_up.chunk(2, 1)
    return silu(gate) * up


@pytest.mark.parametrize("shape", [(13, 66), (1, 2), (0, 8), (150, 20), (2, 2060)])
def test_matches_float64(path, dtype, shape):
    check(swiglu, formula, eager, [torch.randn(shape) * 3], dtype)


def test_saturated_gates_stay_finite(path, dtype):
    gate_up = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0] + [3.0] * 5])
    check(swiglu, formula, eager, [gate_up], dtype)


def test_strided_rows_expanded_gradient_and_retained_graph(path):
    wide = torch.randn(5, 50, requires_grad=True)
    h = swiglu(wide[:, 5:45])
    ones = torch.ones(()).expand(h.shape)
    (first,) = torch.autograd.grad(h, wide, ones, retain_graph=True)
    (second,) = torch.autograd.grad(h, wide, ones)
    assert torch.equal(first, second)
    _, want = gradients(lambda x: formula(x[:, 5:45]).sum(), [wide], torch.float64)
    assert max(errors([first], [want])) < FP32_BOUND


def test_two_runs_are_equal(path, dtype):
    gate_up = torch.randn(7, 34)
    first, second = (gradients(swiglu, [gate_up], dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"\(3, 5\)"):
        swiglu(torch.ones(3, 5))
