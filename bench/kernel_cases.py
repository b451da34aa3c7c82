"""What `steep bench kernels` measures: each kernel with its floor, its target, eager torch and the peers.

A floor counts every tensor that must be read or written once (bytes) or the products that must be formed (FLOPs); a
target is the share of it that is asked for on Hopper. May touch: kernels, and through kernel_peers.py the peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import kernel_peers as peers

EPS = 1e-5
Functions = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Work:
    """What one mode costs at least, and the share of that floor (0 to 1) asked for on Hopper."""

    bytes: float = 0
    flops: float = 0
    target: float | None = None


@dataclass(frozen=True)
class Problem:
    """Inputs on the device (gradients go to those that require them) and who computes on them: "steep", "eager" and
    peers. `formula` runs in float64; None where the tests alone speak about errors."""

    inputs: tuple[Tensor, ...]
    functions: Functions
    formula: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Case:
    """One kernel at one shape. `build(tokens)` makes the problem; fewer tokens than `tokens` for the error."""

    kernel: str
    shape: str
    tokens: int
    build: Callable[[int], Problem]
    work: dict[str, Work]
    few_tokens: int = 256
    compiles: bool = False  # whether torch.compile of eager is measured too

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.shape}"


@dataclass(frozen=True)
class Place:
    """Device and dtype of all inputs of a run."""

    device: str
    dtype: torch.dtype
    generator: torch.Generator = field(repr=False, default_factory=torch.Generator)

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def random(self, *sizes: int, std: float = 1.0, grad: bool = True) -> Tensor:
        values = torch.randn(*sizes, generator=self.generator, device=self.device) * std
        return values.to(self.dtype).requires_grad_(grad)

    def integers(self, high: int, *sizes: int) -> Tensor:
        return torch.randint(0, high, sizes, generator=self.generator, device=self.device)


def place(device: str) -> Place:
    """bf16 on a GPU, fp32 on a CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Place(device, dtype, torch.Generator(device).manual_seed(0))


def cases(at: Place) -> Iterator[Case]:
    """Those of Qwen2.5-7B, Mistral-7B, Mistral-Small-24B and Mixtral on a GPU, of SmolLM2-135M on a CPU."""
    gpu = at.device == "cuda"
    tokens = 16384 if gpu else 2048
    hidden_sizes = [3584, 4096, 5120] if gpu else [576]
    widths = [18944, 14336, 32768] if gpu else [1536]
    vocabularies = [(3584, 152064), (4096, 32768), (5120, 131072)] if gpu else [(576, 49152)]
    heads = (32, 8, 128) if gpu else (9, 3, 64)
    for index, hidden in enumerate(hidden_sizes):
        yield rms_norm(at, tokens, hidden, compiles=index == 0)
        yield add_rms_norm(at, tokens, hidden, compiles=index == 0)
    for index, width in enumerate(widths):
        yield swiglu(at, tokens, width, compiles=index == 0)
    for documents in (1, 1000 if gpu else 50):
        yield rope(at, tokens, *heads, documents, compiles=documents == 1)
    for index, (hidden, vocab) in enumerate(vocabularies):
        yield linear_cross_entropy(at, tokens, hidden, vocab, compiles=index == 0)
    for documents, window in ((1, None), (16, None), (1, 4096)) if gpu else ((16, None),):
        yield attention(at, tokens, *heads, documents, window)


# --- memory-bound kernels --------------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers writes it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_norm(at: Place, tokens: int, hidden: int, compiles: bool) -> Case:
    def build(rows: int) -> Problem:
        functions: Functions = {"steep": partial(kernels.rms_norm, eps=EPS), "eager": _norm, **peers.rms_norm(EPS)}
        return Problem((at.random(rows, hidden), at.random(hidden)), functions, _norm)

    row = tokens * hidden * at.size
    work = {"forward": Work(bytes=2 * row, target=0.92), "backward": Work(bytes=3 * row, target=0.85)}
    return Case("rms_norm", f"{tokens} x {hidden}", tokens, build, work, compiles=compiles)


def add_rms_norm(at: Place, tokens: int, hidden: int, compiles: bool) -> Case:
    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        s = x + residual
        return _norm(s, weight), s

    def build(rows: int) -> Problem:
        inputs = at.random(rows, hidden), at.random(rows, hidden), at.random(hidden)
        functions: Functions = {
            "steep": partial(kernels.add_rms_norm, eps=EPS),
            "eager": eager,
            **peers.add_rms_norm(EPS),
        }
        return Problem(inputs, functions, eager)

    row = tokens * hidden * at.size
    work = {"forward": Work(bytes=4 * row, target=0.92), "backward": Work(bytes=4 * row, target=0.85)}
    return Case("add_rms_norm", f"{tokens} x {hidden}", tokens, build, work, compiles=compiles)


def swiglu(at: Place, tokens: int, width: int, compiles: bool) -> Case:
    def eager(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def build(rows: int) -> Problem:
        functions = {"steep": kernels.swiglu, "eager": eager, **peers.swiglu()}
        return Problem((at.random(rows, 2 * width),), functions, eager)

    row = tokens * width * at.size
    work = {"forward": Work(bytes=3 * row, target=0.92), "backward": Work(bytes=5 * row, target=0.88)}
    return Case("swiglu", f"{tokens} x {width}", tokens, build, work, compiles=compiles)


def _positions(tokens: int, documents: int, device: str) -> tuple[Tensor, Tensor, int]:
    """(positions int32 [T], cu_seqlens int32 [N+1], longest) of `documents` documents of nearly equal length."""
    bounds = torch.linspace(0, tokens, documents + 1).long()
    lengths = bounds.diff()
    positions = torch.arange(tokens) - bounds[:-1].repeat_interleave(lengths)
    return positions.int().to(device), bounds.int().to(device), int(lengths.max())


def rope(at: Place, tokens: int, heads_q: int, heads_k: int, head_dim: int, documents: int, compiles: bool) -> Case:
    def build(rows: int) -> Problem:
        positions, cu_seqlens, longest = _positions(rows, min(documents, rows), at.device)
        frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(longest, dtype=torch.float64), frequency)
        cos, sin = (table.float().to(at.device) for table in (angle.cos(), angle.sin()))

        def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            cos_T1D, sin_T1D = (torch.cat([t[positions.long()]] * 2, -1)[:, None].to(q.dtype) for t in (cos, sin))

            def rotate(x: Tensor) -> Tensor:
                left, right = x.chunk(2, dim=-1)
                return x * cos_T1D + torch.cat([-right, left], dim=-1) * sin_T1D

            return rotate(q), rotate(k)

        functions = {
            "steep": lambda q, k: kernels.rope(q, k, cos, sin, positions),
            "eager": eager,
            **peers.rope(cos, sin, positions, cu_seqlens, longest),
        }
        inputs = at.random(rows, heads_q, head_dim), at.random(rows, heads_k, head_dim)
        return Problem(inputs, functions, eager)

    moved = 2 * tokens * (heads_q + heads_k) * head_dim * at.size
    work = {"forward": Work(bytes=moved, target=0.85), "backward": Work(bytes=moved, target=0.85)}
    shape = f"{tokens} x {heads_q}+{heads_k} x {head_dim}, {documents} documents"
    return Case("rope", shape, tokens, build, work, compiles=compiles)


# --- matmul-bound kernels --------------------------------------------------------------------------------------------


def linear_cross_entropy(at: Place, tokens: int, hidden: int, vocab: int, compiles: bool) -> Case:
    def build(rows: int) -> Problem:
        labels = at.integers(vocab, rows)

        def eager(x: Tensor, weight: Tensor) -> Tensor:
            logits = x @ weight.T
            return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum")

        functions = {
            "steep": lambda x, weight: kernels.linear_cross_entropy(x, weight, labels)[0],
            "eager": eager,
            **peers.linear_cross_entropy(labels),
        }
        return Problem((at.random(rows, hidden), at.random(vocab, hidden, std=0.02)), functions, eager)

    # ours computes the gradients in its forward pass: only loss and both gradients together compare
    work = {"full": Work(flops=6 * tokens * hidden * vocab, target=0.90)}
    shape = f"{tokens} x {hidden} x {vocab}"
    return Case("linear_cross_entropy", shape, tokens, build, work, compiles=compiles)


def attention(
    at: Place, tokens: int, heads_q: int, heads_k: int, head_dim: int, documents: int, window: int | None
) -> Case:
    def build(rows: int) -> Problem:
        _, cu_seqlens, longest = _positions(rows, min(documents, rows), at.device)

        def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            from ..kernels.attention import attention_reference

            return attention_reference(q, k, v, cu_seqlens, cu_seqlens, window)

        inputs = tuple(at.random(rows, heads, head_dim) for heads in (heads_q, heads_k, heads_k))
        functions = {
            "steep": lambda q, k, v: kernels.attention(q, k, v, cu_seqlens, longest, window=window),
            **peers.attention(cu_seqlens, longest, window, documents),
        }
        return Problem(inputs, functions, reference)

    longest = -(-tokens // documents)
    seen = longest * (longest + 1) / 2  # (query, key) pairs of one document
    if window is not None and window < longest:
        seen -= (longest - window) * (longest - window + 1) / 2
    flops = 4 * seen * documents * heads_q * head_dim
    work = {"forward": Work(flops=flops), "backward": Work(flops=2.5 * flops)}
    limits = "" if window is None else f", window {window}"
    shape = f"{tokens} x {heads_q}/{heads_k} x {head_dim}, {documents} documents{limits}"
    return Case("attention", shape, tokens, build, work)
