"""Fixtures of the kernel tests: the same public functions on the CPU references and on interpreted Triton kernels."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.kernel_checks import kernel_module

_TRITON = {
    "rms_norm": {
        "_forward_op": "_rms_norm_triton",
        "_add_forward_op": "_add_rms_norm_triton",
        "_backward_op": "_rms_norm_backward_triton",
    },
    "rope": {"_rope_op": "_rope_triton"},
    "swiglu": {"_forward_op": "_swiglu_triton", "_backward_op": "_swiglu_backward_triton"},
    "linear_cross_entropy": {"_lce_op": "_lce_triton"},
    "attention": {"_forward_op": "_attention_cuda", "_backward_op": "_attention_backward_cuda"},
}


@pytest.fixture(params=["cpu", "interpreter"])
def path(request, monkeypatch):
    """Which implementation stands behind the public functions in this test."""
    if request.param == "interpreter":
        for name, functions in _TRITON.items():
            module = kernel_module(name)
            for operator, function in functions.items():
                monkeypatch.setattr(module, operator, getattr(module, function))
        monkeypatch.setattr(kernel_module("attention"), "attention_backend", lambda device_type: "triton")
        # Small tiles: several per document, as on a GPU, with documents that the interpreter gets through.
        monkeypatch.setattr(
            kernel_module("attention_triton"), "tile_sizes", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16}
        )
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param
