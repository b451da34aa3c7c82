"""steep.kernels: the operations that decide a training step's speed and memory, as plain functions on torch tensors.

Each file holds one kernel: formula and floor, torch reference, Triton code, operator registration, public function.
They work under autograd and torch.compile; on a CPU the references run and triton is not needed. Knows torch and
triton, nothing else of steep.
"""

from .attention import attention, attention_backend
from .grouped_mm import grouped_mm, grouped_weight_grad
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .moe import moe_experts, moe_mlp, permute, unpermute
from .moe_routing import expert_load, load_balancing_loss, route, sort_by_expert
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_backend",
    "expert_load",
    "grouped_mm",
    "grouped_weight_grad",
    "linear",
    "linear_cross_entropy",
    "load_balancing_loss",
    "moe_experts",
    "moe_mlp",
    "permute",
    "rms_norm",
    "rope",
    "route",
    "sort_by_expert",
    "swiglu",
    "unpermute",
]
