"""The processes of one job, as whoever reads or writes files together needs them: no rank waits for one that gave up.

Loading, exporting and checkpoints need little communication but must fail together: a NaN or a full disk that one rank
meets has to end the work of all, by name. So there is one primitive, `exchange`, through which everything goes: each
rank brings a value or an error, and gets all values, or the first error. It runs over gloo in a group of its own, on
host memory, and never longer than the group's timeout. Knows no files but the folder that all ranks publish.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.files import atomic_folder

TIMEOUT_SECONDS = 600.0  # the slowest rank's reading or writing must fit in
_AGREED = "_steep_agreed"  # marks an error that all ranks raise: it passes through without being exchanged again

T = TypeVar("T")
Piece = tuple[str, int, Tensor]  # name of a tensor, first flat element, values: 1-D, contiguous, on the CPU


class Ranks:
    """`Ranks()` is a process alone, for which nothing is communicated; `Ranks.world()` are all of the job."""

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._group = group
        self._timeout = timedelta(seconds=timeout_seconds)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def world(cls, timeout_seconds: float = TIMEOUT_SECONDS) -> Ranks:
        """All ranks of the default process group, in a gloo group of their own. Every rank must call it; whatever
        communicates from a thread of its own needs one of its own."""
        timeout = timedelta(seconds=timeout_seconds)
        return cls(dist.new_group(backend="gloo", timeout=timeout), timeout_seconds)

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Ranks:
        """All ranks if any of the tensors is a DTensor, else this process alone. One group per job."""
        if all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
            return cls()
        global _shared
        if _shared is None or _shared[0] is not dist.group.WORLD:
            _shared = (dist.group.WORLD, cls.world())
        return _shared[1]

    def exchange(self, value: Any = None, error: Exception | None = None) -> list[Any]:
        """The values of all ranks, by rank. Every rank must call it, equally often.

        Raises:
            the error of the lowest rank that brought one, on all ranks, with a note that says which rank;
            RuntimeError: a rank is dead, or did not come in time; on rank 0 the message names it.
        """
        if self._group is None:
            if error is not None:
                raise error
            return [value]
        answers: list[Any] = [None] * self.size
        with self._peers_alive():
            dist.monitored_barrier(self._group, self._timeout, wait_all_ranks=True)
            dist.all_gather_object(answers, (value, _portable(error)), self._group)
        for rank, (_, raised) in enumerate(answers):
            if raised is not None:
                chosen = error if rank == self.rank and error is not None else raised
                chosen.add_note(f"(on rank {rank} of {self.size}; all ranks were stopped)")
                raise _agreed(chosen)
        return [value for value, _ in answers]

    def from_first(self, function: Callable[[], T]) -> T:
        """The result of a function that only rank 0 calls; what it raises is raised on all."""
        value = error = None
        if self.rank == 0:
            try:
                value = function()
            except Exception as raised:
                error = raised
        return self.exchange(value, error)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error in the block of any rank is raised on all, at the end of their blocks. Blocks may be nested and may
        exchange values: a rank that fails meets the others at whichever exchange they come to next."""
        try:
            yield
        except Exception as error:
            if not hasattr(error, _AGREED):
                self.exchange(error=error)
            raise
        self.exchange()

    @contextlib.contextmanager
    def published_folder(self, path: str | Path, *, replace: bool = False) -> Iterator[Path]:
        """`atomic_folder` for all ranks: rank 0 makes and publishes it, and only if no rank had an error."""
        with contextlib.ExitStack() as stack:
            made = None
            with self.together():
                if self.rank == 0:
                    made = stack.enter_context(atomic_folder(path, replace=replace))
            folder = self.exchange(made)[0]
            with self.together():
                yield folder
            with self.together():
                stack.close()

    def gather_pieces(self, pieces: Iterable[Piece]) -> Generator[Piece]:
        """On rank 0 the pieces of all ranks, a piece of each in turn; on the others nothing, while they are sent.

        Rank 0 asks for every piece, so that it can stop the others: it does when its iterator is closed. An error in a
        rank's own `pieces` is raised on that rank, and ends the iteration on rank 0: to be used under `together`.
        """
        if self.rank == 0:
            yield from self._receive_pieces(pieces)
            return
        iterator = iter(pieces)
        while self._receive(0):
            try:
                piece = next(iterator, None)
            except Exception:
                self._send(False, 0)
                raise
            if piece is None:
                self._send(None, 0)
                return
            name, first, values = piece
            self._send((name, first, values.dtype, values.numel()), 0)
            with self._peers_alive(0):
                dist.send(values.view(torch.uint8), 0, self._group)

    def _receive_pieces(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        own, senders = iter(pieces), list(range(1, self.size))
        try:
            while senders:
                yield from _next_of(own)
                for rank in list(senders):
                    self._send(True, rank)
                    header = self._receive(rank)
                    if not header:
                        senders.remove(rank)
                        if header is False:  # it failed, and goes to the exchange
                            return
                        continue
                    name, first, dtype, count = header
                    values = torch.empty(count, dtype=dtype)
                    with self._peers_alive(rank):
                        dist.recv(values.view(torch.uint8), rank, self._group)
                    yield name, first, values
            yield from own
        finally:
            for rank in senders:
                self._send(False, rank)

    def _send(self, value: Any, rank: int) -> None:
        with self._peers_alive(rank):
            dist.send_object_list([value], rank, self._group)

    def _receive(self, rank: int) -> Any:
        box = [None]
        with self._peers_alive(rank):
            dist.recv_object_list(box, rank, self._group)
        return box[0]

    @contextlib.contextmanager
    def _peers_alive(self, peer: int | None = None) -> Iterator[None]:
        """What gloo says when a peer died or does not answer, as an error that needs no agreement any more."""
        try:
            yield
        except RuntimeError as error:
            who = "another rank" if peer is None else f"rank {peer}"
            message = f"rank {self.rank} of {self.size}: {who} died or is stuck: {error}"
            raise _agreed(RuntimeError(message)) from None


_shared: tuple[Any, Ranks] | None = None  # the default process group, and the Ranks made for it


def _next_of(iterator: Iterator[Piece]) -> Iterator[Piece]:
    piece = next(iterator, None)
    if piece is not None:
        yield piece


def is_agreed(error: BaseException) -> bool:
    """Whether all ranks raise this error."""
    return hasattr(error, _AGREED)


def _agreed(error: Exception) -> Exception:
    setattr(error, _AGREED, True)
    return error


def _portable(error: Exception | None) -> Exception | None:
    """The error as another process can have it: itself if it can be pickled, else its name and text."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
