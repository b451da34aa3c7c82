"""Fixtures of the kernel tests: the same public functions on the CPU references and on interpreted Triton kernels."""

from __future__ import annotations

import pkgutil

import pytest
import torch

import steep.kernels
from tests.kernels.kernel_checks import kernel_module


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the interpreted CUDA implementation behind every operator of steep.kernels: `_NAME_op` calls `_NAME_triton`
    (or `_NAME_cuda`, where that function chooses between kernels) of the same module."""
    for info in pkgutil.iter_modules(steep.kernels.__path__):
        module = kernel_module(info.name)
        for name in [name for name in vars(module) if name.endswith("_op") and name.startswith("_")]:
            for suffix in ("_triton", "_cuda"):
                if (function := getattr(module, name.removesuffix("_op") + suffix, None)) is not None:
                    monkeypatch.setattr(module, name, function)
    monkeypatch.setattr(kernel_module("attention"), "attention_backend", lambda device_type: "triton")
    # Small tiles: several per document, as on a GPU, with documents that the interpreter gets through.
    monkeypatch.setattr(kernel_module("attention_triton"), "tile_sizes", lambda *_: {"BLOCK_M": 16, "BLOCK_N": 16})
    tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "BAND": 2}
    monkeypatch.setattr(kernel_module("grouped_mm"), "tile_sizes", lambda *_: tiles)


@pytest.fixture(params=["cpu", "interpreter"])
def path(request, monkeypatch):
    """Which implementation stands behind the public functions in this test."""
    if request.param == "interpreter":
        use_triton(monkeypatch)
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param
