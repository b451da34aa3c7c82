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
from .gate_up import gate_up_linear
from .grad_norm import clip_coefficient, grad_norm, squared_norm
from .grouped_mm import grouped_mm, grouped_weight_grad
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .lm_head import FusedLMHead
from .lora import LowRank, add_low_rank, rms_norm_lora_linear, swiglu_lora_linear
from .moe import moe_experts, moe_mlp, permute, unpermute
from .moe_routing import expert_load, load_balancing_loss, route, sort_by_expert
from .patch import PatchReport, patch, unpatch
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .rope_qkv import rope_qkv
from .swiglu import swiglu

__all__ = [
    "adamw_",
    "AdamWShard",
    "add_low_rank",
    "add_rms_norm",
    "attention",
    "attention_backend",
    "cast_blockwise",
    "cast_rowwise",
    "clip_coefficient",
    "document_lengths",
    "embedding",
    "expert_load",
    "fp8_linear",
    "FusedLMHead",
    "gate_up_linear",
    "grad_norm",
    "grouped_mm",
    "grouped_weight_grad",
    "linear",
    "linear_cross_entropy",
    "load_balancing_loss",
    "LowRank",
    "moe_experts",
    "moe_mlp",
    "NeftuneNoise",
    "patch",
    "PatchReport",
    "permute",
    "rms_norm",
    "rms_norm_linear",
    "rms_norm_lora_linear",
    "rope",
    "rope_qkv",
    "route",
    "sort_by_expert",
    "squared_norm",
    "swiglu",
    "swiglu_linear",
    "swiglu_lora_linear",
    "unpatch",
    "unpermute",
]
