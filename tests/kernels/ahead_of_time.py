"""Compile the Triton kernels of a call for sm_90 on a machine without a GPU, and read the result off the machine code.

`capture` runs a host function on meta tensors and records what it would launch; `compile_sm90` compiles one such launch
with the very specialisation the launcher would give it and returns registers, stack (spills), shared memory and PTX.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Launch:
    fn: Any
    args: tuple
    constexprs: dict
    num_warps: int
    num_stages: int


@dataclass
class Compiled:
    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


def capture(monkeypatch, module, function, *args) -> list[Launch]:
    """The launches of `function(*args)` of `module`, tensors on the meta device."""
    launches: list[Launch] = []

    def record(fn, grid, *args, num_warps=4, num_stages=3, **constexprs):
        launches.append(Launch(fn, args, constexprs, num_warps, num_stages))

    with monkeypatch.context() as patch:
        patch.setattr(module, "launch", record)
        function(*args)
    return launches


def compile_sm90(launch: Launch) -> Compiled:
    names = [name for name in launch.fn.arg_names if name not in launch.constexprs and name != "INTERPRET"]
    constexprs = {**launch.constexprs, "INTERPRET": False}
    signature, attrs = {}, {}
    for name, value in zip(names, launch.args, strict=True):
        index = (launch.fn.arg_names.index(name),)
        if isinstance(value, int) and value == 1:
            constexprs[name] = 1
            continue
        signature[name] = mangle_type(value) if not isinstance(value, torch.Tensor) else _pointer(value)
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attrs[index] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constexprs, "constexpr")
    signature = {name: signature[name] for name in launch.fn.arg_names}
    compiled = triton.compile(
        ASTSource(launch.fn, signature, constexprs, attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return Compiled(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _pointer(tensor: torch.Tensor) -> str:
    names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
    return "*" + names[tensor.dtype]
