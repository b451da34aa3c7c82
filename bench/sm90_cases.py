"""The cases of `steep bench sm90`: every Triton kernel at the shapes of 7B to 24B models. One function a kernel file.

HIDDEN: Qwen2.5-7B, Mistral-7B, Mistral-Small-24B; VOCABULARY: Mistral, Mistral-Small, Qwen2.5.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .sm90 import Case, meta

HIDDEN = (3584, 4096, 5120)
VOCABULARY = (32768, 131072, 152064)
INTERMEDIATE = {3584: 18944, 4096: 14336, 5120: 32768}
HEAD_DIM = (64, 80, 96, 128)
FP32, INT32, INT64 = torch.float32, torch.int32, torch.int64
WIDE = ("ld_v4", "st_v4")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from rms_norm()
    yield from rope()
    yield from swiglu()
    yield from linear_cross_entropy()
    yield from attention()


def rms_norm() -> Iterator[Case]:
    for hidden in HIDDEN:
        x, weight, rstd = meta(64, hidden), meta(hidden), meta(64, dtype=FP32)
        for function, args, needs in (
            ("_rms_norm_triton", (x, weight, 1e-5), {"_forward_kernel": WIDE}),
            ("_add_rms_norm_triton", (x, x, weight, 1e-5), {"_forward_kernel": WIDE}),
            ("_rms_norm_backward_triton", (x, x, x, weight, rstd), {"_backward_kernel": ("cp_async",)}),
        ):
            yield Case(f"rms_norm {function} H={hidden}", "rms_norm", function, args, needs)


def rope() -> Iterator[Case]:
    for head_dim in HEAD_DIM:
        tables, positions = meta(4096, head_dim // 2, dtype=FP32), meta(64, dtype=INT32)
        args = (meta(64, 28, head_dim), meta(64, 4, head_dim), tables, tables, positions, True)
        yield Case(f"rope D={head_dim}", "rope", "_rope_triton", args, {"_rope_kernel": WIDE})


def swiglu() -> Iterator[Case]:
    for width in INTERMEDIATE.values():
        h, gate_up = meta(64, width), meta(64, 2 * width)
        yield Case(f"swiglu I={width}", "swiglu", "_swiglu_triton", (gate_up,), {"_forward_kernel": WIDE})
        args = (h, gate_up)
        yield Case(
            f"swiglu backward I={width}", "swiglu", "_swiglu_backward_triton", args, {"_backward_kernel": WIDE}
        )


def linear_cross_entropy() -> Iterator[Case]:
    scalar, labels, nll = meta(dtype=FP32), meta(64, dtype=INT64), meta(64, dtype=FP32)
    for vocab in VOCABULARY:
        args = (meta(64, vocab), labels, scalar, nll, -100, True)
        yield Case(
            f"cross entropy V={vocab}",
            "linear_cross_entropy",
            "_cross_entropy_triton",
            args,
            {"_cross_entropy_kernel": WIDE},
        )


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
