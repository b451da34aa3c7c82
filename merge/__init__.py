"""Merging models: mergekit's YAML, exact methods on tensors, and a streaming executor over safetensors folders.

`merge(config, out)` does all of it; `plan_merge` shows what would be done without reading weights; the methods are pure
functions on tensors.
"""

from .config import MergeConfig, parse_config, read_yaml
from .executor import merge
from .methods import linear, slerp, task_arithmetic, ties, trim
from .plan import MergePlan, TensorPlan, plan_merge

__all__ = [
    "MergeConfig",
    "MergePlan",
    "TensorPlan",
    "linear",
    "merge",
    "parse_config",
    "plan_merge",
    "read_yaml",
    "slerp",
    "task_arithmetic",
    "ties",
    "trim",
]
