"""steep.kernels: the operations that decide a training step's speed and memory, as plain functions on torch tensors.

Each file holds one kernel: formula and floor, torch reference, Triton code, operator registration, public function.
They work under autograd and torch.compile; on a CPU the references run and triton is not needed. Knows torch and
triton, nothing else of steep.
"""

from .attention import attention, attention_backend
from .gate_up import gate_up_linear
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .patch import PatchReport, patch, unpatch
from .rms_norm import add_rms_norm, rms_norm
from .rope import rope
from .swiglu import swiglu

__all__ = [
    "PatchReport",
    "add_rms_norm",
    "attention",
    "attention_backend",
    "gate_up_linear",
    "linear",
    "linear_cross_entropy",
    "patch",
    "rms_norm",
    "rope",
    "swiglu",
    "unpatch",
]
