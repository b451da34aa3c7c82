"""steep.engine: models in Hugging Face form, read, trained, written and run; `Engine` to embed, `train` for recipes.

Names are imported when first used, so that `import steep.engine` costs nothing. Generation and verification are in the
modules of those names: `from steep.engine.generate import generate`.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "AdamW": "optimizer",
    "AdamWConfig": "optimizer",
    "CheckpointWriter": "checkpoint",
    "Decoder": "model",
    "Engine": "engine",
    "KVCache": "cache",
    "ModelConfig": "config",
    "Ranks": "ranks",
    "SafetensorsFolder": "safetensors_io",
    "SafetensorsWriter": "safetensors_io",
    "ScheduleConfig": "schedule",
    "SourceLoss": "engine",
    "TrainRecipe": "recipe",
    "Trainer": "trainer",
    "TrainingDiverged": "trainer",
    "export_model": "weights",
    "import_gguf": "gguf",
    "learning_rate": "schedule",
    "load_newest": "checkpoint",
    "load_recipe": "recipe",
    "load_state": "checkpoint",
    "load_weights": "weights",
    "local_shard": "shards",
    "parse_recipe": "recipe",
    "read_metrics": "metrics",
    "train": "trainer",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
