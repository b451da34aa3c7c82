"""Training checkpoints: written behind the training's back, published by rename, found by looking, verified when read.

A checkpoint is a folder `step-NNNNNNNN` with safetensors shards and `manifest.json`, which holds the step, the data
cursor, the fingerprints that a resume compares, the size of every shard and a CRC-32 of every 2^20 elements. All ranks
write one set of files, as a single process would: the bytes do not depend on the number of ranks, so a run resumes on
any other number by reading other ranges. There is no pointer file that could be stale: the latest checkpoint is the
highest step whose folder is whole. Random generators have no state here: all randomness is keyed by step and position.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import fsync_folder, make_manifest, read_manifest, remove_stale_temporaries, write_manifest
from .crc32 import crc32_concat
from .ranks import Piece, Ranks
from .safetensors_io import SafetensorsFolder, SafetensorsWriter, TensorSpec, bytes_of, is_finite
from .shards import local_shard
from .staging import HostMemory, Staging

KIND = "checkpoint"
_SHARD_BYTES = 4 << 30
_CELL = 1 << 20  # elements of a tensor that have a checksum of their own, and are read and written at a time
_CELL_BYTES = _CELL * 8  # of the widest dtype


class DamagedCheckpoint(ValueError):
    """Files of a checkpoint are missing, cut off, or do not have the checksums they were written with."""


@dataclass(frozen=True)
class Restored:
    """path: the checkpoint that was read; progress: as given to `save`; damaged: what is wrong with newer ones."""

    path: Path
    progress: dict[str, Any]
    damaged: list[str]


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first. A damaged one (a shard missing or of another size) is not among them."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if _is_whole(path)]


def read_progress(path: Path) -> dict[str, Any]:
    """Step, cursor and fingerprints as given to `save`."""
    return read_manifest(path, KIND)["config"]


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes of this host left half-written or half-deleted."""
    for entry in folder.glob(".step-*.tmp-*"):
        remove_stale_temporaries(folder / entry.name[1:].split(".tmp-")[0])


class CheckpointWriter:
    """Writes checkpoints of a run into a folder, one at a time, in a thread of its own.

        writer = CheckpointWriter(out / "checkpoints", keep=3, ranks=Ranks.world())
        failure = writer.save(step, engine.state_dict(), progress)      # every rank; returns at once
        ...                                                             # training goes on and changes the state
        failure = writer.wait()

    `save` copies what this rank holds to host memory (reused, page-locked for a GPU; as large as the rank's state), on
    a GPU without waiting for it, and a thread writes and publishes. What goes wrong there, on any rank, a full disk
    above all, becomes a value that the next call returns on every rank: training can go on, nothing half-written is
    left, and the checkpoints before are untouched.

    Args:
        folder: of the run's checkpoints.
        keep: so many of the newest checkpoints stay; the newest healthy one stays in any case.
        ranks: who trains together, in a group that nobody else uses: the thread communicates. None: this process.
        background: False: `save` returns when the checkpoint is published, and needs no memory for a copy.
        parallel_write: see `SafetensorsWriter`.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        ranks: Ranks | None = None,
        *,
        background: bool = True,
        parallel_write: bool = True,
    ) -> None:
        assert keep >= 1, f"keep is {keep}"
        self.folder, self.keep = Path(folder), keep
        self._ranks = ranks or Ranks()
        self._background, self._parallel_write = background, parallel_write
        self._host_memory: HostMemory | None = None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def save(
        self, step: int, state: Mapping[str, Tensor], progress: Mapping[str, Any], healthy: bool = True
    ) -> Exception | None:
        """Begin a checkpoint, once the one before is done. All ranks must call it, with the same names and shapes.

        Args:
            state: plain tensors, the same on all ranks, and DTensors.
            progress: JSON values; `read_progress` returns them with `step` added.
            healthy: whether training is in a state worth going back to. A state with NaN or Inf never is.

        Returns:
            What went wrong with the checkpoint before (without `background`: with this one), or None.
        """
        failure = self.wait()
        pieces: Iterable[Piece] = ()
        specs: list[TensorSpec] = []
        ready: torch.cuda.Event | None = None
        error: Exception | None = None
        try:
            specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
            if self._background:
                pieces, ready = self._copy(state)
            else:
                pieces = _stream(_pieces(state, self._ranks))
        except Exception as raised:  # memory, say: the others must hear of it, and training goes on
            error = raised

        def write() -> None:
            try:
                with self._ranks.together():
                    if error is not None:
                        raise error
                    if ready is not None:
                        ready.synchronize()
                self._publish(step, specs, pieces, progress, healthy)
            except Exception as raised:
                self._failure = raised

        if not self._background:
            write()
            return self.wait()
        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()
        return failure

    def wait(self) -> Exception | None:
        """Wait for the checkpoint in hand; what went wrong with it, or None. Says so once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    @torch.no_grad()
    def _copy(self, state: Mapping[str, Tensor]) -> tuple[list[Piece], torch.cuda.Event | None]:
        """Host copies of what this rank writes; on a GPU they are right once the event has happened."""
        on_device = list(_pieces(state, self._ranks))
        device = next((values.device for _, _, values in on_device if values.is_cuda), torch.device("cpu"))
        if self._host_memory is None:
            self._host_memory = HostMemory(device)
        self._host_memory.reset()
        pieces = []
        for name, first, values in on_device:
            host = self._host_memory.take(values.numel(), values.dtype)
            pieces.append((name, first, host.copy_(values, non_blocking=True)))
        if device.type != "cuda":
            return pieces, None
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(device))
        return pieces, ready

    def _publish(
        self, step: int, specs: list[TensorSpec], pieces: Iterable[Piece], progress: Mapping[str, Any], healthy: bool
    ) -> None:
        ranks = self._ranks
        with ranks.published_folder(checkpoint_path(self.folder, step), replace=True) as folder:
            sums: list[tuple[str, int, int, int]] = []  # name, first element, bytes, CRC-32

            def checked() -> Iterator[Piece]:
                nonlocal healthy
                for name, first, values in pieces:
                    view = bytes_of(values)
                    sums.append((name, first, len(view), zlib.crc32(view)))
                    healthy = healthy and is_finite(values)
                    yield name, first, values

            with SafetensorsWriter(
                folder, specs, max_shard_bytes=_SHARD_BYTES, ranks=ranks, parallel=self._parallel_write
            ) as writer:
                writer.write_pieces(checked())
            of_all = ranks.exchange((sums, healthy))
            if ranks.rank == 0:
                figures = {
                    "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
                    "healthy": all(flag for _, flag in of_all),
                }
                checksums = _join_sums(specs, [entry for entries, _ in of_all for entry in entries])
                config = {**progress, "step": step}
                write_manifest(folder, make_manifest(KIND, config=config, figures=figures, checksums=checksums))
        with ranks.together():
            if ranks.rank == 0:
                self._thin_out(step)

    def _thin_out(self, step: int) -> None:
        """Later ones than `step` are left alone: a run that had to go back past a damaged one will replace it."""
        latest = checkpoint_path(self.folder, step)
        whole = [path for path in list_checkpoints(self.folder) if path.name <= latest.name]
        kept = whole[: self.keep]
        kept += [path for path in whole if read_manifest(path, KIND)["figures"]["healthy"]][:1]
        for path in whole:
            if path not in kept:
                _delete(path)


def load_state(path: Path, state: Mapping[str, Tensor], ranks: Ranks | None = None) -> None:
    """Read a checkpoint into the tensors of a state, in place: every rank what it holds, on any number of ranks.

    Args:
        state: plain tensors and DTensors, with the names of the checkpoint.
        ranks: who shares the state; None: all ranks if any tensor is a DTensor, else this process alone.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape or dtype; nothing is changed then.
        DamagedCheckpoint: naming the file. What was read before is in the state already.
        If one rank finds it, all raise it.
    """
    ranks = ranks or Ranks.of(state.values())
    with contextlib.ExitStack() as stack:
        with ranks.together(), _damage_named(path):
            source = stack.enter_context(SafetensorsFolder(path))
            checksums: dict[str, str] = read_manifest(path, KIND)["checksums"]
        with ranks.together():
            _check_entries(path, source, state)
        with ranks.together(), _damage_named(path):
            _read(source, checksums, state)


def load_newest(folder: Path, state: Mapping[str, Tensor], ranks: Ranks | None = None) -> Restored | None:
    """`load_state` from the newest of `list_checkpoints` that is not damaged; None if there are none.

    Raises:
        DamagedCheckpoint: not one of them has the checksums it was written with.
        ValueError: the newest is of another model or optimizer: see `load_state`.
    """
    ranks = ranks or Ranks.of(state.values())
    with ranks.together():
        found = list_checkpoints(folder) if ranks.rank == 0 else []
    damaged: list[str] = []
    for path in ranks.exchange(found)[0]:
        try:
            load_state(path, state, ranks)
        except DamagedCheckpoint as error:
            damaged.append(str(error))
        else:
            return Restored(path, read_progress(path), damaged)
    if damaged:
        raise DamagedCheckpoint(f"{folder}: no checkpoint can be read: {'; '.join(damaged)}")
    return None


def verify_checksums(path: Path) -> list[str]:
    """What of a checkpoint does not have the checksums it was written with: a line for each tensor."""
    checksums = read_manifest(path, KIND)["checksums"]
    problems = []
    with SafetensorsFolder(path) as source:
        staging = Staging(torch.device("cpu"), _CELL_BYTES)
        for name in source.names:
            count = source.numel(name)
            try:
                for cell in source.read_ahead((name, lo, min(lo + _CELL, count)) for lo in range(0, count, _CELL)):
                    _read_cell(source, checksums.get(name, ""), *cell, staging)
            except DamagedCheckpoint as error:
                problems.append(str(error))
    return problems


def _pieces(state: Mapping[str, Tensor], ranks: Ranks) -> Iterator[Piece]:
    """What this rank writes, cut at the borders of the cells; views."""
    for name, tensor in state.items():
        shard = local_shard(tensor)
        for lo in range(shard.first - shard.first % _CELL, shard.last, _CELL):
            first, values = shard.part_of(lo, lo + _CELL)
            if values.numel() and (shard.writes or ranks.size == 1):
                yield name, lo + first, values


def _stream(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces on the host, one after the other."""
    listed = list(pieces)
    device = listed[0][2].device if listed else torch.device("cpu")
    on_host = Staging(device, _CELL_BYTES).to_host(values for _, _, values in listed)
    return ((name, first, values) for (name, first, _), values in zip(listed, on_host))


def _join_sums(specs: list[TensorSpec], sums: list[tuple[str, int, int, int]]) -> dict[str, str]:
    """{tensor: CRC-32 of its cells, 8 hexadecimal digits each}. A cell that was written by several ranks, each a part,
    gets the sum of the whole."""
    cells: dict[str, list[int]] = {name: [] for name, _, _ in specs}
    for name, first, num_bytes, crc in sorted(sums, key=lambda entry: entry[:2]):
        if first % _CELL == 0:
            cells[name].append(crc)
        else:
            cells[name][-1] = crc32_concat(cells[name][-1], crc, num_bytes)
    return {name: "".join(f"{crc:08x}" for crc in each) for name, each in cells.items()}


def _check_entries(path: Path, source: SafetensorsFolder, state: Mapping[str, Tensor]) -> None:
    for problem, names in (
        ("missing", state.keys() - set(source.names)),
        ("unexpected", set(source.names) - state.keys()),
    ):
        if names:
            raise ValueError(f"{path}: {len(names)} {problem} tensors, for example {min(names)}")
    for name, tensor in state.items():
        found = (source.dtype(name), source.shape(name))
        if found != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(
                f"{path}: {name} is {found[0]} {list(found[1])}, expected {tensor.dtype} {list(tensor.shape)}"
            )


@torch.no_grad()
def _read(source: SafetensorsFolder, checksums: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    shards = {name: local_shard(state[name]) for name in source.names}
    cells = []
    for name, shard in shards.items():
        if shard.values.numel():
            begins = range(shard.first - shard.first % _CELL, shard.last, _CELL)
            cells += [(name, lo, min(lo + _CELL, shard.total)) for lo in begins]
    staging: Staging | None = None
    for name, lo, hi in source.read_ahead(cells):
        first, part = shards[name].part_of(lo, hi)
        if staging is None or staging.device != part.device:
            staging = Staging(part.device, _CELL_BYTES)
        values = _read_cell(source, checksums.get(name, ""), name, lo, hi, staging)
        part.copy_(values[first : first + part.numel()], non_blocking=True)
        staging.mark()


def _read_cell(source: SafetensorsFolder, checksums: str, name: str, lo: int, hi: int, staging: Staging) -> Tensor:
    """A whole cell, the elements [lo, hi), in a buffer of `staging`, verified."""
    values = source.read_into(name, lo, staging.next_buffer(hi - lo, source.dtype(name)))
    digit = 8 * (lo // _CELL)
    found, expected = f"{zlib.crc32(bytes_of(values)):08x}", checksums[digit : digit + 8]
    if found != expected:
        raise DamagedCheckpoint(
            f"{source.file_of(name)}: elements [{lo}, {hi}) of {name} have CRC-32 {found}, were written with {expected}"
        )
    return values


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """What the files do not hold, or the disk does not give, is damage."""
    try:
        yield
    except DamagedCheckpoint:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{path}: damaged: {error!r}") from error


def _is_whole(path: Path) -> bool:
    try:
        manifest = read_manifest(path, KIND)
        files = manifest["figures"]["files"]
        return "checksums" in manifest and all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _delete(path: Path) -> None:
    """Delete without a moment at which a half-deleted folder looks like a checkpoint: its manifest goes first."""
    (path / "manifest.json").unlink()
    fsync_folder(path)
    shutil.rmtree(path)
