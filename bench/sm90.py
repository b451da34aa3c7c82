"""`steep bench sm90`: what the Triton kernels compile to for Hopper, read off the machine code, without a GPU.

Each case of sm90_cases.py calls a host function on meta tensors; what it would launch is recorded and compiled with the
very specialisation that the launcher would give it: types, divisibility by 16, constexprs, warps and stages. From the
cubin come registers, stack (spills) and shared memory, from the PTX the instructions that decide speed: wide loads and
stores, asynchronous copies, wgmma. May touch: kernels, triton, a temporary file for cuobjdump.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

SHARED_BYTES_OF_AN_SM = 227 * 1024  # the most that one block can have on sm_90
INSTRUCTIONS = {
    "ld_v4": r"ld\.global[\w.:]*\.v4",  # 16 bytes a thread
    "st_v4": r"st\.global[\w.:]*\.v4",
    "cp_async": r"cp\.async\.(?:cg|ca)",
    "tma": r"cp\.async\.bulk\.tensor",
    "wgmma": r"wgmma\.mma_async",
    "cvt_e4m3": r"cvt\.rn\.satfinite\.e4m3x2\.f32",
}
_POINTEES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One call of a host function of `steep.kernels.<module>` at a real shape.

    needs: instructions (keys of INSTRUCTIONS) that each named kernel must have come out with.
    """

    label: str
    module: str
    function: str
    args: tuple
    needs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Launch:
    fn: Any
    args: tuple
    constexprs: dict
    num_warps: int
    num_stages: int


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def capture(module: ModuleType, function: Callable, *args: Any) -> list[Launch]:
    """The launches of `function(*args)` of `module`, tensors on the meta device."""
    launches: list[Launch] = []

    def record(fn, grid, *args, num_warps=4, num_stages=3, **constexprs):
        launches.append(Launch(fn, args, constexprs, num_warps, num_stages))

    with patch.object(module, "launch", record):
        function(*args)
    return launches


def compile_case(case: Case) -> dict[str, dict[str, int]]:
    """{kernel: {"registers", "stack_bytes", "shared_bytes", "num_warps", *INSTRUCTIONS}} of one case."""
    module = importlib.import_module(f"steep.kernels.{case.module}")
    launches = capture(module, getattr(module, case.function), *case.args)
    return {launch.fn.fn.__name__: compile_launch(launch) for launch in launches}


def faults(case: Case, compiled: dict[str, dict[str, int]]) -> list[str]:
    """What a compiled case must not have: spills, more shared memory than an SM, a needed instruction missing."""
    found = []
    for kernel, figures in compiled.items():
        if figures["stack_bytes"]:
            found.append(f"{case.label}: {kernel} spills {figures['stack_bytes']} bytes")
        if figures["shared_bytes"] > SHARED_BYTES_OF_AN_SM:
            found.append(f"{case.label}: {kernel} needs {figures['shared_bytes']} bytes of shared memory")
    for kernel, needed in case.needs.items():
        found += [f"{case.label}: {kernel} has no {name}" for name in needed if not compiled[kernel][name]]
    return found


def compile_launch(launch: Launch) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    names = [name for name in launch.fn.arg_names if name not in launch.constexprs and name != "INTERPRET"]
    constexprs = {**launch.constexprs, "INTERPRET": False}
    signature, attrs = {}, {}
    for name, value in zip(names, launch.args, strict=True):
        index = (launch.fn.arg_names.index(name),)
        if value is None or (isinstance(value, int) and value == 1):
            constexprs[name] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = "*" + _POINTEES[value.dtype] if tensor else mangle_type(value)
        if tensor or (isinstance(value, int) and value % 16 == 0):
            attrs[index] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constexprs, "constexpr")
    signature = {name: signature[name] for name in launch.fn.arg_names}
    compiled = triton.compile(
        ASTSource(launch.fn, signature, constexprs, attrs),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True},
    )
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(match[1]) for key in ("REG", "STACK") if (match := re.search(rf"{key}:(\d+)", usage)))
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "num_warps": launch.num_warps,
        **{name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()},
    }


def run(cases: Iterable[Case]) -> dict[str, Any]:
    """{"target", "cases": {label: {kernel: figures}}, "faults": [...]}: faults is empty if all is well."""
    compiled = {}
    found = []
    for case in cases:
        compiled[case.label] = compile_case(case)
        found += faults(case, compiled[case.label])
    return {"target": "sm_90", "cases": compiled, "faults": found}
