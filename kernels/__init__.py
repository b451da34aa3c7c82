"""steep.kernels: the operations that decide a training step's speed and memory, as plain functions on torch tensors.

Each file holds one kernel: formula and floor, torch reference, Triton code, operator registration, public function.
They work under autograd and torch.compile; on a CPU the references run and triton is not needed. Knows torch and
triton, nothing else of steep.
"""

from .adamw import AdamWShard, adamw_
from .attention import attention, attention_backend
from .embedding import NeftuneNoise, document_lengths, embedding
from .fp8 import cast_blockwise, cast_rowwise
from .fp8_linear import fp8_linear
from .fused_linear import rms_norm_linear, swiglu_linear
from .grad_norm import clip_coefficient, grad_norm, squared_norm
from .grouped_mm import grouped_mm, grouped_weight_grad
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .lm_head import FusedLMHead
from .moe import moe_experts, moe_mlp, permute, unpermute
from .moe_routing import expert_load, load_balancing_loss, route, sort_by_expert
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .rope_qkv import rope_qkv
from .swiglu import swiglu

__all__ = [
    "NeftuneNoise",
    "FusedLMHead",
    "add_rms_norm",
    "attention",
    "attention_backend",
    "cast_blockwise",
    "cast_rowwise",
    "fp8_linear",
    "document_lengths",
    "embedding",
    "expert_load",
    "grouped_mm",
    "grouped_weight_grad",
    "AdamWShard",
    "adamw_",
    "add_rms_norm",
    "attention",
    "attention_backend",
    "clip_coefficient",
    "grad_norm",
    "linear",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe_experts",
    "moe_mlp",
    "permute",
    "rms_norm",
    "rms_norm_linear",
    "rope",
    "rope_qkv",
    "squared_norm",
    "swiglu",
    "swiglu_linear",
    "route",
    "sort_by_expert",
    "swiglu",
    "unpermute",
]
