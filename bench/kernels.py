"""`steep bench kernels`: every kernel beside eager torch, torch.compile and the peers that are installed.

For each kernel, shape and mode: milliseconds, GB/s or TFLOP/s, the share of the copy bandwidth or matmul rate measured
in the same run, peak memory and the error against float64. On a GPU with CUDA graphs and events (kernel_timing.py), in
bf16 at the shapes of 7B to 24B models, in about 8 minutes; on a CPU with pytest-benchmark, in fp32 at SmolLM2-135M's.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..kernels import attention_backend
from .kernel_cases import Case, Place, Problem, Work, cases, place
from .kernel_timing import bind, copy_rate, matmul_rate, peak_extra_bytes, relative_error, time_gpu

COPY_BYTES, MATMUL_N = 1 << 27, 2048  # what the CPU's rates are measured on


def run(minutes: float = 8.0) -> dict[str, Any]:
    """Measure everything that fits in `minutes`; what no longer fits is listed as such, ours and eager come first.

    Returns:
        {"dtype", "copy_gb_s", "matmul_tflops", "attention_backend", "results": [one dict for each kernel, shape, mode
        and who: "ms" and its spread, "gb_s" or "tflops", "of_floor" (floor / time), "target" (of_floor asked for on
        Hopper), "peak_extra_bytes" (GPU), "error"; or "not_measured": why]}.
    """
    at = place("cuda" if torch.cuda.is_available() else "cpu")
    figures = _run_gpu(at, minutes) if at.device == "cuda" else _run_cpu(at)
    return {"dtype": str(at.dtype).removeprefix("torch."), "attention_backend": attention_backend(at.device), **figures}


def _run_gpu(at: Place, minutes: float) -> dict[str, Any]:
    deadline = time.monotonic() + 60 * minutes
    with torch.cuda.stream(torch.cuda.Stream()):  # graphs cannot be captured on the default one
        rates = copy_rate(), matmul_rate(at.dtype)
        results: list[dict[str, Any]] = []
        for compiled in (False, True):  # torch.compile is slowest to start: it takes what time the others leave
            for case in cases(at):
                if not compiled or case.compiles:
                    results += _measure_gpu(case, rates, deadline, compiled)
                    torch.cuda.empty_cache()
    return {"copy_gb_s": rates[0] / 1e9, "matmul_tflops": rates[1] / 1e12, "results": results}


def _measure_gpu(case: Case, rates: tuple[float, float], deadline: float, compiled: bool) -> list[dict[str, Any]]:
    results = []
    problem = case.build(case.tokens)
    for who in ["compile"] if compiled else problem.functions:
        function = function_of(problem, who)
        error = None if compiled else _error(case, who)
        for mode, work in case.work.items():
            row: dict[str, Any] = {"kernel": case.kernel, "shape": case.shape, "mode": mode, "who": who}
            results.append(row)
            if time.monotonic() > deadline:
                row["not_measured"] = "time was up"
                continue
            try:
                once = bind(function, problem.inputs, mode)
                row |= time_gpu(once)
                row["peak_extra_bytes"] = peak_extra_bytes(once)
            except Exception as failure:  # a peer may throw anything; the run goes on and says what it was
                row["not_measured"] = _first_line(failure)
                continue
            row |= _rates(row["ms"], work, rates) | _stated(error)
    return results


def _error(case: Case, who: str) -> float | str | None:
    """Against float64 at few tokens; a string says why there is none."""
    problem = case.build(case.few_tokens)
    if problem.formula is None:
        return None
    try:
        return relative_error(problem.functions[who], problem.formula, problem.inputs)
    except Exception as failure:
        return _first_line(failure)


def _first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:200]


def _stated(error: float | str | None) -> dict[str, Any]:
    return {} if error is None else {"error": error}


def _rates(ms: float, work: Work, rates: tuple[float, float]) -> dict[str, Any]:
    figures: dict[str, Any] = {"floor_ms": 1e3 * (work.bytes / rates[0] + work.flops / rates[1])}
    figures["of_floor"] = figures["floor_ms"] / ms
    if work.bytes:
        figures["gb_s"] = work.bytes / ms / 1e6
    if work.flops:
        figures["tflops"] = work.flops / ms / 1e9
    if work.target is not None:
        figures["target"] = work.target
    return figures


# --- CPU: the timing is pytest-benchmark's, run on test_kernels.py ---------------------------------------------------


def cpu_who(case: Case) -> list[str]:
    """Who is measured on a CPU: the peers that are written in Triton or CUDA do not run there."""
    who = [name for name in case.build(1).functions if name in ("steep", "eager", "torch")]
    return [*who, "compile"] if case.compiles else who


def function_of(problem: Problem, who: str) -> Callable[..., Any]:
    """The function behind a name; "compile" is torch.compile of eager's."""
    return torch.compile(problem.functions["eager"]) if who == "compile" else problem.functions[who]


def _run_cpu(at: Place) -> dict[str, Any]:
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as missing:
        raise ImportError('bench kernels on a CPU needs pytest-benchmark: pip install "steep[bench]"') from missing
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "benchmark.json")
        arguments = [str(Path(__file__).with_name("test_kernels.py")), "--benchmark-enable", "-q", "--no-header"]
        arguments += [f"--benchmark-json={report}", "-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider"]
        status = pytest.main([*arguments, "--import-mode=importlib", "--capture=no", "--benchmark-columns=median,iqr"])
        if status:
            raise RuntimeError(f"bench kernels: pytest-benchmark ended with {status!r}; its report is above")
        timings = json.loads(report.read_text())["benchmarks"]
    by_params = {tuple(t["params"][key] for key in ("name", "mode", "who")): t["stats"] for t in timings}
    rates = tuple(by_params[("machine", mode, "torch")]["median"] for mode in ("copy", "matmul"))
    rates = 2 * COPY_BYTES / rates[0], 2 * MATMUL_N**3 / rates[1]
    results = []
    for case in cases(at):
        for who in cpu_who(case):
            error = None if who == "compile" else _error(case, who)
            for mode, work in case.work.items():
                stats = by_params[(case.name, mode, who)]
                ms = 1e3 * stats["median"]
                row = {"kernel": case.kernel, "shape": case.shape, "mode": mode, "who": who, "ms": ms}
                row["ms_iqr"] = 1e3 * stats["iqr"]
                results.append(row | _rates(ms, work, rates) | _stated(error))
    return {"copy_gb_s": rates[0] / 1e9, "matmul_tflops": rates[1] / 1e12, "results": results}
