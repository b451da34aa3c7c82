"""Packed causal attention with GQA and a sliding window: dispatch between backends, operators, and the CPU path.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j      over the keys j that query i of the same document sees:
    j <= i + (nk - nq)   (causal, aligned bottom-right)      and      j > i + (nk - nq) - window

Floor: 4*D FLOPs per visible (query, key, head) forward, 10*D backward; q, k, v, o and one fp32 lse per row and head
are saved. Source: FlashAttention-2, arXiv:2307.08691. `window` counts as Hugging Face's sliding_window does: the
query's own key included.

On a GPU the work is done by the first of FlashAttention-3, FlashAttention-4, FlashAttention-2, torch's varlen_attn
and the Triton kernels of attention_triton.py that is importable and agrees with `attention_reference` in a start-up
self-test, always with a deterministic backward. On a CPU each document is one call of torch's fused attention on
views of the packed tensors. May touch: torch, triton; flash_attn and flash_attn_interface where they are installed.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable

from ._op import compute_dtype, define_op
from .attention_triton import attention_backward_triton, attention_triton

# --- the formula -----------------------------------------------------------------------------------------------------


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    window: int | None = None, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """The formula itself, with whole score matrices, in the dtype of q: the standard that every backend is held to."""
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for q0, q1, k0, k1 in _documents(cu_seqlens_q, cu_seqlens_k):
        q_HLD, k_HLD, v_HLD = (
            x.transpose(0, 1)
            for x in (q[q0:q1], k[k0:k1].repeat_interleave(groups, 1), v[k0:k1].repeat_interleave(groups, 1))
        )
        s_HLL = (q_HLD @ k_HLD.transpose(1, 2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        mask = _mask(q1 - q0, k1 - k0, window, s_HLL)
        p_HLL = torch.softmax(s_HLL if mask is None else s_HLL + mask, -1)
        outputs.append((p_HLL @ v_HLD).transpose(0, 1))
    return torch.cat(outputs) if outputs else q * 1.0


def _documents(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
    """(q0, q1, k0, k1) of every document that has queries."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
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
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, window: int | None, like: torch.Tensor
) -> Iterator[tuple[slice, slice, bool, torch.Tensor | None]]:
    """(query rows, key rows, plain causal?, mask) per call of the fused attention.

    A document longer than the window is cut into blocks of `window` queries with the keys they see: small masks, and
    work linear in its length.
    """
    for q0, q1, k0, k1 in _documents(cu_seqlens_q, cu_seqlens_k):
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


def _attention_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend):
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    groups = q.shape[1] // k.shape[1]
    acc = compute_dtype(q.dtype)
    o = torch.empty(q.shape, dtype=q.dtype)
    lse_TH = torch.empty(q.shape[:2], dtype=acc)
    # Batching documents padded to similar lengths was measured no faster than one call each, and it gathers and pads.
    # bf16 is widened document by document: the fused bf16 backward was measured 1.1 to 2.8 times slower than the fp32
    # one.
    for q_rows, k_rows, causal, mask in _pieces(cu_seqlens_q, cu_seqlens_k, window, lse_TH):
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


def _attention_backward_cpu(
    do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend
):
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    groups = q.shape[1] // k.shape[1]
    lse_TH = lse.T.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    for q_rows, k_rows, causal, mask in _pieces(cu_seqlens_q, cu_seqlens_k, window, lse):
        do_p, q_p, o_p = (_heads_first(x[q_rows].to(lse.dtype)) for x in (do, q, o))
        k_p, v_p = (_heads_first(x[k_rows].to(lse.dtype).repeat_interleave(groups, 1)) for x in (k, v))
        dq_p, dk_p, dv_p = _fused_cpu_backward(
            do_p, q_p, k_p, v_p, o_p, lse_TH[q_rows].T.unsqueeze(0), 0.0, causal, attn_mask=mask, scale=scale
        )
        dq[q_rows] = dq_p[0].transpose(0, 1)
        for total, part in ((dk, dk_p), (dv, dv_p)):
            total[k_rows] += part[0].unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# --- CUDA: our own kernels, and torch's in-tree FlashAttention-2 with its backward made deterministic --------------


def _varlen_window(window: int | None) -> list[int]:
    return [-1, 0] if window is None else [window - 1, 0]


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's in-tree backward looks at this global switch; it is put back as it was."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _attention_cuda(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend):
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if backend == "triton":
        return attention_triton(q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale)
    o, lse, _ = torch.ops.torch_attn._varlen_attn(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        window is None, scale, _varlen_window(window), q.shape[1] != k.shape[1],
    )  # fmt: skip
    return o, lse


def _attention_backward_cuda(
    do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale, backend
):
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    if backend == "triton":
        return attention_backward_triton(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, window, scale)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
    with _deterministic():
        return torch.ops.torch_attn._varlen_attn_backward(
            do.contiguous(), q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            window is None, no_dropout, scale, _varlen_window(window),
        )  # fmt: skip


# --- operators -------------------------------------------------------------------------------------------------------

_DOCUMENTS = (
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt? window, float scale, "
    "str backend"
)

_attention_op = define_op(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, {_DOCUMENTS}) -> (Tensor, Tensor)",
    cpu=_attention_cpu,
    cuda=_attention_cuda,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=compute_dtype(q.dtype))),
)
_attention_backward_op = define_op(
    "attention_backward",
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, {_DOCUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_attention_backward_cpu,
    cuda=_attention_backward_cuda,
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
# Each takes (q, k, v, cu_seqlens_q, cu_seqlens_k or None, max_seqlen_q, max_seqlen_k, window, scale) and returns o
# under autograd. Keyword arguments throughout: the fourth positional one is not the same in FlashAttention 2, 3 and 4.


def _flash_arguments(no_window, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale) -> dict:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": scale,
        "causal": True,
        "window_size": (no_window, no_window) if window is None else (window - 1, 0),
        "deterministic": True,
    }


def _flash_attention_3(q, k, v, *documents) -> torch.Tensor:
    from flash_attn_interface import flash_attn_varlen_func

    return _output(flash_attn_varlen_func(q, k, v, **_flash_arguments(-1, *documents)))


def _flash_attention_4(q, k, v, *documents) -> torch.Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    return _output(flash_attn_varlen_func(q, k, v, **_flash_arguments(None, *documents)))


def _flash_attention_2(q, k, v, *documents) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    return _output(flash_attn_varlen_func(q, k, v, **_flash_arguments(-1, *documents)))


def _torch_varlen(q, k, v, *documents) -> torch.Tensor:
    import torch.nn.attention.varlen  # noqa: F401 - registers torch_attn::_varlen_attn

    return _Attention.apply(q, k, v, *documents, "torch_varlen")


def _triton(q, k, v, *documents) -> torch.Tensor:
    return _Attention.apply(q, k, v, *documents, "triton")


def _output(result: torch.Tensor | tuple) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


_BACKENDS: dict[str, Callable[..., torch.Tensor]] = {
    "flash_attention_3": _flash_attention_3,
    "flash_attention_4": _flash_attention_4,
    "flash_attention_2": _flash_attention_2,
    "torch_varlen": _torch_varlen,
    "triton": _triton,
}


def _candidates(capability: tuple[int, int]) -> list[str]:
    """Backends worth trying on a GPU of this compute capability, fastest first. Hopper alone has FlashAttention-3."""
    if capability[0] == 9:
        return ["flash_attention_3", "flash_attention_4", "flash_attention_2", "torch_varlen", "triton"]
    if capability[0] >= 10:
        return ["flash_attention_4", "flash_attention_2", "torch_varlen", "triton"]
    return ["flash_attention_2", "torch_varlen", "triton"]


def select_backend(device: torch.device, capability: tuple[int, int]) -> str:
    """The first candidate that is importable and passes the self-test; one that fails it is named in a warning."""
    for name in _candidates(capability):
        try:
            complaint = _self_test(_BACKENDS[name], device)
        except ImportError:
            continue
        except Exception as error:  # whatever a foreign package throws, the next backend is asked
            complaint = f"{type(error).__name__}: {error}"
        if complaint is None:
            return name
        warnings.warn(f"attention backend {name} is passed over: {complaint}", RuntimeWarning, stacklevel=2)
    raise RuntimeError(f"no attention backend works on {device}; the warnings above say why each was passed over")


def _self_test(backend: Callable[..., torch.Tensor], device: torch.device) -> str | None:
    """None, or what is wrong with the backend on tiny packed batches: GQA, one-token, empty and cached documents."""
    for window in (None, 1, 16):
        for cached in (0, 9):
            complaint = _disagreement(backend, device, window, cached)
            if complaint is not None:
                return f"{complaint} (window {window}, {cached} cached keys)"
    return None


def _disagreement(
    backend: Callable[..., torch.Tensor], device: torch.device, window: int | None, cached: int
) -> str | None:
    queries = torch.tensor([1, 37, 70, 1, 0])
    keys = queries + torch.tensor([0, 1, 1, 1, 0]) * cached
    cu_q, cu_k = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).int().to(device) for n in (queries, keys))
    rows_q, rows_k = int(queries.sum()), int(keys.sum())
    generator = torch.Generator().manual_seed(0)
    do, q, k, v = (
        torch.randn(rows, heads, 64, generator=generator).bfloat16().to(device)
        for rows, heads in ((rows_q, 4), (rows_q, 4), (rows_k, 2), (rows_k, 2))
    )

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return backend(q, k, v, cu_q, cu_k, int(queries.max()), int(keys.max()), window, 0.125)

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention_reference(q, k, v, cu_q, cu_k, window, 0.125)

    first, second = (_with_gradients(run, do, q, k, v) for _ in range(2))
    _wait(backend.__name__, device)
    expected = _with_gradients(reference, *(x.float() for x in (do, q, k, v)))
    for name, got, again, want in zip(("o", "dq", "dk", "dv"), first, second, expected):
        error = ((got.float() - want).norm() / want.norm().clamp(min=1.0)).item()
        if not error < 0.02:
            return f"{name} differs from the reference by {error:.2g}"
        if not torch.equal(got, again):
            return f"{name} differs between two runs"
    return None


def _with_gradients(
    function: Callable[..., torch.Tensor], do: torch.Tensor, *inputs: torch.Tensor
) -> list[torch.Tensor]:
    with torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        o = function(*inputs)
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]


def _wait(backend: str, device: torch.device, seconds: float = 60.0) -> None:
    """Wait for the device, but not for ever: some releases of FlashAttention are known to hang on empty documents."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > deadline:
            raise SystemExit(f"attention: the self-test of backend {backend} hangs on {device}; uninstall that backend")
        time.sleep(0.001)


# --- public ----------------------------------------------------------------------------------------------------------

_selected: dict[str, str] = {}


@torch.compiler.assume_constant_result
def attention_backend(device_type: str) -> str:
    """Name of the backend that `attention` uses on "cuda" or "cpu", chosen once per process: for manifests and logs."""
    if device_type == "cpu":
        return "torch_sdpa_cpu"
    if device_type not in _selected:
        device = torch.device(device_type, torch.cuda.current_device())
        _selected[device_type] = select_backend(device, torch.cuda.get_device_capability(device))
    return _selected[device_type]


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

    q [Tq, Hq, D]; k, v [Tk, Hk, D], Hq a multiple of Hk; unit stride along D, any strides along the others.
    cu_seqlens_q, cu_seqlens_k (default: the same) int32 [N+1] on q's device, ascending from 0 to Tq and Tk; trailing
    empty documents (the last value repeated) are allowed. max_seqlen_q, max_seqlen_k: longest document, Python ints.
    A document with fewer queries than keys (a KV cache) is aligned bottom-right: its last query sees its last key.
    window: each query sees the last `window` keys, its own included; None for all. scale: default D ** -0.5.
    More queries than keys in a document: ValueError on a CPU, not checked on a GPU (it would be a synchronisation).
    """
    if q.ndim != 3 or k.shape != v.shape or k.shape[2] != q.shape[2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not agree; "
            "expected [Tq, Hq, D], [Tk, Hk, D], [Tk, Hk, D] with Hq a multiple of Hk"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window}; it counts the query's own key: at least 1, or None")
    if cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # torch.compile refuses one tensor as two inputs of an autograd.Function
    max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    documents = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, scale)
    backend = attention_backend(q.device.type)
    if backend == "torch_sdpa_cpu":
        return _Attention.apply(q, k, v, *documents, backend)
    # The tuned backends take 16-bit inputs and head dimensions up to 256 in steps of 8; the rest is ours.
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[2] > 256 or q.shape[2] % 8:
        backend = "triton"
    return _BACKENDS[backend](q, k, v, *documents)
