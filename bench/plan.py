"""Predicted against measured memory of training steps, on the CPU: `engine.plan` beside what the process really takes.

Measured is resident memory in a process of its own: the peak (VmHWM, reset by /proc/self/clear_refs) while an Engine is
made and trains two steps, less what was resident after a step of one layer of it, when all libraries are loaded. malloc
is told to give freed memory back at once, as it would otherwise count what it keeps for later. Linux only.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .train import SHAPE

_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

# The sizes of SmolLM2-135M, and of two smaller ones of its kind.
SHAPES: dict[str, dict[str, Any]] = {
    "37M": SHAPE | {"vocab_size": 32768, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 15,
                    "num_attention_heads": 6, "num_key_value_heads": 2},
    "72M": SHAPE | {"vocab_size": 49152, "hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 22,
                    "num_attention_heads": 7, "num_key_value_heads": 7},
    "135M": SHAPE,
}  # fmt: skip
CASES: list[dict[str, Any]] = [
    {"shape": "37M", "dtype": "float32", "tokens": 2048},
    {"shape": "72M", "dtype": "float32", "tokens": 1024, "micro_batches": 2},
    {"shape": "135M", "dtype": "float32", "tokens": 1024},
    {"shape": "135M", "dtype": "float32", "tokens": 1024, "recompute": "full"},
    {"shape": "37M", "dtype": "bfloat16", "tokens": 1024, "micro_batches": 2, "recompute": "selective"},
    {"shape": "135M", "dtype": "bfloat16", "tokens": 1024},
]


def run(cases: Iterable[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Figures of every case: predicted and measured bytes, and their ratio.

    Args:
        cases: {"shape": name in SHAPES or a config, "dtype", "tokens", "micro_batches", "recompute", "optimizer"}.
    """
    cases = list(CASES if cases is None else cases)
    command = [sys.executable, "-m", "steep.bench.plan", json.dumps(cases)]
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = {**os.environ, **_GIVE_BACK, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    finished = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    results = [json.loads(line) for line in finished.stdout.splitlines()]
    return {"results": results, "largest_error": max(abs(each["ratio"] - 1) for each in results)}


def _case(case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from ..engine.config import ModelConfig
    from ..engine.optimizer import AdamWConfig
    from ..engine.plan import Job, Parameters, memory

    shape = case["shape"]
    config = ModelConfig.from_dict(SHAPES[shape] if isinstance(shape, str) else shape)
    job = Job(
        tokens=case["tokens"],
        micro_batches=case.get("micro_batches", 1),
        dtype=getattr(torch, case["dtype"]),
        recompute=case.get("recompute", "none"),
        optimizer=AdamWConfig(**case.get("optimizer", {})),
        background_checkpoints=False,
    )
    predicted = memory(config, job)
    _steps(dataclasses.replace(config, num_hidden_layers=1, layer_windows=(None,), vocab_size=512), job, job.tokens)
    _collect()
    before = _reset_peak()
    _steps(config, job, job.tokens)
    measured = _status("VmHWM") - before
    _collect()
    return {
        **case,
        "parameters": Parameters.of(config).total,
        "predicted_bytes": predicted.total,
        "measured_bytes": measured,
        "ratio": predicted.total / measured,
        "at": predicted.at,
        "predicted_by_kind": predicted.kinds,
    }


def _steps(config: Any, job: Any, tokens: int) -> None:
    import torch

    from ..engine import Decoder, Engine

    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to(job.dtype).to_empty(device="cpu")
    decoder.init_weights(0)
    decoder.recompute = job.recompute
    engine = Engine(decoder, job.optimizer, accumulate_in_fp32=job.accumulates)
    batch = _batch(config.vocab_size, tokens)
    for _ in range(2):
        engine.begin_step(1e-5)
        for _ in range(job.micro_batches):
            engine.forward_backward(batch, batch.num_valid * job.micro_batches)
        engine.step(1e-5)


def _batch(vocab_size: int, tokens: int) -> Any:
    """One full sequence of four documents."""
    from ..data import IGNORE, PackedBatch

    ids = np.random.default_rng(0).integers(0, vocab_size, tokens)
    bounds = np.linspace(0, tokens, 5).astype(np.int32)
    labels = np.roll(ids, -1)
    labels[bounds[1:] - 1] = IGNORE
    positions = np.arange(tokens, dtype=np.int32) - np.repeat(bounds[:-1], np.diff(bounds))
    return PackedBatch(ids, labels, positions, bounds, tokens, np.zeros(4, np.int32), tokens - 4)


def _collect() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> int:
    """Resident bytes now, from which on the peak counts."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


if __name__ == "__main__":
    for given in json.loads(sys.argv[1]):
        print(json.dumps(_case(given)), flush=True)
