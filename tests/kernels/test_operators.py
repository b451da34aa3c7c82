"""The operators as torch sees them: schema, fake tensors, tracing, torch.compile; and life without triton."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from steep.kernels import add_rms_norm, attention, embedding, linear_cross_entropy, rms_norm, rope, rope_qkv, swiglu

T, H = 6, 16
CU = torch.tensor([0, 4, 6, 6], dtype=torch.int32)
ROPE = (torch.randn(T, 2, 8), torch.randn(T, 1, 8), torch.randn(9, 4), torch.randn(9, 4), torch.arange(T))
QKV = (torch.randn(T, 2, 8), torch.randn(T, 1, 8), torch.randn(T, 1, 8))
PLACE = (*ROPE[2:], 2, 1, False)
PROJECTED, HEAD_NORM, RSTD = torch.randn(T, 32), torch.randn(8), torch.rand(T, 3)
TOKENS = torch.tensor([1, 3, 3, 0, 10, 3])
DOCUMENTS = (CU, None, 4, 4, None, 0.3, "torch_sdpa_cpu")
FP32 = torch.float32
OFFSETS, EXPERTS = torch.tensor([2, 2, 6], dtype=torch.int32), torch.tensor([[0, 2], [2, 1], [0, 1]], dtype=torch.int32)
SHARES, ORDER = torch.rand(3, 2), torch.tensor([[0, 4], [5, 2], [1, 3]], dtype=torch.int32)
X, W, LABELS = torch.randn(T, H), torch.randn(11, H), torch.tensor([1, 2, -100, 4, 5, 6])
ADAMW = ([], [], [], [0], torch.tensor(1e-3), torch.tensor(1.0), None, None, 0.9, 0.95, 1e-8, 0.1, 0)

CALLS = {
    "rms_norm": (X, torch.randn(H), 1e-5, False),
    "add_rms_norm": (X, X, torch.randn(H), 1e-5, True),
    "rms_norm_backward": (X, X, X, torch.randn(H), torch.rand(T), False),
    "rms_norm_backward_recompute": (torch.randn(T, H), X, X, torch.randn(H), torch.rand(T), True),
    "swiglu": (X, True),
    "swiglu_backward": (X[:, :8], X, False),
    "swiglu_backward_recompute": (torch.randn(T, 8), X, False),
    "rope": (*ROPE, True, False),
    "rope_qkv": (PROJECTED, *PLACE),
    "rope_qkv_backward": (ROPE[0], None, ROPE[1], *PLACE),
    "norm_rope_qkv": (PROJECTED, HEAD_NORM, HEAD_NORM, *PLACE[:5], 1e-6, False),
    "norm_rope_qkv_backward": (*QKV[:2], None, PROJECTED, RSTD, HEAD_NORM, HEAD_NORM, *PLACE),
    "embedding": (TOKENS, W[:, :8], torch.full((T,), 3), torch.tensor(1), torch.tensor(2), 5.0, 7),
    "embedding_backward": (X, TOKENS, 11),
    "embedding_accumulate": (X, TOKENS, torch.zeros(11, H)),
    "gate_up_linear": (X, W, W),
    "linear": (X, W, torch.randn(11)),
    "fp8_cast": (X, "1x128", True, True, False),
    "linear_cross_entropy": (X, W, LABELS, torch.rand(T), -100, 0.1, 0.01, FP32, 4, 5, torch.zeros(11, H), True, True),
    "scale_gradient": (X, torch.tensor(0.5), torch.bfloat16),
    "grouped_mm": (X, torch.randn(3, 5, H), OFFSETS),
    "grouped_mm_dw": (X[:, :5], X, OFFSETS, torch.float32),
    "moe_route": (torch.randn(T, 5), 2, True),
    "moe_route_backward": (SHARES, SHARES, EXPERTS, torch.randn(3, 5), False),
    "moe_sort": (EXPERTS, 3),
    "moe_expert_load": (EXPERTS, 3),
    "moe_permute": (X[:3], ORDER),
    "moe_unpermute": (X, SHARES, ORDER),
    "moe_unpermute_backward": (X[:3], X, SHARES, ORDER),
    "moe_weighted_swiglu_backward": (torch.randn(T, 8), X, SHARES, ORDER.flatten()),
    "squared_norm": ([X, W],),
    "adamw_": ([torch.randn(9)], [torch.randn(9)], [torch.zeros(9)], [torch.zeros(9)], *ADAMW),
    "attention": (*QKV, *DOCUMENTS),
    "attention_backward": (QKV[0], *QKV, QKV[0], torch.randn(2, T), *DOCUMENTS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, dtype):
    always_fp32 = {
        "rope": (2, 3),
        "rms_norm_backward": (4,),
        "rms_norm_backward_recompute": (4,),
        "rope_qkv": (1, 2),
        "rope_qkv_backward": (3, 4),
        "norm_rope_qkv": (3, 4),
        "norm_rope_qkv_backward": (4, 7, 8),
        "embedding_accumulate": (2,),
        "linear_cross_entropy": (3, 10),
        "scale_gradient": (1,),
        "attention_backward": (5,),
        "moe_route_backward": (0, 1),
        "moe_unpermute": (1,),
        "moe_unpermute_backward": (2,),
        "moe_weighted_swiglu_backward": (2,),
        "adamw_": (8, 9),
    }
    fp32 = always_fp32.get(name, ())
    args = [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in fp32 else a
        for i, a in enumerate(CALLS[name])
    ]
    opcheck(getattr(torch.ops.steep, name).default, args)


FLOATS = {
    "rms_norm: x": lambda new: rms_norm(new(T, H), new(H), 1e-5),
    "swiglu: gate_up": lambda new: swiglu(new(T, H)),
    "rope: q": lambda new: rope(new(T, 2, 8), new(T, 1, 8), *ROPE[2:]),
    "rope_qkv: qkv": lambda new: rope_qkv(new(T, 32), *PLACE[:5]),
    "embedding: weight": lambda new: embedding(TOKENS, new(11, H)),
    "linear_cross_entropy: x": lambda new: linear_cross_entropy(new(T, H), new(11, H), LABELS),
}


@pytest.mark.parametrize("argument", FLOATS)
def test_only_floats_that_the_kernels_compute_with_are_taken(argument):
    """Triton's arithmetic is fp32: on a GPU fp64 would silently lose half of its bits."""
    call = FLOATS[argument]
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"{argument} is {dtype}; allowed: .*float64"):
            call(partial(torch.empty, dtype=dtype))
    call(partial(torch.zeros, dtype=torch.float64))
    with FakeTensorMode(), pytest.raises(ValueError, match=f"{argument} is torch.float64; allowed: .*float32$"):
        call(partial(torch.empty, dtype=torch.float64, device="cuda"))


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
