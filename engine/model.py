"""The decoder of llama, mistral, mixtral, qwen2 and qwen3, on packed sequences. Reads top to bottom; no parallelism.

Input is flat: T tokens of N sequences end to end, no batch dimension, no padding. `cu_seqlens` [N+1] says where each
begins, `positions` [T] where each token stands in its own. Parameters keep Hugging Face's layouts; q|k|v, gate|up and
the experts are concatenated by rows, so every tensor of the folder is a contiguous part of one parameter. Uses kernels,
config, rope and cache only.

Shape suffixes: T tokens, D hidden size, Q query heads, K key/value heads, H head size, S all heads of q, k and v, F
width of an MLP, E experts, A active experts of a token, V vocabulary, C all tokens of the sequences, cached and new; R
some rows of T.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ..kernels import (
    FusedLMHead,
    NeftuneNoise,
    add_rms_norm,
    attention,
    embedding,
    fp8_linear,
    linear,
    linear_cross_entropy,
    moe_experts,
    rms_norm_linear,
    rope_qkv,
    route,
    swiglu,
    swiglu_linear,
)
from .cache import KVCache
from .config import ModelConfig
from .rope import RopeTables

Recompute = Literal["none", "selective", "full"]
Float8 = Literal["blockwise", "rowwise"]
Routing = tuple[Tensor, Tensor]  # of one layer: router logits [T, E], experts i32 [T, A] chosen by them, best first


class Packing:
    """Where the tokens of a pass stand, the same for all layers: arguments of `Decoder.forward` and the rotary tables.

    Neither a tuple nor a dataclass: FSDP2 would look into those and round the fp32 tables to its parameter dtype.
    """

    def __init__(
        self,
        positions: Tensor,
        tables: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None,
    ) -> None:
        self.positions, self.tables = positions, tables
        self.cu_seqlens, self.max_seqlen = cu_seqlens, max_seqlen
        self.cache = cache


class RMSNorm(nn.Module):
    """The scale of a norm; whoever owns it applies it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Experts(nn.Module):
    """SwiGLU experts, stacked by rows: expert e is rows [e 2F, (e+1) 2F) of gate_up, gate first, and [e D, (e+1) D) of
    down. Matrices rather than [E, *, *], so that shards of rows are even for any number of ranks."""

    def __init__(self, num_experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts * 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(num_experts * hidden, width))

    def forward(self, x_TD: Tensor, weights_TA: Tensor, experts_TA: Tensor, recompute: bool) -> Tensor:
        gate_up_E2FD, down_EDF = (w.unflatten(0, (self.num_experts, -1)) for w in (self.gate_up, self.down))
        return moe_experts(x_TD, weights_TA, experts_TA, gate_up_E2FD, down_EDF, recompute=recompute)


class Layer(nn.Module):
    """norm -> attention -> norm -> SwiGLU, or a mixture of them. The residual stream is carried beside the output of
    the last branch, so that the addition of one branch and the norm before the next are one kernel."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.window = config.layer_windows[index]
        self.eps = config.rms_norm_eps
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.experts_per_token = config.num_experts_per_tok
        self.recompute: Recompute = "none"
        self.float8: Float8 | None = None

        hidden, attended = config.hidden_size, config.num_attention_heads * config.head_dim
        self.input_norm = RMSNorm(hidden)
        self.qkv = nn.Linear(
            hidden, attended + 2 * config.num_key_value_heads * config.head_dim, bias=config.attention_bias
        )
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.o = nn.Linear(attended, hidden, bias=config.o_bias)
        self.post_norm = RMSNorm(hidden)
        if config.num_local_experts is None:
            self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
            self.down = nn.Linear(config.intermediate_size, hidden, bias=False)
        else:
            self.router = nn.Linear(hidden, config.num_local_experts, bias=False)
            self.experts = Experts(config.num_local_experts, hidden, config.intermediate_size)

    def forward(
        self, branch_TD: Tensor, residual_TD: Tensor | None, packing: Packing
    ) -> tuple[Tensor, Tensor, Routing | None]:
        """(output of this layer's last branch, residual stream before it, routing), from the first two of the layer
        before; the first layer has no residual, the embedding is the stream."""
        if self.recompute != "full" or not torch.is_grad_enabled():
            return self._layer(branch_TD, residual_TD, packing)
        # The stream is all that is kept, so the addition is done out here. Nothing in a layer draws random numbers.
        stream_TD = branch_TD if residual_TD is None else branch_TD + residual_TD
        return checkpoint(self._layer, stream_TD, None, packing, use_reentrant=False, preserve_rng_state=False)

    def _layer(
        self, branch_TD: Tensor, residual_TD: Tensor | None, packing: Packing
    ) -> tuple[Tensor, Tensor, Routing | None]:
        branch_TD, residual_TD = self._attention(branch_TD, residual_TD, packing)
        if self.experts_per_token is None:
            return *self._mlp(branch_TD, residual_TD), None
        return self._mixture(branch_TD, residual_TD, self.experts_per_token)

    def _attention(self, branch_TD: Tensor, residual_TD: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor]:
        qkv_TS, residual_TD = self._norm_project(branch_TD, residual_TD, self.input_norm, self.qkv)
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.eps}
        # q, k and v are views of the one buffer, where q and k are rotated in place (new where they have norms)
        q_TQH, k_TKH, v_TKH = rope_qkv(qkv_TS, *packing.tables, packing.positions, *self.heads, **norms)
        lengths, cache = (packing.cu_seqlens, packing.max_seqlen), packing.cache
        if cache is None:
            o_TQH = attention(q_TQH, k_TKH, v_TKH, *lengths, window=self.window)
        else:
            k_CKH, v_CKH = cache.extend(self.index, k_TKH, v_TKH)
            o_TQH = attention(
                *(q_TQH, k_CKH, v_CKH, *lengths),
                cu_seqlens_k=cache.cu_seqlens_k,
                max_seqlen_k=cache.max_seqlen_k,
                window=self.window,
            )
        return self._project(o_TQH.flatten(1), self.o), residual_TD

    def _mlp(self, branch_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        gate_up_T2F, residual_TD = self._norm_project(branch_TD, residual_TD, self.post_norm, self.gate_up)

        def again() -> Tensor:
            return self._norm_project(residual_TD, None, self.post_norm, self.gate_up)[0]

        selective = self.recompute == "selective" and torch.is_grad_enabled()
        with _not_saved(gate_up_T2F.shape, again) if selective else nullcontext():
            if self.float8 is None and self.recompute != "full":
                return swiglu_linear(gate_up_T2F, self.down.weight), residual_TD
            h_TF = swiglu(gate_up_T2F)
        # Of a checkpointed layer h is the last that backward waits for, and torch's product saves it before it
        # multiplies: there the recomputation ends, without the product.
        return self._project(h_TF, self.down), residual_TD

    def _mixture(self, branch_TD: Tensor, residual_TD: Tensor, active: int) -> tuple[Tensor, Tensor, Routing]:
        x_TD, residual_TD = add_rms_norm(branch_TD, residual_TD, self.post_norm.weight, self.eps)
        logits_TE = linear(x_TD, self.router.weight)
        weights_TA, experts_TA = route(logits_TE, active)
        branch_TD = self.experts(x_TD, weights_TA, experts_TA, recompute=self.recompute == "selective")
        return branch_TD, residual_TD, (logits_TE, experts_TA)

    def _norm_project(
        self, x_TD: Tensor, residual_TD: Tensor | None, norm: RMSNorm, matrix: nn.Linear
    ) -> tuple[Tensor, Tensor]:
        """(projection of norm(s), s), s the stream x + residual, or x where there is no residual."""
        if self.float8 is not None:
            y_TD, s_TD = add_rms_norm(x_TD, residual_TD, norm.weight, self.eps)
            return self._project(y_TD, matrix), s_TD
        result = rms_norm_linear(
            *(x_TD, norm.weight, matrix.weight, matrix.bias), eps=self.eps, residual=residual_TD, return_sum=True
        )
        assert isinstance(result, tuple)
        return result

    def _project(self, x: Tensor, matrix: nn.Linear) -> Tensor:
        if self.float8 is not None:
            return fp8_linear(x, matrix.weight, matrix.bias, recipe=self.float8)
        return linear(x, matrix.weight, matrix.bias)


def _not_saved(shape: torch.Size, compute: Callable[[], Tensor]) -> saved_tensors_hooks:
    """Hooks under which a tensor of this shape is not kept for backward, which calls `compute` for it instead."""

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    return saved_tensors_hooks(lambda tensor: compute if tensor.shape == shape else tensor, unpack)


class Decoder(nn.Module):
    """A causal language model. Built with memory for its weights but no values that mean anything, best under
    `torch.device("meta")`: `weights.load_weights` or `init_weights` fills it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.lm_head = None if config.tie_word_embeddings else FusedLMHead(config.hidden_size, config.vocab_size)
        self.rope_tables = RopeTables(config)
        self._recompute: Recompute = "none"
        self._float8: Float8 | None = None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
        *,
        noise: NeftuneNoise | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm [T, D], in the dtype of the weights.

        tokens: integers [T]; positions: integers [T], each below the length of the longest sequence; cu_seqlens: int32
        [N+1], may be padded by repeating T; max_seqlen: at least the longest sequence among these tokens. With a
        `cache` on which `branch` was called for these tokens, every sequence continues what is cached. `noise` is added
        to the embeddings. To `routing` that of each layer is appended (mixtures of experts only): what a load-balancing
        loss, through which the router learns, and counts of tokens per expert are made of.
        ValueError if a sequence is longer than max_position_embeddings.
        """
        tables = self.rope_tables.get(max_seqlen if cache is None else cache.max_seqlen_k, tokens.device)
        packing = Packing(positions, tables, cu_seqlens, max_seqlen, cache)
        branch_TD = embedding(tokens, self.embed_tokens.weight, noise=noise)
        residual_TD: Tensor | None = None
        for layer in self.layers:
            branch_TD, residual_TD, routed = layer(branch_TD, residual_TD, packing)
            if routing is not None and routed is not None:
                routing.append(routed)
        return add_rms_norm(branch_TD, residual_TD, self.norm.weight, self.config.rms_norm_eps)[0]

    def loss(self, hidden_TD: Tensor, labels: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """(loss, nll [T]) of `forward`'s result and labels int64 [T]: `kernels.linear_cross_entropy`, options as there,
        inside the module that owns the head, where its hooks see to its weight; the logits are never held at once."""
        if self.lm_head is None:
            return linear_cross_entropy(hidden_TD, self.embed_tokens.weight, labels, **options)
        return self.lm_head(hidden_TD, labels, **options)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of some rows of `forward`'s result. Training and scoring do not need them: see `loss`."""
        if self.lm_head is None:
            return linear(hidden_RD, self.embed_tokens.weight).float()
        return self.lm_head.logits(hidden_RD).float()

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] from hidden states to logits; the embedding where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def recompute(self) -> Recompute:
        """What backward computes again instead of keeping it; the gradients are the same to the bit.

        "none". "selective": gate and up projections, most of a layer's memory for a sixth more FLOPs or so. "full": all
        of a layer but its input. `memory.saved_bytes_per_token` has the figures.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, value: Recompute) -> None:
        if value not in get_args(Recompute):
            raise ValueError(f"recompute is {value!r}; allowed: {', '.join(get_args(Recompute))}")
        self._recompute = value
        layer: Any
        for layer in self.layers:
            layer.recompute = value

    @property
    def float8(self) -> Float8 | None:
        """Scaling of float8 operands in the projections of all layers (`kernels.fp8_linear`), None for the dtype of the
        weights. Embedding, head, router and experts never are float8. A CPU emulates it, slowly."""
        return self._float8

    @float8.setter
    def float8(self, value: Float8 | None) -> None:
        if value is not None:  # names what the device lacks
            fp8_linear(*(torch.zeros(1, 1, device=self.norm.weight.device) for _ in range(2)), recipe=value)
        self._float8 = value
        layer: Any
        for layer in self.layers:
            layer.float8 = value

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Random weights for training from scratch: normal with `std` for matrices, 0 for biases, 1 for norms."""
        generator = torch.Generator(self.norm.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
