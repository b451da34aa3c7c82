import pytest
import torch

from steep.kernels import gate_up_linear
from tests.kernels.kernel_checks import check, errors


def formula(x, gate, up):
    return torch.cat((x @ gate.T, x @ up.T), 1)


@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_matches_float64(dtype, tokens):
    inputs = torch.randn(tokens, 24), torch.randn(10, 24), torch.randn(10, 24)
    check(gate_up_linear, formula, formula, inputs, dtype)


def test_each_gradient_alone_and_strided_operands():
    x, gate, up = torch.randn(24, 9).T, torch.randn(24, 20).T[::2], torch.randn(10, 24)
    for chosen in range(3):
        leaves = [t.detach().requires_grad_(i == chosen) for i, t in enumerate((x, gate, up))]
        y = gate_up_linear(*leaves)
        got = torch.autograd.grad(y, leaves[chosen], torch.ones(()).expand(y.shape))
        want = torch.autograd.grad(formula(*leaves).sum(), leaves[chosen])
        assert max(errors(got, want)) < 2e-6


def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="gate_up_linear: up_weight has shape"):
        gate_up_linear(x, weight, torch.ones(2, 4))
    with pytest.raises(ValueError, match="gate_up_linear: gate_weight has shape"):
        gate_up_linear(x, torch.ones(3, 5), weight)
    with pytest.raises(ValueError, match="gate_up_linear: gate_weight is torch.bfloat16"):
        gate_up_linear(x, weight.bfloat16(), weight)
