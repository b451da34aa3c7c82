"""How `steep bench kernels` measures on a GPU: CUDA graphs between events, peak memory, what the card can do.

Several calls are unrolled in one graph, so that neither Python nor launch latency counts; inputs are larger than the
L2 cache. What cannot be captured (a peer that asks the device for a value) is timed as it runs, and the figure says so.
All of it runs on the current stream, which must not be the default one: a graph is captured there, and a backward pass
runs where its forward did. May touch: torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MIN_MS = 2.0  # of work in one graph: an event's own microseconds do not count then


def time_gpu(once: Callable[[], Any], repeats: int = 20) -> dict[str, Any]:
    """{"ms", "ms_p20", "ms_p80", "graph"} of one call: quantiles over `repeats` replays after a warm-up."""
    for _ in range(3):  # compiles and tunes
        once()
    torch.cuda.synchronize()
    single = _between_events(once)
    calls = max(1, min(50, int(MIN_MS / max(single, 1e-3)) + 1))

    def batch() -> None:
        for _ in range(calls):
            once()

    replay: Callable[[], Any] = batch
    captured = True
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            batch()
        replay = graph.replay
    except RuntimeError:
        captured = False
        torch.cuda.synchronize()
    replay()
    times = sorted(_between_events(replay) / calls for _ in range(repeats))
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return {"ms": statistics.median(times), "ms_p20": p20, "ms_p80": p80, "graph": captured}


def _between_events(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_extra_bytes(once: Callable[[], Any]) -> int:
    """Device memory that a call takes beyond what lives before it; its results are part of it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = once()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (time_gpu(lambda: target.copy_(source))["ms"] * 1e-3)


def matmul_rate(dtype: torch.dtype = torch.bfloat16, n: int = 8192) -> float:
    """FLOP/s of a large square matmul of random normal numbers: zeros would let the card clock higher."""
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / (time_gpu(lambda: torch.mm(a, b, out=out))["ms"] * 1e-3)


def bind(function: Callable[..., Any], inputs: tuple[Tensor, ...], mode: str) -> Callable[[], Any]:
    """A call of `function(*inputs)` without arguments.

    mode: "forward" runs it without gradients; "backward" its backward alone, from fixed random gradients, on a graph
    that is walked again and again; "full" both, and "step" runs it as it is.
    """
    if mode == "step":
        return lambda: function(*inputs)
    if mode == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x for x in inputs if x.requires_grad]

    def outputs() -> tuple[Tensor, ...]:
        result = function(*inputs)
        return tuple(o for o in (result if isinstance(result, tuple) else (result,)) if o.requires_grad)

    results = outputs()
    gradients = [torch.randn_like(o) if o.ndim else torch.ones_like(o) for o in results]
    if mode == "backward":
        return lambda: torch.autograd.grad(results, leaves, gradients, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(outputs(), leaves, gradients, allow_unused=True)


def relative_error(function: Callable[..., Any], formula: Callable[..., Any], inputs: tuple[Tensor, ...]) -> float:
    """Largest relative error of a result or gradient of `function(*inputs)` against `formula` in float64."""

    def results(call: Callable[..., Any], values: list[Tensor]) -> list[Tensor]:
        got = call(*values)
        got = [o for o in (got if isinstance(got, tuple) else (got,)) if o.is_floating_point()]
        leaves = [x for x in values if x.requires_grad]
        roots = [o for o in got if o.requires_grad]
        if not roots:
            return [o.detach() for o in got]
        generator = torch.Generator(roots[0].device).manual_seed(1)
        gradients = [
            torch.randn(o.shape, generator=generator, device=o.device).to(torch.bfloat16).to(o.dtype)
            if o.ndim
            else torch.ones_like(o)
            for o in roots
        ]
        return [*(o.detach() for o in got), *torch.autograd.grad(roots, leaves, gradients)]

    wide = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    want = results(formula, wide)
    got = results(function, [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs])
    return max(((g.double() - w).norm() / w.norm().clamp(min=1e-12)).item() for g, w in zip(got, want, strict=True))
