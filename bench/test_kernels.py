"""The same kernels under pytest-benchmark, for comparing two checkouts: `pytest bench --benchmark-enable`."""

import pytest
import torch

from steep.bench.kernels import MISTRAL_7B, SMOLLM2, call, cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    case.name: case
    for case in cases(*((MISTRAL_7B, torch.bfloat16) if DEVICE == "cuda" else (SMOLLM2, torch.float32)), DEVICE)
}


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("who", ["ours", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark, name: str, who: str, mode: str) -> None:
    case = CASES[name]

    def once() -> None:
        call(getattr(case, who), case.inputs, mode)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{name} {mode}"
    benchmark(once)
