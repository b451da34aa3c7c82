"""How many bytes the decoder's forward keeps for its backward: what a plan of memory is made of. Pure arithmetic on a
`ModelConfig`, one term per tensor that `model.py` saves; `tests/engine/test_recompute.py` compares the two.

Not counted: the batch itself; what does not grow with it (the gradient of the head in fp32, the rotary tables); and a
load-balancing loss, some 4 bytes per layer, token and expert.
"""

from __future__ import annotations

import torch

from .config import ModelConfig
from .model import Recompute


def saved_bytes_per_token(
    config: ModelConfig,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.bfloat16,
    *,
    float8: bool = False,
) -> int:
    """Bytes per token of a packed batch, padding included, between forward and backward of `Decoder` and its loss.

    dtype: of the weights. float8: whether `Decoder.float8` is set.
    """
    size = dtype.itemsize
    layers = config.num_hidden_layers * layer_bytes_per_token(config, recompute, dtype, float8=float8)
    # the sum and the rstd of the last norm, the gradient of the head's input
    return layers + size * config.hidden_size + 4 + size * config.hidden_size


def recomputed_bytes_per_token(
    config: ModelConfig,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.bfloat16,
    *,
    float8: bool = False,
) -> int:
    """Bytes per token that come on top while backward is in a layer, because they are computed again there."""
    size = dtype.itemsize
    if recompute == "none":
        return 0
    if recompute == "selective":
        return _gate_up_bytes(config, size)
    product_input = 0 if config.num_local_experts or float8 else size * config.intermediate_size
    kept = size * config.hidden_size  # the layer's input is there already
    return layer_bytes_per_token(config, "none", dtype, float8=float8) - kept + product_input


def gradient_bytes_per_token(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes per token of gradients of activations while backward is in an MLP, where they are most: of its output and
    of the residual stream, of h and of gate and up; of a mixture's choices each."""
    active = config.num_experts_per_tok
    permuted = 0 if active is None else active * config.hidden_size
    return dtype.itemsize * (2 * config.hidden_size + permuted + 3 * config.intermediate_size * (active or 1))


def layer_bytes_per_token(
    config: ModelConfig,
    recompute: Recompute = "none",
    dtype: torch.dtype = torch.bfloat16,
    *,
    float8: bool = False,
) -> int:
    """What one layer adds to `saved_bytes_per_token`."""
    size, hidden, width = dtype.itemsize, config.hidden_size, config.intermediate_size
    if recompute == "full":
        return size * hidden
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    attended = heads * config.head_dim
    rotated = (heads + kv_heads) * config.head_dim

    sums = 2 * (size * hidden + 4)  # and the rstd, of the two norms
    qkv = size * (rotated + kv_heads * config.head_dim)  # rotated in place
    if config.qk_norm:
        qkv += size * rotated + 4 * (heads + kv_heads)  # or not
    attention = size * attended + 4 * heads  # and its log-sum-exp
    products = [hidden, attended]  # widths of what the projections multiply

    if config.num_local_experts is None:
        mlp = 0
        products += [hidden, width]
    else:  # normed input, logits; weight, expert, slot and row of each choice
        mlp = size * (hidden + config.num_local_experts) + 16 * (config.num_experts_per_tok or 0)
    if recompute == "none":
        mlp += _gate_up_bytes(config, size)
    # one byte an element, padded to multiples of 128, and a scale for 128 tokens ("rowwise": for all)
    copies = sum(-(-width // 128) * (128 + 4) for width in products) if float8 else 0
    return sums + qkv + attention + mlp + copies


def _gate_up_bytes(config: ModelConfig, size: int) -> int:
    return 2 * size * config.intermediate_size * (config.num_experts_per_tok or 1)
