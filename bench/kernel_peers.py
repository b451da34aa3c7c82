"""The peers of `steep bench kernels`, each called as its own documentation says, on the inputs of our case.

Every function returns {peer: function of the case's inputs}, without those that are not installed. Whatever fails at
the call itself (no GPU, a shape that a peer does not take) is reported by the caller. May touch: liger_kernel,
cut_cross_entropy, quack, flash_attn, flash_attn_interface where they are importable.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peers = dict[str, Callable[..., Any]]


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def rms_norm(eps: float) -> Peers:
    found: Peers = {}
    if _installed("liger_kernel"):

        def liger(x: Tensor, weight: Tensor) -> Tensor:
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            # in place, its default, would overwrite the gradient that is measured with
            return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

        found["liger"] = liger
    if _installed("quack"):

        def quack(x: Tensor, weight: Tensor) -> Tensor:
            from quack.rmsnorm import rmsnorm

            return rmsnorm(x, weight, eps=eps)

        found["quack"] = quack
    return found


def add_rms_norm(eps: float) -> Peers:
    found: Peers = {}
    if _installed("liger_kernel"):

        def liger(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

            return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

        found["liger"] = liger
    if _installed("quack"):

        def quack(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            from quack.rmsnorm import rmsnorm

            y, s = rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)
            return y, s

        found["quack"] = quack
    return found


def swiglu() -> Peers:
    if not _installed("liger_kernel"):
        return {}

    def liger(gate_up: Tensor) -> Tensor:
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

        return LigerFusedGateUpSiLUMulFunction.apply(gate_up, False)

    return {"liger": liger}


def rope(
    cos: Tensor, sin: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int, heads: list[int], head_dim: int
) -> Peers:
    """Liger knows no packing: it gets the rows of the tables gathered by position, outside the measurement, and q and k
    as transformers lays them out, [B, heads, T, D] seen through a transposition."""
    found: Peers = {}
    if _installed("liger_kernel"):
        rows_cos, rows_sin = (torch.cat([table[positions.long()]] * 2, -1)[None] for table in (cos, sin))

        def liger(qkv: Tensor) -> tuple[Tensor, ...]:
            from liger_kernel.ops.rope import LigerRopeFunction

            q, k, v = qkv.unflatten(1, (-1, head_dim)).split(heads, dim=1)
            heads_first = (x.unsqueeze(0).transpose(1, 2) for x in (q, k))
            q, k = LigerRopeFunction.apply(*heads_first, rows_cos.to(qkv.dtype), rows_sin.to(qkv.dtype))
            return q.transpose(1, 2).squeeze(0), k.transpose(1, 2).squeeze(0), v

        found["liger"] = liger
    if _installed("quack"):

        def quack(qkv: Tensor) -> tuple[Tensor, ...]:
            from quack.rotary import apply_rotary_emb_qkv_

            qkv = qkv.clone() if qkv.requires_grad and torch.is_grad_enabled() else qkv
            rotated = apply_rotary_emb_qkv_(
                qkv, cos.to(qkv.dtype), sin.to(qkv.dtype), num_heads_q=heads[0], cu_seqlens=cu_seqlens,
                max_seqlen=longest, headdim=head_dim,
            )  # fmt: skip
            return rotated.unflatten(1, (-1, head_dim)).split(heads, dim=1)

        found["quack"] = quack
    return found


def moe(top_k: int) -> Peers:
    if not _installed("liger_kernel"):
        return {}

    def liger(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        weights, chosen = torch.softmax(logits.float(), -1).topk(top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        return LigerFusedMoEFunction.apply(x, gate_up, down, chosen.int(), weights)

    return {"liger": liger}


def linear_cross_entropy(labels: Tensor) -> Peers:
    found: Peers = {}
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = lambda x, weight: F.linear_cross_entropy(x, weight, labels, reduction="sum")
    if _installed("liger_kernel"):

        def liger(x: Tensor, weight: Tensor) -> Tensor:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return liger_fused_linear_cross_entropy(x, weight, labels, reduction="sum")

        found["liger"] = liger
    if _installed("cut_cross_entropy"):

        def cce(x: Tensor, weight: Tensor) -> Tensor:
            from cut_cross_entropy import linear_cross_entropy

            return linear_cross_entropy(x, weight, labels, reduction="sum")

        found["cut_cross_entropy"] = cce
    if _installed("quack"):

        def quack(x: Tensor, weight: Tensor) -> Tensor:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            return chunked_linear_cross_entropy(x, weight, labels, reduction="sum")

        found["quack"] = quack
    return found


def attention(cu_seqlens: Tensor, longest: int, window: int | None, documents: int) -> Peers:
    """torch's fused attention on documents of one length, spared padding; and the back-ends called directly."""
    found: Peers = {}
    if window is None:

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in (q, k, v))
            return (
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
            )

        found["eager"] = sdpa
    shared = {
        "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest, "max_seqlen_k": longest,
        "causal": True,
    }  # fmt: skip
    for name, package, module, everything in (
        ("flash_attention_3", "flash_attn_interface", "flash_attn_interface", -1),
        ("flash_attention_4", "flash_attn.cute", "flash_attn.cute", None),
        ("flash_attention_2", "flash_attn_2_cuda", "flash_attn", -1),
    ):
        if not _installed(package):
            continue
        limits = (everything, everything) if window is None else (window - 1, 0)

        def flash(q: Tensor, k: Tensor, v: Tensor, module: str = module, limits: tuple = limits) -> Tensor:
            from importlib import import_module

            result = import_module(module).flash_attn_varlen_func(
                q, k, v, **shared, window_size=limits, deterministic=True
            )
            return result[0] if isinstance(result, tuple) else result

        found[name] = flash
    return found
