"""Several real ranks over gloo, for tests: one start of the processes runs many checks."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def forkserver() -> Any:
    """A multiprocessing context whose processes are forked from a server that has imported everything once, for all
    tests of a session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.distributed.tensor", "steep.engine.trainer", "steep.kernels"]
    )
    return context


def run_ranks(function: Callable[..., None], world_size: int, *args: Any) -> None:
    """function(rank, *args) in `world_size` processes; an exception in one is raised here."""
    forkserver()
    mp.start_processes(_run, (function, args), nprocs=world_size, start_method="forkserver")


def exit_codes(function: Callable[..., None], world_size: int, *args: Any) -> list[int]:
    """The same for ranks that die: waits for each of them."""
    forkserver()
    context = mp.start_processes(_run, (function, args), world_size, join=False, start_method="forkserver")
    for process in context.processes:
        process.join()
    return [process.exitcode for process in context.processes]


def _run(rank: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(rank, *args)


@contextmanager
def process_group(folder: Path, rank: int, world_size: int, timeout_seconds: float = 60) -> Iterator[None]:
    """A gloo process group of the first `world_size` ranks that meet in a new file in `folder`."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_seconds),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def meshes(world_size: int) -> dict[str, object]:
    from torch.distributed.device_mesh import init_device_mesh

    flat = {"fsdp": init_device_mesh("cpu", (world_size,))}
    if world_size == 4:
        flat["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return flat


def same_on_all(text: str) -> None:
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, text)
    assert set(everyone) == {text}, everyone


@contextmanager
def raises_everywhere(error: type[Exception], match: str, on_rank: int | None = None):
    """All ranks raise the same; `on_rank` is where it happened."""
    with pytest.raises(error, match=match) as caught:
        yield
    assert type(caught.value) is error
    same_on_all(str(caught.value))
    if on_rank is not None:
        assert f"on rank {on_rank} of" in caught.value.__notes__[0]


@contextmanager
def limited_files(num_bytes: int | None):
    """No file that this process writes may grow beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if num_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
