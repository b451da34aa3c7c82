"""The cases of `steep bench sm90`: every Triton kernel at the shapes of 7B to 24B models. One function a kernel file.

HIDDEN: Qwen2.5-7B, Mistral-7B, Mistral-Small-24B; VOCABULARY: Mistral, Mistral-Small, Qwen2.5.
MIXTRAL: hidden and intermediate size, experts, experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .sm90 import Case, meta

HIDDEN = (3584, 4096, 5120)
VOCABULARY = (32768, 131072, 152064)
INTERMEDIATE = {3584: 18944, 4096: 14336, 5120: 32768}
HEAD_DIM = (64, 80, 96, 128)
MIXTRAL = (4096, 14336, 8, 2)
FP32, INT32, INT64 = torch.float32, torch.int32, torch.int64
WIDE = ("ld_v4", "st_v4")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from rms_norm()
    yield from rope()
    yield from rope_qkv()
    yield from embedding()
    yield from swiglu()
    yield from linear_cross_entropy()
    yield from attention()
    yield from fp8()
    yield from grouped_mm()
    yield from moe()
    yield from adamw()
    yield from grad_norm()


def rms_norm() -> Iterator[Case]:
    forward, backward = {"_forward_kernel": WIDE}, {"_backward_kernel": ("cp_async", "st_v4")}
    for hidden in (128, *HIDDEN):  # 128: q and k of Qwen3
        x, weight, rstd = meta(64, hidden), meta(hidden), meta(64, dtype=FP32)
        for function, args, needs in (
            ("_rms_norm_triton", (x, weight, 1e-5, False), forward),
            ("_add_rms_norm_triton", (x, x, weight, 1e-5, False), forward),
            ("_rms_norm_backward_triton", (x, None, x, weight, rstd, False), backward),
            ("_rms_norm_backward_triton", (x, x, x, weight, rstd, False), backward),
            ("_rms_norm_backward_recompute_triton", (x, x, x, weight, rstd, False), backward),
        ):
            residual = " residual" if "backward" in function and args[1] is not None else ""
            yield Case(f"rms_norm {function}{residual} H={hidden}", "rms_norm", function, args, needs)


def rope() -> Iterator[Case]:
    for head_dim in HEAD_DIM:
        tables, positions = meta(4096, head_dim // 2, dtype=FP32), meta(64, dtype=INT32)
        args = (meta(64, 28, head_dim), meta(64, 4, head_dim), tables, tables, positions, True, False)
        yield Case(f"rope D={head_dim}", "rope", "_rope_triton", args, {"rotate_kernel": WIDE})


def rope_qkv() -> Iterator[Case]:
    for (heads_q, heads_k), head_dim in [((28, 4), 128), *(((32, 8), head_dim) for head_dim in HEAD_DIM)]:
        qkv, weight = meta(64, (heads_q + 2 * heads_k) * head_dim), meta(head_dim)
        q, k, rstd = meta(64, heads_q, head_dim), meta(64, heads_k, head_dim), meta(64, heads_q + heads_k, dtype=FP32)
        tables = meta(4096, head_dim // 2, dtype=FP32)
        place = tables, tables, meta(64, dtype=INT32), heads_q, heads_k
        norms = weight, weight, *place
        for function, args, needs in (
            ("_rope_qkv_triton", (qkv, *place, False), {"rotate_kernel": WIDE}),
            ("_rope_qkv_triton", (qkv, *place, True), {"rotate_kernel": WIDE}),
            ("_rope_qkv_backward_triton", (q, k, k, *place, False), {"rotate_kernel": WIDE}),
            ("_norm_rope_qkv_triton", (qkv, *norms, 1e-6, False), {"_norm_forward_kernel": WIDE}),
            (
                "_norm_rope_qkv_backward_triton",
                (q, k, k, qkv, rstd, *norms, False),
                {"_norm_backward_kernel": ("cp_async", "st_v4")},
            ),
        ):
            label = f"{function} {heads_q}/{heads_k} heads D={head_dim} exact_hf={args[-1]}"
            yield Case(label, "rope_qkv", function, args, needs)


def embedding() -> Iterator[Case]:
    tokens, scalar = meta(16384, dtype=INT64), meta(dtype=INT64)
    for hidden, vocab in zip(HIDDEN, (VOCABULARY[2], VOCABULARY[0], VOCABULARY[1])):
        weight, dy, main_grad = meta(vocab, hidden), meta(16384, hidden), meta(vocab, hidden, dtype=FP32)
        lengths = meta(16384, dtype=INT32)
        backward = {"_sum_kernel": ("cp_async", "st_v4"), "_join_kernel": ("cp_async", "st_v4")}
        noise = lengths, scalar, scalar, 5.0, 7
        for label, function, args, needs in (
            ("embedding", "_embedding_triton", (tokens, weight, None, None, None, 0.0, 0), {"_forward_kernel": WIDE}),
            ("embedding NEFTune", "_embedding_triton", (tokens, weight, *noise), {"_forward_kernel": WIDE}),
            ("embedding backward", "_embedding_backward_triton", (dy, tokens, vocab), backward),
            ("embedding main_grad", "_embedding_accumulate_triton", (dy, tokens, main_grad), backward),
        ):
            yield Case(f"{label} H={hidden} V={vocab}", "embedding", function, args, needs)


def swiglu() -> Iterator[Case]:
    for width in INTERMEDIATE.values():
        h, gate_up = meta(64, width), meta(64, 2 * width)
        for function, args, kernel in (
            ("_swiglu_triton", (gate_up, False), "_forward_kernel"),
            ("_swiglu_backward_triton", (h, gate_up, False), "_backward_kernel"),
            ("_swiglu_backward_recompute_triton", (h, gate_up, False), "_backward_kernel"),
        ):
            yield Case(f"swiglu {function} I={width}", "swiglu", function, args, {kernel: WIDE})


def linear_cross_entropy() -> Iterator[Case]:
    scalar, labels, nll = meta(dtype=FP32), meta(64, dtype=INT64), meta(64, dtype=FP32)
    rest = (labels, scalar, nll, nll, -100, 0.0, 0.0)
    for vocab in VOCABULARY:
        # bf16 logits become dz where they stand; fp32 logits become bf16 dz in the first half of each row.
        bf16, fp32 = meta(64, vocab), meta(64, vocab, dtype=FP32)
        for name, logits, dz, needs in (
            ("bf16", bf16, bf16, WIDE),
            ("bf16 loss only", bf16, None, ("ld_v4",)),
            ("fp32", fp32, fp32.view(torch.bfloat16)[:, :vocab], ("ld_v4",)),
        ):
            yield Case(
                f"cross entropy V={vocab} {name}",
                "cross_entropy",
                "cross_entropy_triton",
                (logits, dz, *rest),
                {"_cross_entropy_kernel": needs},
            )
    for dtype in (torch.bfloat16, FP32):
        args = (meta(152064, 3584, dtype=FP32), scalar, dtype)
        label = f"scale gradient to {str(dtype).removeprefix('torch.')}"
        yield Case(label, "linear_cross_entropy", "_scale_triton", args, {"_scale_kernel": WIDE})


def attention() -> Iterator[Case]:
    shapes = [(head_dim, torch.bfloat16, None) for head_dim in (*HEAD_DIM, 256)]
    windows = [(head_dim, torch.bfloat16, 4096) for head_dim in (64, 128)]
    for head_dim, dtype, window in [*shapes, *windows, (64, FP32, None)]:
        q, k = meta(8192, 32, head_dim, dtype=dtype), meta(8192, 8, head_dim, dtype=dtype)
        cu, lse = meta(33, dtype=INT32), meta(32, 8192, dtype=FP32)
        documents = cu, cu, window, 0.1
        label = f"D={head_dim} {str(dtype).removeprefix('torch.')} window={window}"
        tensor_cores = ("wgmma", "tma") if dtype == torch.bfloat16 else ()
        for function, args, kernels in (
            ("attention_triton", (q, k, k, *documents), ("_forward_kernel",)),
            ("attention_backward_triton", (q, q, k, k, q, lse, *documents), ("_dq_kernel", "_dkv_kernel")),
        ):
            needs = dict.fromkeys(kernels, tensor_cores)
            yield Case(f"{function} {label}", "attention_triton", function, args, needs)


def fp8() -> Iterator[Case]:
    amax, cast = {"_amax_kernel": ("ld_v4",)}, {"_cast_kernel": (*WIDE, "cvt_e4m3")}
    for scaling, rows, columns, needs in (
        ("1x128", True, True, cast),
        ("128x128", True, False, cast),
        ("128x128", False, True, cast),
        ("rowwise", True, True, amax | cast),
    ):
        args = (meta(64, HIDDEN[0]), scaling, rows, columns, False)
        yield Case(f"fp8 cast {scaling} rows={rows} columns={columns}", "fp8", "_fp8_cast_triton", args, needs)


def grouped_mm() -> Iterator[Case]:
    hidden, width, experts, top_k = MIXTRAL
    rows, offsets = 64 * top_k, meta(experts, dtype=INT32)
    for dtype in (torch.bfloat16, FP32):
        x, gate_up = meta(rows, hidden, dtype=dtype), meta(rows, 2 * width, dtype=dtype)
        weight = meta(experts, 2 * width, hidden, dtype=dtype)
        tensor_cores = ("wgmma", "cp_async") if dtype == torch.bfloat16 else ("cp_async",)
        for label, function, args, kernel in (
            ("y", "_grouped_mm_triton", (x, weight, offsets), "_rows_kernel"),
            ("dx", "_grouped_mm_triton", (gate_up, weight.transpose(1, 2), offsets), "_rows_kernel"),
            ("dw", "_grouped_mm_dw_triton", (gate_up, x, offsets, dtype), "_weight_kernel"),
            ("dw fp32", "_grouped_mm_dw_triton", (gate_up, x, offsets, FP32), "_weight_kernel"),
        ):
            needs = {kernel: (*tensor_cores, "st_v4")}
            yield Case(f"grouped_mm {label} {str(dtype).removeprefix('torch.')}", "grouped_mm", function, args, needs)


def moe() -> Iterator[Case]:
    hidden, width, _, top_k = MIXTRAL
    x, y, inverse = meta(64, hidden), meta(64 * top_k, hidden), meta(64, top_k, dtype=INT32)
    weights, gather = meta(64, top_k, dtype=FP32), meta(64 * top_k, dtype=INT32)
    rows, gate_up = meta(64 * top_k, width), meta(64 * top_k, 2 * width)
    bytes_bound: tuple[tuple[str, tuple], ...] = (
        ("permute", (x, inverse)),
        ("unpermute", (y, weights, inverse)),
        ("unpermute_backward", (x, y, weights, inverse)),
        ("weighted_swiglu_backward", (rows, gate_up, weights, gather)),
    )
    for name, args in bytes_bound:
        yield Case(f"moe {name}", "moe", f"_{name}_triton", args, {f"_{name}_kernel": WIDE})
    for experts, top_k in ((8, 2), (128, 8), (256, 8)):
        logits, weights, ids = meta(64, experts), meta(64, top_k, dtype=FP32), meta(64, top_k, dtype=INT32)
        routing: tuple[tuple[str, tuple], ...] = (
            ("_route_triton", (logits, top_k, True)),
            ("_route_backward_triton", (weights, weights, ids, logits, False)),
            ("_sort_triton", (ids, experts)),
        )
        for name, args in routing:
            yield Case(f"moe {name} E={experts}", "moe_routing", name, args, {})


def adamw() -> Iterator[Case]:
    """Every storage; a shard of the embedding that takes wide accesses, and one that cannot."""
    bf16, n = torch.bfloat16, 152064 * 3584 // 8
    weights: list[tuple[torch.dtype, torch.dtype | None]]
    weights = [(FP32, None), (bf16, FP32), (bf16, torch.int16), (bf16, None)]
    moments = [(FP32, FP32), (FP32, bf16), (bf16, bf16), (torch.uint8, bf16)]
    for length, some in ((n, slice(None)), (n + 1, slice(2, None))):
        for param, residual in weights[some]:
            for moment, grad in moments[some]:
                state = [[meta(length, dtype=dtype)] for dtype in (param, grad, moment, moment)]
                residuals = [meta(length, dtype=residual)] if residual else []
                scales = [meta(-(-length // 256), dtype=FP32)] if moment == torch.uint8 else []
                scalar = meta(dtype=FP32)
                args = (*state, residuals, scales, scales, [0], *[scalar] * 4, 0.9, 0.95, 1e-8, 0.1, 7)
                kinds = "/".join(str(dtype).removeprefix("torch.") for dtype in (param, residual, moment, grad))
                needs = {"_adamw_kernel": WIDE if length == n else ()}
                yield Case(f"adamw {kinds} n={length}", "adamw", "_adamw_triton", args, needs)


def grad_norm() -> Iterator[Case]:
    for dtype in (FP32, torch.bfloat16):
        args = ([meta(152064, 448, dtype=dtype), meta(3584, dtype=dtype)],)
        yield Case(f"squared_norm {dtype}", "grad_norm", "_squared_norm_triton", args, {"_squares_kernel": ("ld_v4",)})
