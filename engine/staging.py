"""Host memory on the way between files and a device: page-locked, small, used again and again.

Copies from pageable memory block the host and run at a fraction of the bus; page-locked memory is slow to get. So bytes
on their way from a file to a GPU, or back, pass through a few buffers in turn, one being read or written while the
copy of another is under way. On a CPU nothing needs to pass through anything. Knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

_BLOCK_BYTES = 64 << 20  # a power of two: torch rounds page-locked memory up to one


class Staging:
    """Two host buffers of `num_bytes` for a device, in turn."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.device = device
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(1 + pinned)]
        self._copied: list[torch.cuda.Event | None] = [None] * len(self._buffers)
        self._turn = 0

    def next_buffer(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of host memory, free to be written: the last copy out of or into it is done."""
        self._turn = (self._turn + 1) % len(self._buffers)
        self._wait(self._turn)
        return self._buffers[self._turn][: count * dtype.itemsize].view(dtype)

    def mark(self) -> None:
        """Say that the copies from or to the buffer given last are on the device's stream now."""
        if self.device.type == "cuda":
            event = self._copied[self._turn] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))

    def to_host(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Flat device tensors, each at most a buffer large, as host tensors. The next is being copied while one is
        used, which is valid until the next is asked for."""
        if self.device.type != "cuda":
            yield from tensors
            return
        waiting: tuple[int, Tensor] | None = None
        for tensor in tensors:
            host = self.next_buffer(tensor.numel(), tensor.dtype)
            host.copy_(tensor, non_blocking=True)
            self.mark()
            if waiting is not None:
                self._wait(waiting[0])
                yield waiting[1]
            waiting = self._turn, host
        if waiting is not None:
            self._wait(waiting[0])
            yield waiting[1]

    def _wait(self, turn: int) -> None:
        event, self._copied[turn] = self._copied[turn], None
        if event is not None:
            event.synchronize()


class HostMemory:
    """Host memory for copies of many tensors, page-locked for a GPU, given out piece by piece and used anew after
    `reset`. It grows by blocks; a piece larger than a block gets one of its own."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._blocks: list[Tensor] = []
        self.reset()

    def reset(self) -> None:
        """All that was given out is free again."""
        self._block, self._used = 0, 0

    def take(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements, 1-D, aligned to 16 bytes."""
        num_bytes = count * dtype.itemsize
        while self._block < len(self._blocks) and self._used + num_bytes > self._blocks[self._block].numel():
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            size = max(_BLOCK_BYTES, num_bytes)
            self._blocks.append(torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
        taken = self._blocks[self._block][self._used : self._used + num_bytes]
        self._used += -(-num_bytes // 16) * 16
        return taken.view(dtype)
