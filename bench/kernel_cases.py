"""What `steep bench kernels` measures: each kernel with its floor, its target, eager torch and the peers.

A floor counts every tensor that must be read or written once (bytes) or the products that must be formed (FLOPs); a
target is the share of it that is asked for on Hopper. May touch: kernels, and through kernel_peers.py the peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from . import kernel_peers as peers

EPS = 1e-5
Functions = dict[str, Callable[..., Any]]
Residual = Literal["master", "remainder"] | None


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
        yield rope(at, tokens, *heads, documents, norms=False, compiles=documents == 1)
    yield rope(at, tokens, *heads, 1, norms=True, compiles=True)
    for hidden, vocab in vocabularies[:1]:
        yield embedding(at, tokens, hidden, vocab, noisy=False)
        yield embedding(at, tokens, hidden, vocab, noisy=True)
    for index, (hidden, vocab) in enumerate(vocabularies):
        yield linear_cross_entropy(at, tokens, hidden, vocab, compiles=index == 0)
    for documents, window in ((1, None), (16, None), (1, 4096)) if gpu else ((16, None),):
        yield attention(at, tokens, *heads, documents, window)
    yield moe(at, tokens, *((4096, 14336, 8, 2) if gpu else (256, 512, 8, 2)))
    count = 1 << (28 if gpu else 22)
    for param, residual, moments in OPTIMIZERS:
        yield adamw(at, count, param, residual, moments)
    yield grad_norm(at, count)
    if gpu:
        yield fp8_cast(at, tokens, 3584)
        yield fp8_linear(at, tokens, 3584, 18944)


OPTIMIZERS: list[tuple[torch.dtype, Residual, torch.dtype]] = [
    (torch.float32, None, torch.float32),
    (torch.bfloat16, "master", torch.float32),
    (torch.bfloat16, "remainder", torch.float32),
    (torch.bfloat16, "remainder", torch.bfloat16),
    (torch.bfloat16, "remainder", torch.uint8),
    (torch.bfloat16, None, torch.bfloat16),
]


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


def _tables(head_dim: int, longest: int, device: str) -> tuple[Tensor, Tensor]:
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(longest, dtype=torch.float64), frequency)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rope(
    at: Place, tokens: int, heads_q: int, heads_k: int, head_dim: int, documents: int, norms: bool, compiles: bool
) -> Case:
    """q and k of a fused projection; with `norms` Qwen3's RMSNorm of each head before the rotation."""
    heads = [heads_q, heads_k, heads_k]
    kept: dict[str, Any] = {"q_norm": at.random(head_dim), "k_norm": at.random(head_dim), "eps": EPS} if norms else {}

    def build(rows: int) -> Problem:
        positions, cu_seqlens, longest = _positions(rows, min(documents, rows), at.device)
        cos, sin = _tables(head_dim, longest, at.device)

        def eager(qkv: Tensor) -> tuple[Tensor, ...]:
            cos_T1D, sin_T1D = (torch.cat([t[positions.long()]] * 2, -1)[:, None].to(qkv.dtype) for t in (cos, sin))

            def rotate(x: Tensor) -> Tensor:
                left, right = x.chunk(2, dim=-1)
                return x * cos_T1D + torch.cat([-right, left], dim=-1) * sin_T1D

            q, k, v = qkv.unflatten(1, (-1, head_dim)).split(heads, dim=1)
            if norms:
                q, k = _norm(q, kept["q_norm"].to(q.dtype)), _norm(k, kept["k_norm"].to(k.dtype))
            return rotate(q), rotate(k), v

        def steep(qkv: Tensor) -> tuple[Tensor, ...]:
            # rotated in place: a leaf that requires a gradient cannot be
            qkv = qkv.clone() if qkv.requires_grad and torch.is_grad_enabled() and not norms else qkv
            return kernels.rope_qkv(qkv, cos, sin, positions, heads_q, heads_k, **kept)

        functions: Functions = {"steep": steep, "eager": eager}
        if not norms:
            functions |= peers.rope(cos, sin, positions, cu_seqlens, longest, heads, head_dim)
        return Problem((at.random(rows, sum(heads) * head_dim),), functions, eager)

    moved = (heads_q + heads_k) * tokens * head_dim * at.size
    whole = sum(heads) * tokens * head_dim * at.size
    work = {
        "forward": Work(bytes=2 * moved, target=0.85),
        "backward": Work(bytes=2 * whole + (moved if norms else 0), target=0.85),
    }
    shape = f"{tokens} x {heads_q}+{heads_k} x {head_dim}, {documents} document{'s' * (documents > 1)}"
    return Case("qk_norm_rope" if norms else "rope", shape, tokens, build, work, compiles=compiles)


def embedding(at: Place, tokens: int, hidden: int, vocab: int, noisy: bool) -> Case:
    def build(rows: int) -> Problem:
        ids = at.integers(vocab, rows)
        noise = None
        if noisy:
            lengths = torch.full((rows,), 512, dtype=torch.int32, device=at.device)
            noise = kernels.NeftuneNoise(alpha=5.0, lengths=lengths, seed=0, step=1)
        functions: Functions = {"steep": lambda weight: kernels.embedding(ids, weight, noise=noise)}
        if not noisy:
            functions["eager"] = lambda weight: F.embedding(ids, weight)
        formula = None if noisy else functions["eager"]
        return Problem((at.random(vocab, hidden),), functions, formula)

    row = tokens * hidden * at.size
    work = {"forward": Work(bytes=2 * row), "backward": Work(bytes=row + vocab * hidden * at.size)}
    name = "embedding + NEFTune" if noisy else "embedding"
    return Case(name, f"{tokens} of {vocab} x {hidden}", tokens, build, work)


def adamw(at: Place, count: int, param: torch.dtype, residual: Residual, moments: torch.dtype) -> Case:
    """One step on `count` parameters in 16 tensors, gradients in the parameters' dtype."""

    def build(elements: int) -> Problem:
        sizes = [elements // 16] * 16
        params = [at.random(size, grad=False).to(param) for size in sizes]
        grads = [at.random(size, grad=False).to(param) for size in sizes]
        firsts = [256 * (-(-elements // 16 // 256)) * n for n in range(16)]
        shards = [
            kernels.AdamWShard.zeros(p, residual=residual, moments=moments, first_index=first)
            for p, first in zip(params, firsts)
        ]
        step = torch.ones((), dtype=torch.float32, device=at.device)
        settings: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        functions: Functions = {"steep": lambda: kernels.adamw_(shards, grads, step=step, **settings)}
        if param == moments == torch.float32:
            exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in params] for _ in range(2))
            copies = [p.clone() for p in params]
            functions["torch"] = lambda: torch._fused_adamw_(
                copies, grads, exp_avgs, exp_avg_sqs, [], [step] * 16, lr=1e-5, beta1=0.9, beta2=0.95,
                weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip
        return Problem((), functions)

    width = {torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1}
    each = 3 * width[param] + 4 * width[moments] + {None: 0, "master": 8, "remainder": 4}[residual]
    stored = f"{str(param)[6:]}{' + ' + residual if residual else ''}, {str(moments)[6:]} moments"
    return Case("adamw", f"{count:,}: {stored}", count, build, {"step": Work(bytes=each * count, target=0.90)})


def grad_norm(at: Place, count: int) -> Case:
    def build(elements: int) -> Problem:
        grads = tuple(at.random(elements // 16, grad=False) for _ in range(16))
        return Problem(
            grads,
            {
                "steep": lambda *grads: kernels.grad_norm(grads),
                "eager": lambda *grads: torch.nn.utils.get_total_norm(grads),
            },
            lambda *grads: torch.cat(grads).norm(),
        )

    return Case("grad_norm", f"{count:,}", count, build, {"step": Work(bytes=count * at.size, target=0.90)}, 4096)


def fp8_cast(at: Place, tokens: int, hidden: int) -> Case:
    """Activations in groups of 128, with the transposed copy."""

    def build(rows: int) -> Problem:
        return Problem((at.random(rows, hidden, grad=False),), {"steep": kernels.cast_blockwise})

    count = tokens * hidden
    work = {"step": Work(bytes=count * (at.size + 2) + 2 * 4 * count / 128, target=0.85)}
    return Case("fp8 cast + transposed", f"{tokens} x {hidden}", tokens, build, work)


# --- matmul-bound kernels --------------------------------------------------------------------------------------------


def linear_cross_entropy(at: Place, tokens: int, hidden: int, vocab: int, compiles: bool) -> Case:
    def build(rows: int) -> Problem:
        labels = at.integers(vocab, rows)

        def eager(x: Tensor, weight: Tensor) -> Tensor:
            logits = x @ weight.T
            return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), labels, reduction="sum")

        main_grad = torch.zeros(vocab, hidden, device=at.device)  # grows from call to call, which costs nothing

        def into_main_grad(x: Tensor, weight: Tensor) -> Tensor:
            return kernels.linear_cross_entropy(x, weight, labels, main_grad=main_grad)[0]

        functions: Functions = {
            "steep": lambda x, weight: kernels.linear_cross_entropy(x, weight, labels)[0],
            "steep, main_grad": into_main_grad,
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


def fp8_linear(at: Place, tokens: int, width_in: int, width_out: int) -> Case:
    """Against the same layer in bf16; the floor is bf16's, so its share may exceed 1."""

    def build(rows: int) -> Problem:
        inputs = at.random(rows, width_in), at.random(width_out, width_in, std=width_in**-0.5)
        return Problem(inputs, {"steep": kernels.fp8_linear, "eager": F.linear}, F.linear)

    work = {"full": Work(flops=6 * tokens * width_in * width_out)}
    return Case("fp8_linear", f"{tokens} x {width_in} x {width_out}", tokens, build, work)


def moe(at: Place, tokens: int, hidden: int, width: int, experts: int, top_k: int) -> Case:
    def build(rows: int) -> Problem:
        def eager(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
            p = torch.softmax(logits.to(torch.promote_types(x.dtype, torch.float32)), -1)
            weights, chosen = p.topk(top_k, -1)
            weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
            out = torch.zeros_like(x)
            for expert in range(experts):
                token, slot = torch.where(chosen == expert)
                gate, up = (x[token] @ gate_up[expert].T).chunk(2, -1)
                out.index_add_(0, token, (F.silu(gate) * up @ down[expert].T) * weights[token, slot, None])
            return out

        inputs = (
            at.random(rows, hidden),
            at.random(rows, experts),
            at.random(experts, 2 * width, hidden, std=hidden**-0.5),
            at.random(experts, hidden, width, std=width**-0.5),
        )
        functions: Functions = {
            "steep": lambda x, logits, gate_up, down: kernels.moe_mlp(x, logits, gate_up, down, top_k),
            "eager": eager,
            **peers.moe(top_k),
        }
        return Problem(inputs, functions, eager)

    flops = 6 * tokens * top_k * hidden * width
    work = {"forward": Work(flops=flops, target=0.85), "full": Work(flops=3 * flops, target=0.85)}
    return Case("moe_mlp", f"{tokens} x {hidden} x {width}, {experts} experts, top {top_k}", tokens, build, work)
