"""Low-rank adapters against the product with W + scale B A in float64, and against the layers without adapters."""

import pytest
import torch
from torch import Tensor

from steep.kernels import (
    LowRank,
    add_low_rank,
    linear,
    rms_norm,
    rms_norm_linear,
    rms_norm_lora_linear,
    swiglu,
    swiglu_linear,
    swiglu_lora_linear,
)

TOKENS, WIDTH, COLUMNS, RANK = 11, 16, 24, 3
SPANS = ((0, 8), (12, 24))  # of three matrices of 8, 4 and 12 columns the second has no adapter
LAYERS = ["rms_norm", "rms_norm_residual", "swiglu", "plain"]


def arguments(layer: str, dtype: torch.dtype, adapter_dtype: torch.dtype, zero_b: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {
        "x": normal(TOKENS, 2 * WIDTH if layer == "swiglu" else WIDTH),
        "a": normal(len(SPANS) * RANK, WIDTH, dtype=adapter_dtype),
        "b": normal(20, RANK, dtype=adapter_dtype) * (0 if zero_b else 1),
    }
    if layer.startswith("rms_norm"):
        tensors["norm_weight"] = normal(WIDTH)
    if layer == "rms_norm_residual":
        tensors["residual"] = normal(TOKENS, WIDTH)
    trained = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    return trained | {"weight": normal(COLUMNS, WIDTH), "bias": normal(COLUMNS)}


def ours(layer: str, t: dict[str, Tensor], scale: float) -> tuple[Tensor, ...]:
    term = LowRank(t["a"], t["b"], SPANS, scale)
    if layer == "plain":
        return (add_low_rank(linear(t["x"], t["weight"], t["bias"]), t["x"], term),)
    if layer == "swiglu":
        return (swiglu_lora_linear(t["x"], t["weight"], t["bias"], term),)
    return rms_norm_lora_linear(
        t["x"], t["norm_weight"], t["weight"], t["bias"], term, eps=1e-5, residual=t.get("residual")
    )


def expected(layer: str, t: dict[str, Tensor], scale: float) -> tuple[Tensor, ...]:
    """The definition, in the dtype of the arguments."""
    a, b = t["a"], t["b"]
    delta = torch.zeros_like(t["weight"])
    delta[0:8] = scale * b[:8] @ a[:RANK]
    delta[12:24] = scale * b[8:] @ a[RANK:]
    s = t["x"] + t["residual"] if "residual" in t else t["x"]
    functions = {"plain": lambda: s, "swiglu": lambda: swiglu(s)}
    x = functions.get(layer, lambda: rms_norm(s, t["norm_weight"], 1e-5))()
    out = x @ (t["weight"] + delta).T + t["bias"]
    return (out, s) if layer.startswith("rms_norm") else (out,)


def results(function, layer: str, tensors: dict[str, Tensor], scale: float = 0.7) -> dict[str, Tensor]:
    """Outputs and gradients."""
    for tensor in tensors.values():
        tensor.grad = None
    outputs = function(layer, tensors, scale)
    generator = torch.Generator().manual_seed(1)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum() for out in outputs)
    loss.backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    return found | {name: tensor.grad for name, tensor in tensors.items() if tensor.requires_grad}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.bfloat16, 1.2e-2),
        (torch.bfloat16, torch.float32, 1.2e-2),
    ],
)
def test_equals_the_definition(layer, dtype, adapter_dtype, tolerance):
    tensors = arguments(layer, dtype, adapter_dtype)
    found = results(ours, layer, tensors)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    for name, value in results(expected, layer, exact).items():
        assert float((found[name].double() - value).norm() / value.norm()) < tolerance, name
    assert found["a"].dtype == found["b"].dtype == adapter_dtype


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_adapters_change_no_bit(layer, dtype):
    t = arguments(layer, dtype, torch.float32, zero_b=True)
    found = ours(layer, t, 0.7)[0]
    if layer == "plain":
        base = linear(t["x"], t["weight"], t["bias"])
    elif layer == "swiglu":
        base = swiglu_linear(t["x"], t["weight"], t["bias"])
    else:
        base = rms_norm_linear(
            t["x"], t["norm_weight"], t["weight"], t["bias"], eps=1e-5, residual=t.get("residual"), return_sum=True
        )[0]
    assert torch.equal(found, base)


@pytest.mark.parametrize("layer", LAYERS[:-1])  # the product of the last is torch's own
def test_autocast_changes_no_bit(layer):
    tensors = arguments(layer, torch.float32, torch.float32)
    expected = results(ours, layer, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(ours, layer, tensors)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("layer", "kept"), [("rms_norm_residual", [WIDTH, 6]), ("swiglu", [2 * WIDTH, 6])])
def test_the_input_of_the_product_is_not_kept(layer, kept):
    tensors = arguments(layer, torch.float32, torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(layer, tensors, 1.0)
    assert sorted(t.shape[1] for t in saved if t.ndim == 2 and t.shape[0] == TOKENS) == sorted([*kept])


def test_wrong_arguments_are_refused():
    t = arguments("rms_norm", torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"rms_norm_lora_linear: weight or bias requires a gradient"):
        ours("rms_norm", t | {"weight": t["weight"].clone().requires_grad_()}, 1.0)
    with pytest.raises(ValueError, match=r"rms_norm_lora_linear: a has shape \(5, 16\); expected \(6, 16\)"):
        ours("rms_norm", t | {"a": t["a"][:5]}, 1.0)
    with pytest.raises(
        ValueError,
        match=r"rms_norm_lora_linear: b is torch.float64; allowed: torch.float32, torch.float32, torch.bfloat16",
    ):
        ours("rms_norm", t | {"b": t["b"].double()}, 1.0)
    with pytest.raises(ValueError, match=r"add_low_rank: spans are \(\(0, 25\),\); allowed: ranges in order within 24"):
        add_low_rank(torch.zeros(2, 24), torch.zeros(2, 16), LowRank(t["a"], t["b"], ((0, 25),), 1.0))
