"""The decoder of llama, mistral, qwen2 and qwen3, on packed sequences. Reads top to bottom; contains no parallelism.

Input is flat: T tokens of N sequences end to end, no batch dimension, no padding. `cu_seqlens` [N+1] says where each
begins, `positions` [T] where each token stands in its own. Parameters keep Hugging Face's layouts; q|k|v and gate|up
are concatenated by rows, so any row range can be sliced out again. Uses kernels, config, rope and cache only.

Shape suffixes: T tokens, D hidden size, Q query heads, K key/value heads, H head size, S all heads of q, k and v,
V vocabulary, C all tokens of the sequences, cached and new; R some rows of T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import add_rms_norm, attention, linear, rms_norm, rope, swiglu
from .cache import KVCache
from .config import ModelConfig
from .rope import RopeTables


class RMSNorm(nn.Module):
    """The scale of a norm; `kernels.rms_norm` or `kernels.add_rms_norm` applies it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Layer(nn.Module):
    """norm -> attention -> norm -> SwiGLU. The residual stream is carried beside the output of the last branch, so that
    the addition of one branch and the norm before the next are one kernel."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.window = config.layer_windows[index]
        self.eps = config.rms_norm_eps
        self.head_dim = config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]  # of q, k, v

        hidden, attended = config.hidden_size, config.num_attention_heads * config.head_dim
        self.input_norm = RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, sum(self.heads) * config.head_dim, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.o = nn.Linear(attended, hidden, bias=config.o_bias)
        self.post_norm = RMSNorm(hidden)
        self.gate_up = nn.Linear(hidden, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, hidden, bias=False)

    def forward(
        self,
        branch_TD: Tensor,
        residual_TD: Tensor | None,
        positions: Tensor,
        tables: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """(output of this layer's last branch, residual stream before it), from those of the layer before."""
        if residual_TD is None:  # first layer: the embedding is the stream
            x_TD, residual_TD = rms_norm(branch_TD, self.input_norm.weight, self.eps), branch_TD
        else:
            x_TD, residual_TD = add_rms_norm(branch_TD, residual_TD, self.input_norm.weight, self.eps)

        # views of one buffer: nothing is copied until the rotation writes q and k
        qkv_TSH = linear(x_TD, self.qkv.weight, self.qkv.bias).unflatten(-1, (-1, self.head_dim))
        q_TQH, k_TKH, v_TKH = qkv_TSH.split(self.heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_TQH = rms_norm(q_TQH, self.q_norm.weight, self.eps)
            k_TKH = rms_norm(k_TKH, self.k_norm.weight, self.eps)
        q_TQH, k_TKH = rope(q_TQH, k_TKH, *tables, positions)
        if cache is None:
            o_TQH = attention(q_TQH, k_TKH, v_TKH, cu_seqlens, max_seqlen, window=self.window)
        else:
            k_CKH, v_CKH = cache.extend(self.index, k_TKH, v_TKH)
            o_TQH = attention(
                *(q_TQH, k_CKH, v_CKH, cu_seqlens, max_seqlen),
                cu_seqlens_k=cache.cu_seqlens_k,
                max_seqlen_k=cache.max_seqlen_k,
                window=self.window,
            )
        branch_TD = linear(o_TQH.flatten(1), self.o.weight, self.o.bias)

        x_TD, residual_TD = add_rms_norm(branch_TD, residual_TD, self.post_norm.weight, self.eps)
        return linear(swiglu(linear(x_TD, self.gate_up.weight)), self.down.weight), residual_TD


class Decoder(nn.Module):
    """A causal language model. Built with memory for its weights but no values that mean anything, best under
    `torch.device("meta")`: `weights.load_weights` or `init_weights` fills it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rope_tables = RopeTables(config)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the final norm [T, D], in the dtype of the weights.

        tokens: integers [T]; positions: integers [T], each below the length of the longest sequence; cu_seqlens: int32
        [N+1], may be padded by repeating T; max_seqlen: at least the longest sequence among these tokens. With a
        `cache` on which `branch` was called for these tokens, every sequence continues what is cached.
        ValueError if a sequence is longer than max_position_embeddings.
        """
        tables = self.rope_tables.get(max_seqlen if cache is None else cache.max_seqlen_k, tokens.device)
        branch_TD: Tensor = self.embed_tokens(tokens)
        residual_TD: Tensor | None = None
        for layer in self.layers:
            branch_TD, residual_TD = layer(branch_TD, residual_TD, positions, tables, cu_seqlens, max_seqlen, cache)
        assert residual_TD is not None
        return add_rms_norm(branch_TD, residual_TD, self.norm.weight, self.config.rms_norm_eps)[0]

    @property
    def head_weight(self) -> Tensor:
        """The matrix [V, D] from hidden states to logits; the embedding where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """fp32 logits [R, V] of some rows of `forward`'s result. Training and scoring do not need them: see
        `kernels.linear_cross_entropy`."""
        return linear(hidden_RD, self.head_weight).float()

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Random weights for training from scratch: normal with `std` for matrices, 0 for biases, 1 for norms."""
        generator = torch.Generator(self.norm.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, std, generator=generator)
            else:
                parameter.fill_(0 if name.endswith("bias") else 1)
