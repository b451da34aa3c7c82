"""`steep bench kernels`: every kernel beside the same formula in eager torch, forward and backward, against its floor.

The floor of a memory-bound kernel is its bytes over the copy bandwidth measured here; that of a matmul-bound one its
FLOPs over the rate of a large matmul measured here. Runs on the GPU if there is one (bf16, the shapes of Mistral-7B),
else on the CPU (fp32, those of SmolLM2-135M).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from ..kernels import add_rms_norm, attention, attention_backend, linear_cross_entropy, rms_norm, rope, swiglu

EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """T tokens in documents of L; D hidden, I intermediate, V vocabulary; Q query and K key heads of size H."""

    T: int
    L: int
    D: int
    I: int  # noqa: E741
    V: int
    Q: int
    K: int
    H: int


MISTRAL_7B = Shape(T=16384, L=1024, D=4096, I=14336, V=32768, Q=32, K=8, H=128)
SMOLLM2 = Shape(T=2048, L=128, D=576, I=1536, V=49152, Q=9, K=3, H=64)


@dataclass(frozen=True)
class Case:
    """One kernel: its inputs, ours and eager's function of them, and what forward and backward cost at least."""

    name: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    floor_bytes: tuple[float, float] = (0, 0)
    floor_flops: tuple[float, float] = (0, 0)


def cases(shape: Shape, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The kernels at one shape. Floors count each tensor that must be read or written once."""
    s, size = shape, torch.finfo(dtype).bits // 8
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator, device=device) * std).to(dtype).requires_grad_()

    row = s.T * s.D * size
    scale = random(s.D)
    yield Case(
        "rms_norm",
        (random(s.T, s.D), scale),
        lambda x, w: rms_norm(x, w, EPS),
        _eager_norm,
        floor_bytes=(2 * row, 3 * row),
    )
    yield Case(
        "add_rms_norm",
        (random(s.T, s.D), random(s.T, s.D), scale),
        lambda x, r, w: torch.cat([part.flatten()[:1] for part in add_rms_norm(x, r, w, EPS)]),
        lambda x, r, w: torch.cat([(x + r).flatten()[:1], _eager_norm(x + r, w).flatten()[:1]]),
        floor_bytes=(4 * row, 4 * row),
    )
    positions = torch.arange(s.T, device=device, dtype=torch.int32) % s.L
    angle = torch.outer(torch.arange(s.L), 10000.0 ** -(torch.arange(0, s.H, 2) / s.H)).to(device)
    cos, sin = angle.cos(), angle.sin()
    heads = s.T * (s.Q + s.K) * s.H * size
    yield Case(
        "rope",
        (random(s.T, s.Q, s.H), random(s.T, s.K, s.H)),
        lambda q, k: torch.cat(rope(q, k, cos, sin, positions), dim=1),
        lambda q, k: torch.cat([_eager_rope(x, cos[positions], sin[positions]) for x in (q, k)], dim=1),
        floor_bytes=(2 * heads, 2 * heads),
    )
    wide = s.T * s.I * size
    yield Case(
        "swiglu",
        (random(s.T, 2 * s.I),),
        swiglu,
        lambda x: F.silu(x[:, : s.I]) * x[:, s.I :],
        floor_bytes=(3 * wide, 5 * wide),
    )
    labels = torch.randint(0, s.V, (s.T,), generator=generator, device=device)
    yield Case(
        "linear_cross_entropy",
        (random(s.T, s.D), random(s.V, s.D, std=0.02)),
        lambda x, w: linear_cross_entropy(x, w, labels)[0],
        lambda x, w: F.cross_entropy((x @ w.T).float(), labels, reduction="sum"),
        # ours computes its gradients in the forward pass: only the sum of both is comparable
        floor_flops=(2 * s.T * s.D * s.V, 4 * s.T * s.D * s.V),
    )
    cu_seqlens = torch.arange(0, s.T + 1, s.L, device=device, dtype=torch.int32)
    flops = 2 * s.T * s.L * s.Q * s.H  # two products over half the square of each document
    yield Case(
        "attention",
        (random(s.T, s.Q, s.H), random(s.T, s.K, s.H), random(s.T, s.K, s.H)),
        lambda q, k, v: attention(q, k, v, cu_seqlens, s.L),
        lambda q, k, v: _eager_attention(q, k, v, s.L),
        floor_flops=(flops, 2.5 * flops),
    )


def run(shape: Shape | None = None, min_seconds: float = 1.0) -> dict[str, Any]:
    """Time forward and forward + backward of every kernel.

    Returns:
        {"shape", "dtype", "copy_gb_s", "matmul_tflops", "attention_backend", "kernels": {name: {"forward" and "full":
        {"ms", "ms_iqr", "eager_ms", "speedup", "floor_ms", "of_floor"}}}}: medians; of_floor is floor_ms / ms.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = shape or (MISTRAL_7B if device == "cuda" else SMOLLM2)
    copy_rate, matmul_rate = _copy_rate(device, min_seconds), _matmul_rate(device, dtype, min_seconds)
    kernels: dict[str, Any] = {}
    for case in cases(shape, dtype, device):
        figures = kernels[case.name] = {}
        for mode in ("forward", "full"):
            ours, eager = (_time(function, case.inputs, mode, min_seconds) for function in (case.ours, case.eager))
            last = 1 if mode == "forward" else 2
            floor = sum(case.floor_bytes[:last]) / copy_rate + sum(case.floor_flops[:last]) / matmul_rate
            figures[mode] = {
                "ms": ours.median * 1e3,
                "ms_iqr": ours.iqr * 1e3,
                "eager_ms": eager.median * 1e3,
                "speedup": eager.median / ours.median,
                "floor_ms": floor * 1e3,
                "of_floor": floor / ours.median,
            }
    return {
        "shape": vars(shape),
        "dtype": str(dtype),
        "copy_gb_s": copy_rate / 1e9,
        "matmul_tflops": matmul_rate / 1e12,
        "attention_backend": attention_backend(device),
        "kernels": kernels,
    }


def call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str) -> None:
    """One forward pass, or ("full") forward and backward from a gradient of ones."""
    if mode == "forward":
        with torch.no_grad():
            function(*inputs)
        return
    result = function(*inputs)
    torch.autograd.grad(result, inputs, torch.ones_like(result))


def _time(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], mode: str, min_seconds: float) -> Any:
    names = {"call": call, "function": function, "inputs": inputs, "mode": mode}
    timer = Timer("call(function, inputs, mode)", globals=names, num_threads=torch.get_num_threads())
    call(function, inputs, mode)  # compiles, and fills caches
    return timer.blocked_autorange(min_run_time=min_seconds)


def _copy_rate(device: str, min_seconds: float) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(1 << (28 if device == "cuda" else 25), device=device)
    names = {"a": torch.empty_like(source), "b": source.fill_(1)}
    timer = Timer("a.copy_(b)", globals=names, num_threads=torch.get_num_threads())
    return 2 * source.nbytes / timer.blocked_autorange(min_run_time=min_seconds).median


def _matmul_rate(device: str, dtype: torch.dtype, min_seconds: float) -> float:
    """FLOP/s of a large square matmul."""
    n = 8192 if device == "cuda" else 2048
    names = {"a": torch.randn(n, n, device=device, dtype=dtype)}
    timer = Timer("a @ a", globals=names, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=min_seconds).median


def _eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat([table, table], dim=-1)[:, None].to(x.dtype) for table in (cos, sin))
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def _eager_attention(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    # documents of one length, so that the peer is spared padding
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
