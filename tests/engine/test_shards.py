"""Shards as flat ranges: every element is held, and stored by exactly one rank, whatever the mesh."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steep.engine.shards import local_shard

SHAPES = [(7, 3), (8, 2), (3, 5), (1, 4), (2,), (9,), (5, 2, 3), (4, 0)]


def test_a_plain_tensor_is_one_range():
    tensor = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    shard = local_shard(tensor)
    assert (shard.first, shard.last, shard.total, shard.writes) == (0, 6, 6, True)
    shard.values[4] = 9  # a view
    assert tensor[1, 1] == 9
    assert not shard.values.requires_grad
    assert local_shard(torch.tensor(5.0)).values.shape == (1,)
    with pytest.raises(ValueError, match=r"\[3, 2\] is not contiguous"):
        local_shard(tensor.t())


def _gather(shard):
    """[(first, values, writes)] of all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (shard.first, shard.values.tolist(), shard.writes))
    return everyone


def _check_cover(shard, flat):
    """The writers' ranges are the tensor, each element once; every copy has the right values."""
    stored = [None] * shard.total
    for first, values, writes in _gather(shard):
        assert values == flat[first : first + len(values)].tolist()
        for at, value in enumerate(values if writes else [], first):
            assert stored[at] is None
            stored[at] = value
    assert stored == flat.tolist()


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    flat_mesh = init_device_mesh("cpu", (4,))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    for shape in SHAPES:
        whole = torch.arange(float(math.prod(shape))).view(shape)
        flat = whole.view(-1)
        plain = local_shard(whole)
        assert plain.writes == (rank == 0)
        _check_cover(plain, flat)
        for mesh, placements in (
            (flat_mesh, [Shard(0)]),
            (flat_mesh, [Replicate()]),
            (grid, [Replicate(), Shard(0)]),
            (grid, [Shard(0), Replicate()]),
        ):
            tensor = distribute_tensor(whole, mesh, placements)
            shard = local_shard(tensor)
            assert shard.total == whole.numel()
            _check_cover(shard, flat)
            if shard.values.numel():
                shard.values[0] = -1  # a view of what the tensor holds
                assert tensor.to_local().view(-1)[0] == -1
    replica = local_shard(distribute_tensor(torch.zeros(4, 2), grid, [Replicate(), Shard(0)]))
    assert replica.writes == (rank < 2)

    for mesh in (flat_mesh, grid):
        linear = torch.nn.Linear(3, 7)  # uneven rows, and a bias of one dimension
        dist.broadcast(linear.weight.data, 0)
        dist.broadcast(linear.bias.data, 0)
        whole = [p.detach().clone().view(-1) for p in linear.parameters()]
        fully_shard(linear, mesh=mesh)
        for parameter, flat in zip(linear.parameters(), whole):
            _check_cover(local_shard(parameter), flat)

    for placements in ([Shard(1), Replicate()], [Shard(0), Shard(0)]):
        with pytest.raises(ValueError, match=r"allowed: Shard\(0\) in one mesh dimension"):
            local_shard(distribute_tensor(torch.zeros(4, 4), grid, placements))
    dist.destroy_process_group()


def test_four_ranks(tmp_path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=4)
