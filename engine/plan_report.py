"""`--plan`: the plan of a recipe on its real data, as tables. Opens stores and config.json; loads no weights.

Also what a training run asks before it loads any: whether its GPU has the memory (`refuse_what_cannot_fit`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..data.batch import BatchLoader
from .config import ModelConfig
from .gpus import Gpu, find_gpu, gpu_of
from .parallel import check_world
from .plan import Job, Memory, Time, Traffic, Work, check_fits, expected_time, memory, traffic, work
from .recipe import TrainRecipe
from .run_setup import count_steps, open_data

_SEQUENCES = 512  # whose documents are looked at, at most (whole steps, at least one)


@dataclass(frozen=True)
class Plan:
    """Of a recipe. gpu, moved, time: None where it is planned for this machine's CPU, of which no time is predicted."""

    job: Job
    gpu: Gpu | None
    capacity: float
    memory: Memory
    work: Work
    moved: Traffic | None
    time: Time | None
    steps: int
    targets: float  # tokens of a step that are trained on


def make_plan(recipe: TrainRecipe, gpu: str | None = None, gpus: int = 1, gpus_per_node: int = 8) -> Plan:
    """Plan a recipe on `gpus` GPUs of the kind `gpu` (`gpus.find_gpu`); None: the GPU that is here, or the CPU.

    Raises:
        FileNotFoundError, ValueError: a mistake in the recipe or its inputs, or it does not fit.
    """
    for name, value in (("gpus", gpus), ("gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"{name}: {value}; allowed: 1 or more")
    if recipe.lora is not None:
        raise ValueError("lora: plans are made of full-parameter runs only; allowed with --plan: null")
    check_world(recipe.parallel, gpus, recipe.batch.micro_batches)
    for option in ("offload", "in_backward"):
        if gpus > 1 and getattr(recipe.optimizer, option):
            raise ValueError(f"optimizer.{option}: works in one process only; allowed with {gpus} GPUs: false")
    config = ModelConfig.from_folder(recipe.model)
    loader, _ = open_data(recipe, config)
    card = _card(recipe, gpu)
    if recipe.float8 is not None and card is not None and card.float8_flops is None:
        raise ValueError(f"float8: a {card.name} has none; allowed there: null")
    job = Job.of(recipe, gpus, gpus_per_node)
    lengths, steps = _first_documents(recipe, loader)
    done = work(config, job, lengths / steps, recipe.data.seq_len)
    targets = float((lengths - 1).sum()) / steps
    total_steps = count_steps(recipe, loader)
    if card is None:
        capacity = float(available_memory())
        needed = memory(config, job)
        everything = gpus * (needed.total + sum(needed.host.values()))
        if everything > capacity:
            raise ValueError(
                f"does not fit: {gpus} processes take {bytes_text(everything)} of the {bytes_text(capacity)} of memory "
                "that this machine has to give. What would help: checkpoint.background=false, recompute=full, a "
                "smaller data.seq_len or batch.sequences"
            )
        return Plan(job, None, capacity, needed, done, None, None, total_steps, targets)
    needed = check_fits(config, job, card)
    moved = traffic(config, job)
    time = expected_time(config, job, card, done, moved)
    return Plan(job, card, card.memory, needed, done, moved, time, total_steps, targets)


def refuse_what_cannot_fit(
    recipe: TrainRecipe, config: ModelConfig, device: torch.device, world_size: int
) -> None:
    """ValueError if a step of a recipe needs more memory than this process's GPU has. A CPU is not judged."""
    gpu = gpu_of(device) if device.type == "cuda" else None
    if gpu is not None and recipe.lora is None:  # adapters take far less than the plan's full parameters
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_fits(config, Job.of(recipe, world_size, per_node), gpu)


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def _card(recipe: TrainRecipe, name: str | None) -> Gpu | None:
    if name is not None:
        return find_gpu(name)
    if recipe.device == "cpu" or not torch.cuda.is_available():
        return None
    found = gpu_of(torch.device("cuda", 0))
    if found is None:
        raise ValueError(f"gpu: {torch.cuda.get_device_name(0)} has no known figures; name one that has")
    return found


def _first_documents(recipe: TrainRecipe, loader: BatchLoader) -> tuple[np.ndarray, int]:
    """(lengths of the documents in the first steps, how many steps those are)."""
    size, per_step = recipe.batch.sequences, recipe.batch.sequences * recipe.batch.micro_batches
    steps = max(min(_SEQUENCES // per_step, count_steps(recipe, loader)), 1)
    lengths = []
    for first in range(0, steps * per_step, size):
        batch = loader.batch_at(first)
        lengths.append(np.diff(batch.cu_seqlens)[batch.source_ids >= 0])
    return np.concatenate(lengths), steps


# --- tables ----------------------------------------------------------------------------------------------------------


def print_plan(plan: Plan, console: Console) -> None:
    """Three tables: memory, work and bytes moved, expected time."""
    job = plan.job
    where = "on this machine's CPU" if plan.gpu is None else f"per {plan.gpu.name}, {job.gpus} of them"
    table = Table(title=f"memory {where}", title_justify="left")
    table.add_column("kind")
    table.add_column("bytes", justify="right")
    for kind, size in plan.memory.kinds.items():
        if size:
            table.add_row(kind, bytes_text(size))
    table.add_section()
    table.add_row(f"all, at most (at {plan.memory.at})", bytes_text(plan.memory.total))
    table.add_row("there is", f"{bytes_text(plan.capacity)} ({plan.memory.total / plan.capacity:.0%} used)")
    for kind, size in plan.memory.host.items():
        table.add_row(f"in host memory: {kind}", bytes_text(size))
    console.print(table)

    table = Table(title="one step", title_justify="left")
    table.add_column("what")
    table.add_column("all GPUs" if job.gpus > 1 else "", justify="right")
    table.add_row("steps of the run", f"{plan.steps:,}")
    table.add_row("tokens trained on", f"{plan.targets:,.0f}")
    table.add_row("TFLOP, attention within documents", f"{plan.work.document_true / 1e12:,.4g}")
    table.add_row("TFLOP, as if one document a sequence", f"{plan.work.full / 1e12:,.4g}")
    if plan.work.again:
        table.add_row("TFLOP, computed a second time", f"{plan.work.again / 1e12:,.4g}")
    if plan.moved is not None:
        table.add_section()
        for name, size in vars(plan.moved).items():
            if size:
                table.add_row(f"per GPU, {name.replace('_', ' ')}", bytes_text(size))
    console.print(table)
    if plan.time is None or plan.gpu is None:
        console.print("no time is predicted for a CPU; --gpu names a GPU to plan for")
        return

    table = Table(title="expected time of a step", title_justify="left")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for part, seconds in plan.time.parts.items():
        table.add_row("communication that nothing hides" if part == "communication" else part, f"{seconds:.4g}")
    table.add_section()
    total, peak = plan.time.total, plan.gpu.bf16_flops * job.gpus
    table.add_row("all", f"{total:.4g}")
    table.add_row("tokens/s", f"{plan.targets / total:,.0f}")
    table.add_row("MFU, attention within documents", f"{plan.work.document_true / total / peak:.1%}")
    table.add_row("MFU, as if one document a sequence", f"{plan.work.full / total / peak:.1%}")
    table.add_row("hours of the run", f"{plan.steps * total / 3600:,.3g}")
    console.print(table)
    if plan.memory.total > 0.93 * plan.capacity:
        console.print("tight: an allocator wastes some percent, and this leaves little")


def plan_command(recipe: TrainRecipe, **options: Any) -> None:
    """Make the plan and print it."""
    print_plan(make_plan(recipe, **options), Console(highlight=False))


def bytes_text(size: float) -> str:
    """In decimal units, as data sheets have them."""
    unit, name = next(((1000**n, name) for n, name in ((3, "GB"), (2, "MB"), (1, "kB")) if size >= 1000**n), (1, "B"))
    return f"{size / unit:,.2f} {name}" if unit > 1 else f"{size:.0f} B"
