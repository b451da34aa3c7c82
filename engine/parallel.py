"""Data parallelism from outside the model: FSDP2 over the decoder's layers, and over copies of it (HSDP).

Every parameter of a sharded decoder is a DTensor of which a rank holds some rows, perhaps none; the model code does not
know. One unit per layer, one for an untied head, and the root with the embedding and the final norm. Gradients are
summed in fp32 over the ranks, in the order of the communication library: another world size adds the same micro batches
in another order, and a loss curve agrees with that of one process to fp32 rounding, not to the bit.

Knows decoders and process groups; no data, no files, no optimizer.
"""

from __future__ import annotations

import datetime
import os
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field

from .model import Decoder

if TYPE_CHECKING:  # imported where it is used: one process alone is spared more than a second
    from torch.distributed.device_mesh import DeviceMesh

REDUCE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ParallelConfig(BaseModel):
    """The `parallel` section of a training recipe; it changes speed and memory, never the order of the data.

    replicas: copies of the model, each sharded over world size / replicas ranks (HSDP). Put a copy inside a node: what
        crosses nodes is then one all-reduce of gradient shards per step, not the weights.
    reshard_after_forward: free a layer's gathered weights after its forward and gather them again in backward. Off: the
        whole model stays gathered from forward to backward, one all-gather less per micro batch.
    reduce_every: gradients are summed over the ranks after each `micro_batch`, and what a rank holds of them between is
        its shard; or once per `step`, for which every rank holds the gradients of the whole model in fp32.
    reduce_dtype: what crosses the network; bfloat16 halves it and rounds every sum.
    timeout_seconds: a collective that takes longer ends the run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(default=1, ge=1)
    reshard_after_forward: bool = True
    reduce_every: Literal["micro_batch", "step"] = "micro_batch"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_seconds: float = Field(default=600, gt=0)


def world_from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun sets them; (0, 0, 1) without it.

    Raises:
        ValueError: a variable that is not a number, or a rank outside the world.
    """
    values = {}
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"environment: {name} is {text!r}; allowed: a number, as torchrun sets it")
        values[name] = int(text)
    if values["RANK"] >= max(values["WORLD_SIZE"], 1):
        raise ValueError(f"environment: RANK is {values['RANK']}; allowed: below WORLD_SIZE, {values['WORLD_SIZE']}")
    return values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"]


def start_process_group(device_type: str, timeout_seconds: float) -> None:
    """Join the default process group that torchrun's environment describes: NCCL beside gloo on GPUs, gloo on CPUs.

    NCCL keeps a record of its last collectives in memory and writes it out when one of them times out: what tells a
    dead rank from a slow one afterwards.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))


def check_world(config: ParallelConfig, world_size: int, micro_batches: int) -> None:
    """Whether a world size fits a recipe.

    Raises:
        ValueError: the copies do not divide the ranks, or the ranks the micro batches of a step.
    """
    if world_size % config.replicas:
        raise ValueError(
            f"parallel.replicas: {config.replicas} copies over {world_size} processes; allowed: a divisor of "
            f"{world_size}"
        )
    if micro_batches % world_size:
        raise ValueError(
            f"batch.micro_batches: {micro_batches} micro batches over {world_size} processes; allowed: a multiple of "
            f"{world_size}, as every process takes as many as any other"
        )


def make_mesh(device_type: str, replicas: int) -> DeviceMesh:
    """(replica, shard) mesh over all ranks; (shard,) alone where there is one copy."""
    from torch.distributed.device_mesh import init_device_mesh

    size = dist.get_world_size()
    if replicas == 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, size // replicas), mesh_dim_names=("replica", "shard"))


def shard_decoder(decoder: Decoder, mesh: DeviceMesh, config: ParallelConfig) -> None:
    """Shard a decoder in place, in the dtype it has; best on `meta`, so that no rank ever holds a whole parameter."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(reduce_dtype=REDUCE_DTYPES[config.reduce_dtype])
    layers = list(decoder.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    if decoder.lm_head is not None:  # used at the end of forward and the start of backward: not worth freeing between
        fully_shard(decoder.lm_head, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    fully_shard(decoder, mesh=mesh, mp_policy=policy)

    order: list[Any] = [*layers, *filter(None, [decoder.lm_head])]
    for before, after in zip(order, order[1:]):
        before.set_modules_to_forward_prefetch([after])
        after.set_modules_to_backward_prefetch([before])
    for module in decoder.modules():
        if isinstance(module, FSDPModule):  # sums, not means: the loss is divided by the targets of the whole step
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def set_last_micro_batch(decoder: Decoder, last: bool) -> None:
    """For `reduce_every: step`: gradients and gathered weights stay on the rank until the last micro batch."""
    module: Any = decoder
    if hasattr(module, "set_requires_gradient_sync"):  # an FSDPModule
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)


def reshard(decoder: Decoder) -> None:
    """Free all gathered weights: after a forward without a backward they would stay, and go stale."""
    module: Any
    for module in decoder.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def shard_group(tensor: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold a parameter's other rows; None for a plain tensor."""
    mesh = getattr(tensor, "device_mesh", None)
    return None if mesh is None else mesh.get_group(mesh.ndim - 1)
