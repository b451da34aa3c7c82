"""The kernels under pytest-benchmark: what `steep bench kernels` times on a CPU, and for comparing two checkouts on any
device, `pytest bench --benchmark-enable`."""

import pytest
import torch

from steep.bench.kernel_cases import cases, place
from steep.bench.kernel_timing import bind
from steep.bench.kernels import COPY_BYTES, MATMUL_N, cpu_who, function_of

AT = place("cuda" if torch.cuda.is_available() else "cpu")
CASES = {case.name: case for case in cases(AT)}
PARAMS = [(name, mode, who) for name, case in CASES.items() for mode in case.work for who in cpu_who(case)]


def once(name, mode, who):
    if name == "machine":
        if mode == "copy":
            source = torch.ones(COPY_BYTES // 4, device=AT.device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)
        a = torch.randn(MATMUL_N, MATMUL_N, device=AT.device, dtype=AT.dtype)
        return lambda: a @ a
    problem = CASES[name].build(CASES[name].tokens)
    return bind(function_of(problem, who), problem.inputs, mode)


@pytest.mark.parametrize(("name", "mode", "who"), [("machine", mode, "torch") for mode in ("copy", "matmul")] + PARAMS)
def test_kernel(benchmark, name: str, mode: str, who: str) -> None:
    function = once(name, mode, who)

    def call() -> None:
        function()
        if AT.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {mode}"
    benchmark(call)
