"""One launch over many tensors: a table tells each program of a Triton grid which piece of which tensor is its own.

A model has some 300 parameters, half of them norms and biases of a few kilobytes: launched one by one they would cost
2-3 us each on the GPU and 20 us on the host, as much as the whole update of a 7B model's shard. FSDP2 keeps every
parameter in storage of its own, so there is no flat buffer to walk over; but a difference of addresses is a number.
Operands are passed as one base pointer each, and a row of the table says where a tensor begins relative to it.
May touch: torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ._triton import cdiv

_graph_tables: list[ShardTable] = []  # read by captured CUDA graphs at every replay: kept alive


@dataclass(frozen=True)
class ShardTable:
    """shards: int64 [n, 3 + operands] on the device; a row: length, first index, first program, and per operand the
    element at which the shard begins, counted from the base pointer. owners: int32 [programs], the row of a program."""

    shards: Tensor
    owners: Tensor


def shard_tables(
    operands: Sequence[Sequence[Tensor]], first_indices: Sequence[int], chunk: int
) -> list[tuple[bool, list[Tensor | None], ShardTable]]:
    """(aligned, base of each operand, table) for at most two launches over flat tensors, `chunk` elements a program.

    aligned: every operand begins at a multiple of 16 bytes, lengths are multiples of 16 and first indices of 4, so that
    all accesses can be wide. Shards for which that does not hold go into a table of their own, in which the chunks
    begin `first index % 4` elements early. An operand without tensors has base None; empty shards have no program.

    The table is cached: its content is a pure function of addresses and lengths.

    Raises:
        RuntimeError: a CUDA graph is being captured and the table is not on the device yet.
    """
    addresses = [[tensor.data_ptr() for tensor in operand] for operand in operands]
    lengths = [len(tensor) for tensor in operands[0]]
    groups: dict[bool, list[int]] = {True: [], False: []}
    for n, (length, first) in enumerate(zip(lengths, first_indices, strict=True)):
        if length:
            aligned = length % 16 == 0 and first % 4 == 0 and all(a[n] % 16 == 0 for a in addresses if a)
            groups[aligned].append(n)
    result = []
    for aligned, group in groups.items():
        if not group:
            continue
        bases = [operand[group[0]] if operand else None for operand in operands]
        begins = [
            [(address[n] - address[group[0]]) // operand[0].element_size() if operand else 0 for n in group]
            for operand, address in zip(operands, addresses)
        ]
        rows = tuple(zip((lengths[n] for n in group), (first_indices[n] for n in group), *begins))
        table = _table(operands[0][0].device, chunk, aligned, rows)
        if table.shards.is_cuda and torch.cuda.is_current_stream_capturing():
            _graph_tables.append(table)
        result.append((aligned, bases, table))
    return result


@lru_cache(maxsize=32)
def _table(device: torch.device, chunk: int, aligned: bool, rows: tuple[tuple[int, ...], ...]) -> ShardTable:
    programs = torch.tensor([cdiv(length + (0 if aligned else first % 4), chunk) for length, first, *_ in rows])
    table = torch.tensor(rows)
    table = torch.cat([table[:, :2], (programs.cumsum(0) - programs)[:, None], table[:, 2:]], 1)
    owners = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(programs)
    if device.type != "cuda":
        return ShardTable(table.to(device), owners.to(device))
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run the step once on these tensors before capturing it in a CUDA graph")
    # From pinned memory the copy does not wait for the device.
    return ShardTable(*(t.contiguous().pin_memory().to(device, non_blocking=True) for t in (table, owners)))
