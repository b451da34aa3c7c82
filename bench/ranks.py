"""What sharding costs on a CPU: processes that train one model together over gloo, against as many that train alone.

Both kinds run the same packed batches of a model of the shape of SmolLM2-135M (or another folder), one thread each, all
processes at once; fp32 weights, AdamW, gradients clipped at 1. The difference is what FSDP2 gathers, sums and frees.
Writes to a temporary folder only.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .train import (
    BETAS,
    LR,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    _pack,
    _packed_batch,
    _random_documents,
    _random_model,
    _steps,
)


def run(
    model: str | Path | None = None,
    *,
    ranks: int = 2,
    seq_len: int = 512,
    sequences: int = 4,
    warmup: int = 1,
    steps: int = 3,
    reshard_after_forward: bool = False,
    rounds: int = 1,
) -> dict[str, Any]:
    """Measure both and return the figures.

    Args:
        model: Hugging Face folder; None: random weights of SmolLM2-135M's shape.
        sequences: of each process in each step. warmup, steps: steps before the measured ones, and those.
        rounds: how often both are measured, in turn; the best of each counts.
    """
    settings = {
        "ranks": ranks, "seq_len": seq_len, "sequences": sequences, "warmup": warmup, "steps": steps,
        "reshard_after_forward": reshard_after_forward,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(model) if model is not None else _random_model(Path(temporary, "model"))
        packed = _pack(_random_documents(path, seq_len), seq_len, (warmup + steps) * sequences * ranks)
        documents = Path(temporary, "documents.npz")
        np.savez(documents, **packed)  # type: ignore[arg-type]
        measured: dict[str, list[dict[str, Any]]] = {"together": [], "alone": []}
        for _ in range(rounds):
            for kind, results in measured.items():
                results.append(_start(kind, path, documents, settings))
    best = {kind: max(results, key=lambda each: each["tokens_per_second"]) for kind, results in measured.items()}
    return {
        "model": str(model) if model is not None else "random weights of SmolLM2-135M's shape",
        **settings,
        **best,
        "rounds": {kind: [each["tokens_per_second"] for each in results] for kind, results in measured.items()},
        "together_against_alone": best["together"]["tokens_per_second"] / best["alone"]["tokens_per_second"],
    }


def _start(kind: str, model: Path, documents: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All processes of a kind at once; tokens/s of all of them, and the peak memory of the largest."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in range(settings["ranks"]):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(settings["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        command = [sys.executable, "-m", "steep.bench.ranks", kind, str(model), str(documents), json.dumps(settings)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    results = []
    for process in processes:
        output = process.communicate()[0]
        if process.returncode:
            raise RuntimeError(f"a process of {kind!r} ended with status {process.returncode}")
        results.append(json.loads(output.splitlines()[-1]))
    return {
        "tokens_per_second": sum(each["tokens_per_second"] for each in results),
        "peak_rss_bytes": max(each["peak_rss_bytes"] for each in results),
        "losses": [each["losses"] for each in results],
    }


def _measure(kind: str, model: Path, documents: Path, settings: dict[str, Any]) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from ..engine import AdamWConfig, Engine
    from ..engine.parallel import ParallelConfig, make_mesh, start_process_group
    from .train import _peak_rss

    torch.set_num_threads(1)
    rank, together = int(os.environ["RANK"]), kind == "together"
    config = AdamWConfig(betas=BETAS, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_GRAD_NORM)
    parallel = ParallelConfig(reshard_after_forward=settings["reshard_after_forward"])
    start_process_group("cpu", 600)  # those who train alone use it to begin together only
    mesh = make_mesh("cpu", 1) if together else None
    engine = Engine.load(model, optimizer=config, mesh=mesh, parallel=parallel)
    rates, losses = [], []
    for step in _steps(documents, settings["sequences"])[rank :: settings["ranks"]]:
        batch = _packed_batch(step, settings["seq_len"])
        dist.barrier()
        began = time.perf_counter()
        sums = engine.forward_backward(batch, batch.num_valid * (settings["ranks"] if together else 1))
        engine.step(LR)
        rates.append(batch.num_valid / (time.perf_counter() - began))
        losses.append(sums.nll.item() / batch.num_valid)
    dist.destroy_process_group()
    return {
        "tokens_per_second": statistics.median(rates[settings["warmup"] :]),
        "peak_rss_bytes": _peak_rss(),
        "losses": losses,
    }


if __name__ == "__main__":
    kind_name, model_folder, documents_file, settings_json = sys.argv[1:]
    print(json.dumps(_measure(kind_name, Path(model_folder), Path(documents_file), json.loads(settings_json))))
