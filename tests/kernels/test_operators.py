"""The operators as torch sees them: schema, fake tensors, tracing, torch.compile; and life without triton."""

import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from steep.kernels import add_rms_norm, attention, linear_cross_entropy, rms_norm, rope, swiglu

T, H = 6, 16
CU = torch.tensor([0, 4, 6, 6], dtype=torch.int32)
ROPE = (torch.randn(T, 2, 8), torch.randn(T, 1, 8), torch.randn(9, 4), torch.randn(9, 4), torch.arange(T))
QKV = (torch.randn(T, 2, 8), torch.randn(T, 1, 8), torch.randn(T, 1, 8))
DOCUMENTS = (CU, None, 4, 4, None, 0.3, "torch_sdpa_cpu")
X, W, LABELS = torch.randn(T, H), torch.randn(11, H), torch.tensor([1, 2, -100, 4, 5, 6])

CALLS = {
    "rms_norm": (X, torch.randn(H), 1e-5),
    "add_rms_norm": (X, X, torch.randn(H), 1e-5),
    "rms_norm_backward": (X, X, X, torch.randn(H), torch.rand(T)),
    "rope": (*ROPE, True),
    "swiglu": (X,),
    "swiglu_backward": (X[:, :8], X),
    "gate_up_linear": (X, W, W),
    "linear": (X, W, torch.randn(11)),
    "linear_cross_entropy": (X, W, LABELS, torch.tensor(0.5), -100, 4, True, True),
    "attention": (*QKV, *DOCUMENTS),
    "attention_backward": (QKV[0], *QKV, QKV[0], torch.randn(2, T), *DOCUMENTS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, dtype):
    always_fp32 = {"rope": (2, 3), "rms_norm_backward": (4,), "linear_cross_entropy": (3,), "attention_backward": (5,)}
    fp32 = always_fp32.get(name, ())
    args = [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in fp32 else a
        for i, a in enumerate(CALLS[name])
    ]
    opcheck(getattr(torch.ops.steep, name).default, args)


def layer(x, residual, norm, gate_up, head, cos, sin, positions):
    """Every public function once, as a decoder strings them together."""
    x, residual = add_rms_norm(x, residual, norm, 1e-5)
    q, k = rope(x.view(T, 2, 8), x.view(T, 2, 8)[:, :1], cos, sin, positions)
    x = residual + attention(q, k, 2 * k, CU, 4, window=3).reshape(T, H)
    x = swiglu(rms_norm(x, norm, 1e-5) @ gate_up)
    return linear_cross_entropy(x, head, LABELS, scale=torch.tensor(0.2))[0]


def test_compiles_as_one_graph_with_the_same_numbers():
    shapes = ((T, H), (T, H), (H,), (H, 2 * H), (11, H))
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    eager = layer(*leaves, *ROPE[2:])
    expected = torch.autograd.grad(eager, leaves)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves, *ROPE[2:])
    assert torch.equal(eager, compiled)
    for want, got in zip(expected, torch.autograd.grad(compiled, leaves)):
        assert torch.allclose(want, got, rtol=1e-5, atol=1e-6)


def test_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = sys.modules['transformers'] = None; import torch;"
        "from steep.kernels import rms_norm, attention_backend;"
        "x = torch.ones(2, 4, requires_grad=True); rms_norm(x, torch.ones(4), 0.0).sum().backward();"
        "print(attention_backend('cpu'), x.grad.abs().sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.split() == ["torch_sdpa_cpu", "0.0"], result.stderr
