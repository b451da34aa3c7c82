import pytest
import torch
from torch.nn.functional import silu
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from steep.kernels import swiglu
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients, kernel_module


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


def transformers_mlp(gate_up):
    """What LlamaMLP gives to its down projection; its other two hand gate and up through, which is exact."""
    width = gate_up.shape[1] // 2
    mlp = LlamaMLP(LlamaConfig(hidden_size=2 * width, intermediate_size=width, num_attention_heads=1))
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = torch.eye(2 * width).split(width)
    mlp.down_proj = torch.nn.Identity()
    return mlp.to(gate_up.dtype)(gate_up)


def test_exact_hf_is_transformers_bit_for_bit():
    gate_up = (torch.randn(140, 120) * 3).bfloat16()
    assert torch.equal(swiglu(gate_up, exact_hf=True), transformers_mlp(gate_up))
    assert (swiglu(gate_up) != transformers_mlp(gate_up)).float().mean() > 0.1


def test_exact_hf_rounds_where_transformers_does(path):
    """Bit for bit but for elements that the last bit of exp, which no two libraries share, moves over a boundary."""
    gate_up = (torch.randn(40, 120) * 3).bfloat16()
    got = gradients(lambda x: swiglu(x, exact_hf=True), [gate_up], torch.bfloat16)
    want = gradients(transformers_mlp, [gate_up], torch.bfloat16)
    plain = gradients(swiglu, [gate_up], torch.bfloat16)
    for ours, theirs, rounded_once in zip(got, want, plain):
        assert (ours != theirs).float().mean() < 0.002
        assert (rounded_once != theirs).float().mean() > 0.05


@pytest.mark.parametrize("exact_hf", [False, True])
def test_more_than_2_31_elements(monkeypatch, exact_hf):
    """The storage is address space, touched where the rows are; an int32 offset of the last would fall outside."""
    use_triton(monkeypatch)
    apart = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((129, 64), (2**24, 1))
    apart.copy_(torch.randn(129, 64))
    results = []
    for x in (apart, apart.clone()):
        gate_up = x.detach().requires_grad_()
        h = swiglu(gate_up, exact_hf=exact_hf)
        results.append((h, *torch.autograd.grad(h, gate_up, x[:, :32])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_grids_stay_within_the_limits_of_cuda(monkeypatch):
    """2^31 - 1 programs along x; a million tokens of the widest model are 7 * 10^10 elements."""
    tokens, width = 10**6, 32768
    grids = []
    monkeypatch.setattr(kernel_module("swiglu"), "launch", lambda fn, grid, *args, **constexprs: grids.append(grid))
    h, gate_up = torch.empty(tokens, width, device="meta"), torch.empty(tokens, 2 * width, device="meta")
    kernel_module("swiglu")._swiglu_triton(gate_up, False)
    kernel_module("swiglu")._swiglu_backward_triton(h, gate_up, False)
    assert grids == [(tokens * 32,)] * 2
    assert tokens * 32 < 2**31


def test_wrong_arguments_are_named():
    for match, gate_up in {
        r"swiglu: gate_up has shape \(3, 5\)": torch.ones(3, 5),
        r"swiglu: gate_up has shape \(6,\)": torch.ones(6),
        "swiglu: gate_up is torch.int64": torch.ones(2, 4).long(),
    }.items():
        with pytest.raises(ValueError, match=match):
            swiglu(gate_up)
