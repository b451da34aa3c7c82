"""AdamW on sharded parameters: every storage gives the bits of one process, on any number of ranks."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from steep.engine.optimizer import AdamW, AdamWConfig
from steep.engine.parallel import make_mesh
from steep.engine.shards import local_shard
from tests.processes import process_group, run_ranks

SHAPES = {"embedding": (5, 256), "down": (3, 512), "odd": (7, 33), "norm": (256,), "bias": (2,)}
STORAGES = [
    {"moments": "float32"}, {"moments": "bfloat16"}, {"moments": "8bit"}, {"master": "none", "moments": "8bit"},
]  # fmt: skip


def module(dtype: torch.dtype) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    made = nn.Module()
    for name, shape in SHAPES.items():
        made.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    return made


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def train_alone(storage: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights and optimizer state after three steps."""
    parameters = dict(module(dtype).named_parameters())
    optimizer = AdamW(parameters.items(), AdamWConfig(max_grad_norm=None, **storage))
    for step in range(3):
        for name, gradient in gradients(step).items():
            parameters[name].grad = gradient.to(dtype)
        optimizer.step(1e-2)
    return parameters | optimizer.state_dict()


def check_rank(rank: int, folder: Path, world_size: int, replicas: int, storage: dict, dtype: torch.dtype) -> None:
    with process_group(folder, rank, world_size):
        mesh, sharded = make_mesh("cpu", replicas), module(dtype)
        fully_shard(sharded, mesh=mesh)
        parameters = dict(sharded.named_parameters())
        optimizer = AdamW(parameters.items(), AdamWConfig(max_grad_norm=None, **storage))
        for step in range(3):
            for name, gradient in gradients(step).items():
                parameters[name].grad = distribute_tensor(gradient.to(dtype), mesh, parameters[name].placements)
            grad_norm, _ = optimizer.step(1e-2)
            whole = torch.cat([gradient.to(dtype).float().flatten() for gradient in gradients(step).values()])
            torch.testing.assert_close(grad_norm, whole.norm(), rtol=1e-5, atol=0)
        reference, found = train_alone(storage, dtype), parameters | optimizer.state_dict()
        assert found.keys() == reference.keys()
        for name, tensor in found.items():
            local = local_shard(tensor)
            expected = reference[name].detach().flatten()[local.first : local.last]
            assert tensor.shape == reference[name].shape, name
            assert torch.equal(local.values, expected), name


@pytest.mark.parametrize(("world_size", "replicas"), [(2, 1), (3, 1), (4, 2)])
def test_every_storage_gives_the_bits_of_one_process(tmp_path, world_size, replicas):
    run_ranks(check_all, world_size, tmp_path, world_size, replicas)


def check_all(rank: int, folder: Path, world_size: int, replicas: int) -> None:
    cases = [(storage, torch.bfloat16) for storage in STORAGES] + [({}, torch.float32)]
    for number, (storage, dtype) in enumerate(cases):
        (folder / str(number)).mkdir(exist_ok=True)
        check_rank(rank, folder / str(number), world_size, replicas, storage, dtype)


def refuse(rank: int, folder: Path) -> None:
    with process_group(folder, rank, 2):
        sharded = module(torch.bfloat16)
        fully_shard(sharded, mesh=make_mesh("cpu", 1))
        for option in ({"offload": True}, {"in_backward": True, "max_grad_norm": None}):
            with pytest.raises(ValueError, match=f"optimizer.{next(iter(option))}: works in one process only"):
                AdamW(sharded.named_parameters(), AdamWConfig(**option))


def test_what_works_in_one_process_only_is_refused(tmp_path):
    run_ranks(refuse, 2, tmp_path)
