"""Merging models: mergekit's YAML, exact methods on tensors, and a streaming executor over safetensors folders.

`merge(config, out)` does all of it, `sweep` for several values of one key at once; `plan_merge` shows what would be
done without reading weights; the methods are pure functions on tensors. Searching, and merging into the live weights of
the engine's Decoder, are in the modules `search` and `live`, which load the engine.
"""

from .averaging import average_config, ema_weights, selected_weights, uniform_weights, wsm_weights
from .config import MergeConfig, parse_config, read_yaml
from .consensus import consensus_ta, ram, ramplus_tl, sce, tall_mask, ties, ties_consensus
from .executor import Output, execute, merge, sweep
from .fusion import arcee_fusion
from .geometry import karcher, model_stock, multislerp, nuslerp, slerp
from .methods import chat_vector, linear, lines, nearswap, passthrough, task_arithmetic
from .noise import Noise
from .plan import MergePlan, TensorPlan, plan_merge
from .sparsify import dare, della, trim, trim_outliers, trim_rows
from .spectral import iso_c, tsv_m

__all__ = [
    "MergeConfig",
    "MergePlan",
    "Noise",
    "Output",
    "TensorPlan",
    "arcee_fusion",
    "average_config",
    "chat_vector",
    "consensus_ta",
    "dare",
    "della",
    "ema_weights",
    "execute",
    "iso_c",
    "karcher",
    "linear",
    "lines",
    "merge",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "parse_config",
    "passthrough",
    "plan_merge",
    "ram",
    "ramplus_tl",
    "read_yaml",
    "sce",
    "selected_weights",
    "slerp",
    "sweep",
    "tall_mask",
    "task_arithmetic",
    "ties",
    "ties_consensus",
    "trim",
    "trim_outliers",
    "trim_rows",
    "tsv_m",
    "uniform_weights",
    "wsm_weights",
]
