"""Which contiguous part of a tensor this rank holds.

A parameter, whatever its shape, is a flat array of elements. FSDP2 cuts it by rows, so a rank holds one contiguous flat
range of it, perhaps none; HSDP holds every range several times. Whoever reads, writes or updates a shard needs no more
than this range: files (weights.py, checkpoint.py) and the optimizer are written in terms of it, and know no mesh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LocalShard:
    """The flat elements [first, first + len(values)) of a tensor of `total` elements.

    values: 1-D view of the memory this rank holds (writing to it changes the tensor); empty where ranks outnumber rows.
    writes: whether this rank is the one that stores the range: exactly one of all ranks that hold it does.
    """

    values: Tensor
    first: int
    total: int
    writes: bool

    @property
    def last(self) -> int:
        """One past the last element."""
        return self.first + self.values.numel()

    def part_of(self, begin: int, end: int) -> tuple[int, Tensor]:
        """What this rank holds of the flat elements [begin, end): its first element, counted from `begin`, and a view
        of its values, which may be empty."""
        lo, hi = max(begin, self.first), min(end, self.last)
        return lo - begin, self.values[lo - self.first : max(lo, hi) - self.first]


@torch.no_grad()
def local_shard(tensor: Tensor) -> LocalShard:
    """The part of `tensor` on this rank: a plain tensor, which every rank holds whole, or a DTensor of FSDP2 or HSDP.

    Copies nothing and communicates nothing. Row counts that the ranks do not divide are cut as `torch.chunk` cuts
    them, which is how DTensor and FSDP2 do it.

    Raises:
        ValueError: a DTensor laid out otherwise than by rows over one mesh dimension and replicated over the others, or
            a tensor whose elements do not lie in order in memory.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is not contiguous: its elements are out of order")
    if type(tensor) in (Tensor, nn.Parameter):  # spares a process without DTensors a second of imports
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        writes = not distributed or torch.distributed.get_rank() == 0
        return LocalShard(tensor.detach().view(-1), 0, tensor.numel(), writes)

    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(tensor, DTensor):
        raise ValueError(f"{type(tensor).__name__}: only plain tensors and DTensors have a place in a file")
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's device mesh"
    sharded = [dim for dim, placement in enumerate(placements) if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or any(placements[dim] != Shard(0) for dim in sharded):
        raise ValueError(f"a DTensor placed {placements}; allowed: Shard(0) in one mesh dimension, else Replicate()")
    values = tensor.to_local().detach().view(-1)
    first = 0
    if sharded:
        rows, row_elements = tensor.shape[0], tensor.shape[1:].numel()
        rows_per_rank = -(-rows // mesh.size(sharded[0]))
        begin = min(coordinate[sharded[0]] * rows_per_rank, rows)
        end = min(begin + rows_per_rank, rows)
        assert values.numel() == (end - begin) * row_elements, f"{values.numel()} elements for rows [{begin}, {end})"
        first = begin * row_elements
    writes = all(coordinate[dim] == 0 for dim in range(mesh.ndim) if dim not in sharded)
    return LocalShard(values, first, tensor.numel(), writes)
