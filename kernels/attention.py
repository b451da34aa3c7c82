"""Packed causal attention with GQA and a sliding window: dispatch between backends, operators, and the CPU path.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that query i of the same document sees:
    j <= i + (nk - nq)   (causal, aligned bottom-right)      and      j > i + (nk - nq) - window

Floor: 4*D FLOPs per visible (query, key, head) forward, 10*D backward; q, k, v, o and one fp32 lse per row and head
are saved. Source: FlashAttention-2, arXiv:2307.08691. `window` counts as Hugging Face's sliding_window does: the
query's own key included.

On a GPU the work is done by the first of FlashAttention-3, FlashAttention-4, FlashAttention-2, torch's in-tree
FlashAttention-2 and the Triton kernels of attention_triton.py that is installed and passes the self-test of
attention_selftest.py, always with a deterministic backward. On a CPU each document is one call of torch's fused
attention on views of the packed tensors. May touch: torch, triton; flash_attn and flash_attn_interface where they are
installed; the environment variable STEEP_ATTENTION.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.autograd.function import once_differentiable

from ._op import check_tensor, compute_dtype, define_op, float_dtypes
from .attention_triton import attention_backward_triton, attention_triton

# --- the formula -----------------------------------------------------------------------------------------------------


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    window: int | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula itself, with whole score matrices, in the dtype of q: the standard that every backend is held to."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for q0, q1, k0, k1 in _documents(cu_seqlens_q, cu_seqlens_k, q, k):
        q_HLD, k_HLD, v_HLD = (
            x.transpose(0, 1)
            for x in (q[q0:q1], k[k0:k1].repeat_interleave(groups, 1), v[k0:k1].repeat_interleave(groups, 1))
        )
        s_HLL = (q_HLD @ k_HLD.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        mask = _mask(q1 - q0, k1 - k0, window, s_HLL)
        p_HLL = torch.softmax(s_HLL if mask is None else s_HLL + mask, -1)
        outputs.append((p_HLL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs) if outputs else q * 1.0


def _documents(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, q: torch.Tensor, k: torch.Tensor
) -> Iterator[tuple[int, int, int, int]]:
    """(q0, q1, k0, k1) of every document that has queries."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, bounds, rows in (("cu_seqlens_q", bounds_q, len(q)), ("cu_seqlens_k", bounds_k, len(k))):
        if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
            raise ValueError(f"attention: {name} must ascend from 0 to {rows}, the number of rows; it is {bounds}")
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        if q1 - q0 > k1 - k0:
            raise ValueError(f"attention: a document has {q1 - q0} queries but only {k1 - k0} keys")
        if q1 > q0:
            yield q0, q1, k0, k1


def _mask(queries: int, keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """Additive mask [queries, keys], or None where every query sees every key (a decoding step)."""
    if queries == 1 and (window is None or keys <= window):
        return None
    last = torch.arange(keys - queries, keys, device=like.device).unsqueeze(1)
    key = torch.arange(keys, device=like.device)
    hidden = key > last
    if window is not None:
        hidden |= key <= last - window
    return like.new_zeros(queries, keys).masked_fill_(hidden, float("-inf"))


# --- CPU -------------------------------------------------------------------------------------------------------------

_fused_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _pieces(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, window: int | None, q: torch.Tensor, k: torch.Tensor,
    like: torch.Tensor,
) -> Iterator[tuple[slice, slice, bool, torch.Tensor | None]]:  # fmt: skip
    """(query rows, key rows, plain causal?, mask) per call of the fused attention.

    A document longer than the window is cut into blocks of `window` queries with the keys they see: small masks, and
    work linear in its length.
    """
    for q0, q1, k0, k1 in _documents(cu_seqlens_q, cu_seqlens_k, q, k):
        shift = (k1 - k0) - (q1 - q0)
        if window is None or k1 - k0 <= window:
            mask = _mask(q1 - q0, k1 - k0, None, like) if shift else None
            yield slice(q0, q1), slice(k0, k1), not shift, mask
            continue
        for a in range(0, q1 - q0, window):
            b = min(a + window, q1 - q0)
            first, last = max(0, shift + a + 1 - window), shift + b
            yield slice(q0 + a, q0 + b), slice(k0 + first, k0 + last), False, _mask(b - a, last - first, window, like)


def _heads_first(x_LHD: torch.Tensor) -> torch.Tensor:
    return x_LHD.transpose(0, 1).unsqueeze(0)


def _fold_groups(q_LHD: torch.Tensor, groups: int) -> torch.Tensor:
    """[L, Hk*G, D] -> [1, Hk, G*L, D]: the query heads that share a kv head as rows of one attention."""
    return q_LHD.unflatten(1, (-1, groups)).permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)


def _forward_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    groups = q.shape[1] // k.shape[1]
    acc = compute_dtype(q.dtype)
    o = torch.empty(q.shape, dtype=q.dtype)
    lse_TH = torch.empty(q.shape[:2], dtype=acc)
    # Batching documents padded to similar lengths was measured no faster than one call each, and it gathers and pads.
    # bf16 is widened document by document: the fused bf16 backward was measured 1.1 to 2.8 times slower than the fp32
    # one.
    for q_rows, k_rows, causal, mask in _pieces(cu_seqlens_q, cu_seqlens_k, window, q, k, lse_TH):
        q_p, k_p, v_p = q[q_rows].to(acc), k[k_rows].to(acc), v[k_rows].to(acc)
        if causal:
            # The fused kernel skips what causality hides but knows no GQA: keys are repeated, a document at a time.
            k_p, v_p = k_p.repeat_interleave(groups, 1), v_p.repeat_interleave(groups, 1)
            o_p, lse_p = _fused_cpu(*map(_heads_first, (q_p, k_p, v_p)), 0.0, True, scale=scale)
            o[q_rows], lse_TH[q_rows] = o_p[0].transpose(0, 1), lse_p[0].transpose(0, 1)
        else:
            # Few queries against many cached keys: the keys are read where they lie, the groups become rows.
            mask = None if mask is None else mask.repeat(groups, 1)
            q_p = _fold_groups(q_p, groups)
            o_p, lse_p = _fused_cpu(q_p, _heads_first(k_p), _heads_first(v_p), 0.0, False, attn_mask=mask, scale=scale)
            o[q_rows] = o_p[0].unflatten(1, (groups, -1)).permute(2, 0, 1, 3).flatten(1, 2)
            lse_TH[q_rows] = lse_p[0].unflatten(1, (groups, -1)).permute(2, 0, 1).flatten(1, 2)
    return o, lse_TH.T.contiguous()


def _backward_cpu(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    groups = q.shape[1] // k.shape[1]
    lse_TH = lse.T.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    for q_rows, k_rows, causal, mask in _pieces(cu_seqlens_q, cu_seqlens_k, window, q, k, lse):
        do_p, q_p, o_p = (_heads_first(x[q_rows].to(lse.dtype)) for x in (do, q, o))
        k_p, v_p = (_heads_first(x[k_rows].to(lse.dtype).repeat_interleave(groups, 1)) for x in (k, v))
        dq_p, dk_p, dv_p = _fused_cpu_backward(
            do_p, q_p, k_p, v_p, o_p, lse_TH[q_rows].T.unsqueeze(0), 0.0, causal, attn_mask=mask, scale=scale
        )
        dq[q_rows] = dq_p[0].transpose(0, 1)
        for total, part in ((dk, dk_p), (dv, dv_p)):
            total[k_rows] += part[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# --- GPU: our own kernels, torch's in-tree FlashAttention-2, FlashAttention-4 ----------------------------------------


def _forward_triton(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    return attention_triton(q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale)


def _backward_triton(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    return attention_backward_triton(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, window, scale)


# The operators under torch.nn.attention.varlen, whose own signature is another one in each release since 2.11.
def _forward_torch(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, window is None, False,
        scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
    )  # fmt: skip
    return o, lse


def _backward_torch(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    unread = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is 0
    with _deterministic():
        return torch.ops.aten._flash_attention_backward(
            do.contiguous(), q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0,
            window is None, unread, unread,
            scale=scale, window_size_left=-1 if window is None else window - 1, window_size_right=0,
        )  # fmt: skip


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's in-tree backward looks at this global switch, which also fills every new tensor with NaN: not needed.
    Set below torch.use_deterministic_algorithms, which would reconfigure torch.compile as well, and put back."""
    c = torch._C
    before = c._get_deterministic_algorithms(), c._get_deterministic_algorithms_warn_only()
    fill = c._get_deterministic_fill_uninitialized_memory()
    c._set_deterministic_algorithms(True, warn_only=True)
    c._set_deterministic_fill_uninitialized_memory(False)
    try:
        yield
    finally:
        c._set_deterministic_algorithms(before[0], warn_only=before[1])
        c._set_deterministic_fill_uninitialized_memory(fill)


# FlashAttention-4 registers no operator, and its Python cannot be traced: it becomes one here.
def _forward_fa4(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    from flash_attn.cute.interface import _flash_attn_fwd

    o, lse, *_ = _flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, softmax_scale=scale, causal=True,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
        return_lse=True,
    )  # fmt: skip
    return o, lse


def _backward_fa4(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale):
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, o, do.contiguous(), lse, softmax_scale=scale, causal=True,
        window_size_left=None if window is None else window - 1, window_size_right=None if window is None else 0,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, deterministic=True,
    )  # fmt: skip
    return dq, dk, dv


# --- operators -------------------------------------------------------------------------------------------------------

_FORWARD = {
    "torch_sdpa_cpu": _forward_cpu,
    "flash_attention_4": _forward_fa4,
    "torch_varlen": _forward_torch,
    "triton": _forward_triton,
}
_BACKWARD = {
    "torch_sdpa_cpu": _backward_cpu,
    "flash_attention_4": _backward_fa4,
    "torch_varlen": _backward_torch,
    "triton": _backward_triton,
}


def _attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend):
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    return _FORWARD[backend](q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale)


def _attention_backward(
    do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend
):
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    documents = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale)
    return _BACKWARD[backend](do, q, k, v, o, lse, *documents)


_DOCUMENTS = (
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt? window, float scale, "
    "str backend"
)

_attention_op = define_op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_DOCUMENTS}) -> (Tensor, Tensor)",
    cpu=_attention,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=compute_dtype(q.dtype))),
)
_attention_backward_op = define_op(
    "attention_backward",
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_DOCUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_attention_backward,
    fake=lambda do, q, k, v, *_: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend):
        ctx.args = (max_seqlen_q, max_seqlen_k, window, scale, backend)
        o, lse = _attention_op(q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.args)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do: torch.Tensor):
        dq, dk, dv = _attention_backward_op(do, *ctx.saved_tensors, *ctx.args)
        return dq, dk, dv, None, None, None, None, None, None, None


# --- backends --------------------------------------------------------------------------------------------------------

# What the foreign ones import.
MODULES = {
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute.interface",
    "flash_attention_2": "flash_attn",
}


def _flash_attention(
    flash_attn_varlen_func, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale
):
    """FlashAttention 2 and 3 are called through their public function: it takes care of autograd, is an operator to
    torch.compile, and hands `deterministic` on, which the operator of FlashAttention-3 alone does not."""
    result = flash_attn_varlen_func(
        q, k, v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=True,
    )  # fmt: skip
    return result[0] if isinstance(result, tuple) else result


def _operator(name, q, k, v, *documents):
    return _Attention.apply(q, k, v, *documents, name)


def load_backend(name: str) -> Callable[..., torch.Tensor]:
    """The function of (q, k, v, cu_seqlens_q, cu_seqlens_k or None, max_seqlen_q, max_seqlen_k, window, scale) that
    returns o under autograd. ImportError where the backend's package is missing or broken."""
    module = importlib.import_module(MODULES[name]) if name in MODULES else None
    if name in _FORWARD:
        return partial(_operator, name)
    return partial(_flash_attention, module.flash_attn_varlen_func)  # type: ignore[union-attr]


_loaded = {name: load_backend(name) for name in _FORWARD if name not in MODULES}


def candidates(capability: tuple[int, int]) -> list[str]:
    """Backends worth trying on a GPU of this compute capability, fastest first. Hopper alone has FlashAttention-3."""
    if capability[0] == 9:
        return ["flash_attention_3", "flash_attention_4", "flash_attention_2", "torch_varlen", "triton"]
    if capability[0] >= 10:
        return ["flash_attention_4", "flash_attention_2", "torch_varlen", "triton"]
    return ["flash_attention_2", "torch_varlen", "triton"]


def _demanded_backend() -> str | None:
    """What the environment variable STEEP_ATTENTION names: taken untested, refused if it is not there."""
    name = os.environ.get("STEEP_ATTENTION")
    if not name:
        return None
    allowed = candidates((9, 0))
    if name not in allowed:
        raise ValueError(f"STEEP_ATTENTION is {name!r}; allowed: {', '.join(allowed)}")
    try:
        load_backend(name)
    except ImportError as error:
        raise ValueError(f"STEEP_ATTENTION is {name!r}, which cannot be imported: {error}") from error
    return name


def _tested_backend(device_type: str) -> str:
    from .attention_selftest import select_backend  # which imports this module

    device = torch.device(device_type, torch.cuda.current_device())
    return select_backend(candidates(torch.cuda.get_device_capability(device)), device)


# --- public ----------------------------------------------------------------------------------------------------------

_selected: dict[str, str] = {}


def attention_backend(device_type: str) -> str:
    """Name of the backend that `attention` uses on "cuda" or "cpu", chosen once per process: for manifests and logs.

    The environment variable STEEP_ATTENTION=name overrules the choice on a GPU, without a self-test.
    """
    if device_type not in _selected:
        name = "torch_sdpa_cpu" if device_type == "cpu" else _demanded_backend() or _tested_backend(device_type)
        _loaded[name] = load_backend(name)
        _selected[device_type] = name
    return _selected[device_type]


# As torch.compiler.assume_constant_result marks it, which would import torch._dynamo: two seconds of every start.
attention_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    *,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention within each document of a packed batch -> o [Tq, Hq, D] in q's dtype.

    Args:
        q, k, v: [Tq, Hq, D], [Tk, Hk, D], [Tk, Hk, D], Hq a multiple of Hk; bf16, fp16, fp32, or on a CPU fp64; all on
            one device; any strides, so views of a fused projection too.
        cu_seqlens_q, cu_seqlens_k: int32 [N + 1] on q's device, ascending from 0 to Tq and to Tk; documents may be
            empty, trailing ones (the last value repeated) in particular. cu_seqlens_k defaults to cu_seqlens_q. A
            document with fewer queries than keys (a KV cache) is aligned bottom-right: its last query sees the last.
        max_seqlen_q, max_seqlen_k: Python ints, at least the longest document; max_seqlen_k goes with cu_seqlens_k.
        window: each query sees the last `window` keys, its own included; None for all.
        scale: factor of the scores, above 0; default D ** -0.5.

    Raises:
        ValueError: naming the argument that is none of this. The values in cu_seqlens are looked at on a CPU only: on a
            GPU that would be a synchronisation.
    """
    check_tensor("attention: q", q, (None, None, None), dtype=float_dtypes(q))
    check_tensor("attention: k", k, (None, None, q.shape[2]), like=q)
    check_tensor("attention: v", v, tuple(k.shape), like=q)
    if not q.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q has shape {tuple(q.shape)} and k {tuple(k.shape)}; the heads of q must be a multiple of k's"
        )
    _check_lengths("q", cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # torch.compile refuses one tensor as two inputs of an autograd.Function
        max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"attention: q has {q.shape[0]} rows and k {k.shape[0]}; cu_seqlens_k is needed")
    else:
        max_seqlen_k = _check_lengths("k", cu_seqlens_k, max_seqlen_k, q)
        check_tensor("attention: cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape))
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; it counts the query's own key: at least 1, or None")
    if window is not None and window >= max_seqlen_k:
        window = None  # it hides nothing, and without one the kernels are faster
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"attention: scale is {scale}; expected a number above 0")

    backend = attention_backend(q.device.type)
    if q.is_cuda and (q.dtype == torch.float32 or q.shape[2] > 128 or q.shape[2] % 8 or not q.shape[0]):
        backend = "triton"  # the others take 16-bit rows, are tested for head dimensions to 128, and want some rows
    return _loaded[backend](q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale)


def _check_lengths(which: str, cu_seqlens: torch.Tensor, max_seqlen: int | None, q: torch.Tensor) -> int:
    check_tensor(f"attention: cu_seqlens_{which}", cu_seqlens, (None,), dtype=torch.int32, like=q)
    if not cu_seqlens.shape[0] or not cu_seqlens.is_contiguous():
        entries = f"{cu_seqlens.shape[0]} entries at stride {cu_seqlens.stride(0)}"
        raise ValueError(f"attention: cu_seqlens_{which} has {entries}; expected N + 1, contiguous")
    if not isinstance(max_seqlen, (int, torch.SymInt)):
        raise ValueError(f"attention: max_seqlen_{which} is {max_seqlen!r}; expected a Python int")
    return max_seqlen  # type: ignore[return-value]
