"""Every Triton kernel compiles for Hopper at the shapes of a 7B model: no spills, wide loads, wgmma, fits an SM."""

import pytest
import torch

from tests.kernels.ahead_of_time import capture, compile_sm90
from tests.kernels.kernel_checks import kernel_module

SM90_SHARED_BYTES = 227 * 1024


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_all(monkeypatch, name, function, *args):
    """{kernel name: compiled} of one call of a host function; spills and oversized tiles fail here."""
    module, compiled = kernel_module(name), {}
    for launch in capture(monkeypatch, module, getattr(module, function), *args):
        result = compile_sm90(launch)
        kernel = launch.fn.fn.__name__
        assert result.stack_bytes == 0, f"{kernel} spills {result.stack_bytes} bytes"
        assert result.shared_bytes <= SM90_SHARED_BYTES, f"{kernel} needs {result.shared_bytes} bytes of shared memory"
        compiled[kernel] = result
    return compiled


@pytest.mark.parametrize("hidden", [4096, 5120])
def test_rms_norm(monkeypatch, hidden):
    x, weight, rstd = meta(64, hidden), meta(hidden), meta(64, dtype=torch.float32)
    for function, args in (
        ("_rms_norm_triton", (x, weight, 1e-5)),
        ("_add_rms_norm_triton", (x, x, weight, 1e-5)),
        ("_rms_norm_backward_triton", (x, x, x, weight, rstd)),
    ):
        for name, compiled in compile_all(monkeypatch, "rms_norm", function, *args).items():
            wide = "cp.async" if name == "_backward_kernel" else "ld.global.v4"
            assert wide in compiled.ptx


def test_rope_and_swiglu(monkeypatch):
    tables, positions = meta(4096, 64, dtype=torch.float32), meta(64, dtype=torch.int32)
    for name, function, args in (
        ("rope", "_rope_triton", (meta(64, 28, 128), meta(64, 4, 128), tables, tables, positions, True)),
        ("swiglu", "_swiglu_triton", (meta(64, 2 * 18944),)),
        ("swiglu", "_swiglu_backward_triton", (meta(64, 18944), meta(64, 2 * 18944))),
    ):
        (compiled,) = compile_all(monkeypatch, name, function, *args).values()
        assert "ld.global.v4" in compiled.ptx
        assert compiled.registers <= 64


def test_cross_entropy(monkeypatch):
    scalar, labels = meta(dtype=torch.float32), meta(64, dtype=torch.int64)
    args = (meta(64, 152064), labels, scalar, meta(64, dtype=torch.float32), -100, True)
    (compiled,) = compile_all(monkeypatch, "linear_cross_entropy", "_cross_entropy_triton", *args).values()
    assert "ld.global.v4" in compiled.ptx
    assert "st.global.v4" in compiled.ptx


@pytest.mark.parametrize(
    ("head_dim", "dtype", "window"),
    [(64, torch.bfloat16, None), (128, torch.bfloat16, 4096), (256, torch.bfloat16, None), (128, torch.float32, None)],
    ids=str,
)
def test_attention(monkeypatch, head_dim, dtype, window):
    q, k = meta(8192, 32, head_dim, dtype=dtype), meta(8192, 8, head_dim, dtype=dtype)
    cu, lse = meta(33, dtype=torch.int32), meta(32, 8192, dtype=torch.float32)
    documents = cu, cu, window, 0.1
    compiled = {
        **compile_all(monkeypatch, "attention_triton", "attention_triton", q, k, k, *documents),
        **compile_all(monkeypatch, "attention_triton", "attention_backward_triton", q, q, k, k, q, lse, *documents),
    }
    if dtype == torch.bfloat16 and head_dim <= 128:
        for name in ("_forward_kernel", "_dq_kernel", "_dkv_kernel"):
            assert "wgmma.mma_async" in compiled[name].ptx
            assert "cp.async" in compiled[name].ptx
