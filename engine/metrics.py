"""What a training run reports: floating-point work, memory, and the metrics file.

Touches `metrics.jsonl` (and TensorBoard's folder when asked to); decides nothing about training.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.files import atomic_write
from .config import ModelConfig
from .gpus import gpu_of


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak of a GPU in FLOP/s; None on a CPU, in fp32, or for a GPU that `gpus.py` does not list."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    gpu = gpu_of(device)
    return None if gpu is None else gpu.bf16_flops


def training_flops(config: ModelConfig, document_lengths: np.ndarray, *, frozen: bool = False) -> float:
    """Floating-point operations of one forward and backward over packed documents of these lengths.

    6 per weight of a matrix product and token (head included, embedding look-up not; of a mixture the router and the
    experts that a token goes to), and 12 per head dimension and pair of positions that attention really computes:
    within a document, causal, within the layer's window. So padding, masked-out pairs and recomputation do not count as
    useful work. frozen: of a model that is trained through adapters, whose matrices have no gradient: 4 instead of 6;
    the adapters themselves are not counted.
    """
    lengths = document_lengths.astype(np.float64)
    pairs = 0.0
    for window in config.layer_windows:
        width = lengths if window is None else np.minimum(lengths, window)
        pairs += float((width * (width + 1) / 2 + (lengths - width) * width).sum())
    queries = config.num_attention_heads * config.head_dim
    return (4 if frozen else 6) * product_weights(config) * float(lengths.sum()) + 12 * queries * pairs


def full_attention_flops(config: ModelConfig, tokens: int, seq_len: int) -> float:
    """`training_flops` as most publications count them: every position of a sequence, padding included, attends to
    every other, whatever documents and windows there are (6 N + 12 L H S a token)."""
    queries = config.num_attention_heads * config.head_dim
    return tokens * (6.0 * product_weights(config) + 12.0 * config.num_hidden_layers * queries * seq_len)


def product_weights(config: ModelConfig) -> int:
    """Weights that one token is multiplied by."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    experts, active = config.num_local_experts or 0, config.num_experts_per_tok or 1
    layer_weights = hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner * active + hidden * experts
    return config.num_hidden_layers * layer_weights + hidden * config.vocab_size


def peak_memory_bytes(device: torch.device) -> int:
    """Peak so far: allocated memory of the GPU, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class LateFigures:
    """Device scalars on their way to the host: the copy is queued now, waited for only when the figures are read."""

    def __init__(self, figures: Tensor) -> None:
        self._host = figures.to("cpu", non_blocking=True)
        self._copied: torch.cuda.Event | None = None
        if figures.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def get(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()


class MetricsFile:
    """Append-only JSON lines, one object with `event` and `step` each; also TensorBoard scalars if asked for.

    After a resume it holds the history that led to the present weights: lines of later steps, which the killed process
    had still written, are dropped when it is opened, and will be written again.
    """

    def __init__(self, path: Path | None, resumed_step: int, tensorboard: bool = False) -> None:
        """`path`: None writes nothing (ranks other than the first). `resumed_step`: the step after which the run goes
        on; -1 for a new run."""
        self.dropped = 0
        path = path or Path(os.devnull)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if (record := _parse(line)) is not None and record["step"] <= resumed_step]
            self.dropped = len(lines) - len(kept)
            if self.dropped:
                atomic_write(path, "".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, event: str, step: int, **figures: Any) -> None:
        """Append one record. A figure that is not finite is written as null, as JSON has no word for it."""
        record = {"event": event, "step": step, **figures}
        self._file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in figures.items():
                for key, scalar in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(scalar, int | float):
                        self._board.add_scalar("/".join(filter(None, [event, name, key])), scalar, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """The records of a metrics file, of one event or all; a line cut off by a kill is left out."""
    records = [_parse(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record is not None and event in (None, record["event"])]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record and "event" in record else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
