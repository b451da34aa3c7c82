"""Shards as flat ranges: every element is held, and stored by exactly one rank, whatever the mesh."""

import math

import pytest
import torch
import torch.distributed as dist

from steep.engine.shards import LocalShard, local_shard
from tests.processes import meshes, process_group, run_ranks

SHAPES = [(7, 3), (8, 2), (3, 5), (1, 4), (2,), (9,), (5, 2, 3), (4, 0)]


def test_part_of_a_range():
    shard = LocalShard(torch.arange(10.0, 16.0), first=10, total=20, writes=True)  # elements 10..15
    for begin, end, first, values in (
        (0, 20, 10, [10, 15]),
        (12, 14, 0, [12, 13]),
        (8, 11, 2, [10, 10]),
        (15, 18, 0, [15, 15]),
    ):
        part_first, part = shard.part_of(begin, end)
        assert part_first == first
        assert [part[0], part[-1]] == values
    for begin, end in ((0, 10), (16, 20), (0, 3), (18, 20), (12, 12)):
        assert shard.part_of(begin, end)[1].numel() == 0


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
    with process_group(folder, rank, 4):
        _check_rank(rank)


def _check_rank(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    flat_mesh, grid = meshes(4).values()
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


def test_four_ranks(tmp_path):
    run_ranks(_rank, 4, tmp_path)
