"""Reading and writing folders of safetensors files, by tensor, by rows or by ranges of elements.

The format (https://github.com/huggingface/safetensors) is 8 bytes of header length, a JSON header with dtype, shape and
byte range of each tensor, and the bytes. A folder holds either `model.safetensors`, or shards and
`model.safetensors.index.json`. Headers are read and written here so that a damaged file is named before any tensor is
read, bytes move by pread and pwrite between file and caller's memory (no mapping: resident memory stays what the caller
allocates), and any number of threads and processes may read and write at once. Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ranks import Piece, Ranks

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_AHEAD_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library

TensorSpec = tuple[str, torch.dtype, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: `offset` is the absolute position of its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class SafetensorsFolder:
    """The tensors of a model folder, read when asked for. Safe to use from several threads.

    `names` and iteration are in file order: shard by shard, by position in the shard, which is the order that reads
    a disk sequentially. `metadata` is the free text metadata of the first file.

    Args:
        path: the folder.
        single_file: goes before an index, as in transformers.

    Raises:
        FileNotFoundError: no safetensors in the folder, or a shard that the index names is not there.
        ValueError: a damaged or truncated file, an index that does not agree with its shards, an unknown dtype.
    """

    def __init__(self, path: str | Path, *, single_file: str = SINGLE_FILE) -> None:
        self.path = Path(path)
        weight_map = None if (self.path / single_file).is_file() else self._read_index()
        files = sorted(set(weight_map.values())) if weight_map is not None else [single_file]
        self._entries: dict[str, _Entry] = {}
        self._descriptors: dict[Path, int] = {}
        self.metadata: dict[str, str] = {}
        try:
            for number, file_name in enumerate(files):
                file = self.path / file_name
                if not file.is_file():
                    raise FileNotFoundError(f"{file}: not found, but {INDEX_FILE} names it")
                self._descriptors[file] = os.open(file, os.O_RDONLY)
                entries, metadata = _read_header(file, self._descriptors[file])
                if number == 0:
                    self.metadata = metadata
                for name in entries.keys() & self._entries.keys():
                    raise ValueError(f"{file}: tensor {name} is also in {self._entries[name].file.name}")
                self._entries.update(entries)
            if weight_map is not None:
                self._check_index(weight_map)
        except BaseException:
            self.close()
            raise

    def _read_index(self) -> dict[str, str]:
        """{tensor: file name} of the index."""
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path}: not found, or not a folder")
        index = self.path / INDEX_FILE
        if not index.is_file():
            pickles = sorted(entry.name for entry in self.path.iterdir() if entry.suffix in (".bin", ".pt", ".pth"))
            hint = f"; {pickles[0]} is a pickle, and only safetensors are read" if pickles else ""
            raise FileNotFoundError(f"{self.path}: neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: not a JSON object with a weight_map ({error!r})") from None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map must be a JSON object from tensor names to file names, not empty")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: weight_map[{name!r}] is {file!r}; allowed: the name of a file beside it")
        return weight_map

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        index = self.path / INDEX_FILE
        for name, file_name in weight_map.items():
            found = self._entries.get(name)
            if found is None or found.file.name != file_name:
                where = "no shard holds it" if found is None else f"{found.file.name} holds it"
                raise ValueError(f"{index}: tensor {name} should be in {file_name}, but {where}")
        for name, entry in self._entries.items():
            if name not in weight_map:
                raise ValueError(f"{entry.file}: holds tensor {name}, which {INDEX_FILE} does not name")

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._entries)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return list(self._descriptors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(entry.numel * entry.dtype.itemsize for entry in self._entries.values())

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def numel(self, name: str) -> int:
        return self._entry(name).numel

    def file_of(self, name: str) -> Path:
        return self._entry(name).file

    def get(self, name: str) -> Tensor:
        """The whole tensor, on the CPU in the dtype of the file, in memory of its own."""
        entry = self._entry(name)
        return self._read(entry, 0, torch.empty(entry.shape, dtype=entry.dtype))

    def get_slice(self, name: str, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) of the first dimension. ValueError unless 0 <= lo <= hi <= rows."""
        entry = self._entry(name)
        if not entry.shape or not 0 <= lo <= hi <= entry.shape[0]:
            raise ValueError(f"{name}: rows [{lo}, {hi}) of a tensor of shape {list(entry.shape)}")
        rows = torch.empty((hi - lo, *entry.shape[1:]), dtype=entry.dtype)
        return self._read(entry, lo * math.prod(entry.shape[1:]), rows)

    def read_into(self, name: str, lo: int, out: Tensor) -> Tensor:
        """Fill `out`, a contiguous 1-D CPU tensor of the file's dtype, with the flat elements [lo, lo + len(out))."""
        entry = self._entry(name)
        if out.dim() != 1 or out.dtype != entry.dtype or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(f"{name}: the buffer must be contiguous, 1-D, on the CPU and {entry.dtype}")
        if lo < 0 or lo + out.numel() > entry.numel:
            raise ValueError(f"{name}: elements [{lo}, {lo + out.numel()}) of {entry.numel}")
        return self._read(entry, lo, out)

    def will_read(self, name: str, lo: int, count: int) -> None:
        """Tell the system that `count` elements from `lo` on, or those there are, will be read soon: it reads ahead."""
        entry = self._entry(name)
        if hasattr(os, "posix_fadvise") and (count := min(count, entry.numel - lo)) > 0:
            first, size = entry.offset + lo * entry.dtype.itemsize, count * entry.dtype.itemsize
            os.posix_fadvise(self._descriptors[entry.file], first, size, os.POSIX_FADV_WILLNEED)

    def span(self, name: str) -> tuple[int, int]:
        """The positions in its file at which a tensor's bytes begin and end."""
        entry = self._entry(name)
        return entry.offset, entry.offset + entry.numel * entry.dtype.itemsize

    def read_ahead(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
        """The ranges (name, lo, hi) of flat elements as they are given, each a little after the system was told that it
        will be read: the disk works while what came before is being used, which makes cold reads several times
        faster. Ranges of a few megabytes do best."""
        coming: deque[tuple[str, int, int]] = deque()
        num_bytes = 0
        for name, lo, hi in ranges:
            size = (hi - lo) * self._entry(name).dtype.itemsize
            self.will_read(name, lo, hi - lo)
            coming.append((name, lo, hi))
            num_bytes += size
            while num_bytes > _AHEAD_BYTES:
                ready = coming.popleft()
                num_bytes -= (ready[2] - ready[1]) * self._entry(ready[0]).dtype.itemsize
                yield ready
        yield from coming

    def _read(self, entry: _Entry, first: int, out: Tensor) -> Tensor:
        """Fill contiguous `out` from element `first` on."""
        return _pread(entry, self._descriptors[entry.file], first, out)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(f"{self.path}: no tensor {name}")
        return self._entries[name]

    def close(self) -> None:
        """Close the files. A folder that is no longer referenced closes itself."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()


def _read_header(file: Path, descriptor: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Tensors of one file in the order of their bytes, and its metadata; everything the header claims is checked."""
    file_bytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
        raise ValueError(f"{file}: not a safetensors file (its header would have {header_bytes} bytes)")
    if 8 + header_bytes > file_bytes:
        raise ValueError(f"{file}: truncated: the header has {header_bytes} bytes, the file {file_bytes}")
    try:
        header = json.loads(os.pread(descriptor, header_bytes, 8).decode())
        if not isinstance(header, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ValueError(f"{file}: not a safetensors file (header is not valid JSON: {error})") from None
    metadata = header.pop("__metadata__", None) or {}

    entries: list[tuple[int, str, _Entry]] = []
    for name, value in header.items():
        dtype, shape, (begin, end) = _read_entry(file, name, value)
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{file}: {name} is {dtype} {list(shape)}, but has {end - begin} bytes")
        entries.append((begin, name, _Entry(file, dtype, shape, 8 + header_bytes + begin)))
    entries.sort(key=lambda item: (item[0], item[2].numel))
    position = 0
    for begin, name, entry in entries:
        if begin != position:
            raise ValueError(f"{file}: {name} begins at byte {begin} of the data, expected {position}")
        position += entry.numel * entry.dtype.itemsize
    expected = 8 + header_bytes + position
    if expected != file_bytes:
        what = "truncated" if expected > file_bytes else "has bytes that belong to no tensor"
        raise ValueError(f"{file}: {what}: by its header it has {expected} bytes, found {file_bytes}")
    return {name: entry for _, name, entry in entries}, metadata


def _read_entry(file: Path, name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    try:
        dtype_name, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if any(not isinstance(size, int) or size < 0 for size in (*shape, begin, end)) or begin > end:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{file}: damaged header entry of {name}: {value!r}") from None
    if dtype_name not in DTYPES:
        raise ValueError(f"{file}: {name} has dtype {dtype_name}; supported: {', '.join(DTYPES)}")
    return DTYPES[dtype_name], shape, (begin, end)


def _pread(entry: _Entry, descriptor: int, first: int, out: Tensor) -> Tensor:
    """Fill contiguous `out` with a tensor's elements from `first` on."""
    view = bytes_of(out)
    offset, done = entry.offset + first * entry.dtype.itemsize, 0
    while done < len(view):  # one call reads 2 GiB at most
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(f"{entry.file}: ended at byte {offset + done}; it was shortened while being read")
        done += count
    return out


def dtype_name(dtype: object) -> str:
    """As config.json and messages have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or Inf; integers never are. aminmax passes NaN on, and allocates nothing."""
    if not values.is_floating_point() or not values.numel():
        return True
    if values.dtype.itemsize == 1:  # fp8, which aminmax does not know
        values = values.float()
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsWriter:
    """Writes tensors, whole or in ranges, in any order and from any thread, into files laid out beforehand.

        with atomic_folder(out) as folder, SafetensorsWriter(folder, specs) as writer:
            writer.write(name, tensor)             # or writer.write_range(name, lo, flat_tensor)

    All files get their header and full size at once, so a disk too small is found before any work; `close` checks
    that every element was written exactly once, makes the files durable and writes the index. Publishing is the
    folder's matter.

    Several processes can write one set of files: each makes a writer with the same arguments, writes its own ranges and
    closes it, and rank 0 creates the files, compares what was written and writes the index. An error of one is then
    raised on all. What the files hold does not depend on who wrote what.

    Args:
        folder: existing folder for the files.
        specs: (name, dtype, shape) of each tensor, in the order in which the files shall hold them. Within a file
            wider dtypes go first, which keeps every tensor aligned.
        max_shard_bytes: a file is begun when the next tensor would make the current one larger.
        metadata: free text of the header; transformers wants `format: pt`.
        file_of: {name: file name} of an existing layout to repeat, instead of `max_shard_bytes`.
        resume: files that an interrupted writer of the same specs left behind are gone on with; others are made anew.
            Nothing counts as written until `adopt` says so.
        ranks: the processes that write together.
        parallel: all ranks write at the same time. False, for file systems on which processes cannot write one file
            side by side: `write_pieces` sends what the others hold to rank 0, which alone touches the files.

    Raises:
        ValueError: a name twice, a dtype the format does not have, wrong values given to write, parts left out.
        OSError: naming the file, when the disk is full.
    """

    def __init__(
        self,
        folder: str | Path,
        specs: Iterable[TensorSpec],
        max_shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        *,
        file_of: Mapping[str, str] | None = None,
        resume: bool = False,
        ranks: Ranks | None = None,
        parallel: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._ranks = ranks or Ranks()
        self._gathers = not parallel and self._ranks.size > 1
        self._entries: dict[str, _Entry] = {}
        self._descriptors: dict[Path, int] = {}
        self._written: dict[str, list[tuple[int, int]]] = {}  # by tensor: sorted element ranges, neighbours joined
        self._lock = threading.Lock()
        self.bytes_written, self._closed = 0, False
        try:
            with self._ranks.together():
                shards = _plan_shards(list(specs), max_shard_bytes, file_of)
                self._files = [self.folder / file_name for file_name in shards]
                for file, shard in zip(self._files, shards.values()):
                    header, num_bytes = self._lay_out(file, shard, {"format": "pt"} if metadata is None else metadata)
                    if self._ranks.rank == 0 and not (resume and self._reopen(file, header, num_bytes)):
                        self._descriptors[file] = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                        _reserve(file, self._descriptors[file], num_bytes)
                        self._pwrite(file, memoryview(header), 0)
            with self._ranks.together():
                if self._ranks.rank > 0 and parallel:
                    self._descriptors.update((file, os.open(file, os.O_WRONLY)) for file in self._files)
        except BaseException:
            self._close_files()
            raise

    def _lay_out(self, file: Path, shard: list[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, int]:
        """Header and size of a file; notes where its tensors lie."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        begins, end = [], 0
        for name, dtype, shape in shard:
            begins.append(end)
            end += math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begins[-1], end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        for (name, dtype, shape), begin in zip(shard, begins):
            self._entries[name] = _Entry(file, dtype, tuple(shape), 8 + len(text) + begin)
            self._written[name] = []
        return struct.pack("<Q", len(text)) + text, 8 + len(text) + end

    def _reopen(self, file: Path, header: bytes, num_bytes: int) -> bool:
        """Whether an interrupted writer left just this file; it is open then. Another one in its place is removed."""
        if not file.is_file():
            return False
        self._descriptors[file] = os.open(file, os.O_RDWR)
        size = os.fstat(self._descriptors[file]).st_size
        if size == num_bytes and os.pread(self._descriptors[file], len(header), 0) == header:
            return True
        os.close(self._descriptors.pop(file))
        file.unlink()
        return False

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor of the declared dtype and shape, from any device."""
        shape = self._entry(name).shape
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: given shape {list(tensor.shape)}, declared {list(shape)}")
        self.write_range(name, 0, tensor.detach().reshape(-1))

    def write_range(self, name: str, lo: int, values: Tensor) -> None:
        """Write the flat elements [lo, lo + len(values)) of a tensor. Each element may be written once."""
        entry, hi = self._entry(name), lo + values.numel()
        if values.dim() != 1 or values.dtype != entry.dtype:
            raise ValueError(f"{name}: given {values.dtype} of {values.dim()} dimensions, declared {entry.dtype}, 1-D")
        if lo < 0 or hi > entry.numel:
            raise ValueError(f"{name}: elements [{lo}, {hi}) of {entry.numel}")
        if values.numel() == 0:
            return
        with self._lock:
            _claim(self._written[name], lo, hi, name)
            self.bytes_written += values.numel() * values.dtype.itemsize
        self._pwrite(entry.file, bytes_of(values.cpu().contiguous()), entry.offset + lo * entry.dtype.itemsize)

    def write_pieces(self, pieces: Iterable[Piece]) -> None:
        """Write ranges (name, lo, values) as `write_range` does, best in the order of the files. All ranks must call
        it, each with what it holds of the tensors; it returns when all are done."""
        with self._ranks.together():
            if not self._gathers:
                for name, lo, values in pieces:
                    self.write_range(name, lo, values)
                return
            with contextlib.closing(self._ranks.gather_pieces(pieces)) as gathered:
                for name, lo, values in gathered:
                    self.write_range(name, lo, values)

    def read_into(self, name: str, lo: int, out: Tensor) -> Tensor:
        """Fill `out`, a contiguous 1-D CPU tensor of the declared dtype, with what the file holds from element `lo`."""
        entry = self._entry(name)
        return _pread(entry, self._descriptors[entry.file], lo, out)

    def adopt(self, name: str) -> None:
        """Count a whole tensor as written: an interrupted writer did it, and the caller has checked its bytes."""
        with self._lock:
            _claim(self._written[name], 0, self._entry(name).numel, name)

    def sync(self) -> None:
        """Make durable what has been written so far; while other threads write on."""
        for file, descriptor in self._descriptors.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None

    def _pwrite(self, file: Path, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(self._descriptors[file], view[done:], offset + done)
            except OSError as error:
                raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(entry.file for entry in self._entries.values()))

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise ValueError(f"{self.folder}: tensor {name} was not declared")
        return self._entries[name]

    def close(self) -> None:
        """Check that nothing is missing, make all files durable, and write the index if there are several. Once."""
        if self._closed:
            return
        self._closed = True
        try:
            with self._ranks.together():
                for descriptor in self._descriptors.values():
                    os.fsync(descriptor)
        finally:
            self._close_files()
        written_by_all = self._ranks.exchange(self._written)
        with self._ranks.together():
            if self._ranks.rank == 0:
                self._check_complete(written_by_all)
                self._write_index()

    def _check_complete(self, written_by_all: list[dict[str, list[tuple[int, int]]]]) -> None:
        for name, entry in self._entries.items():
            ranges: list[tuple[int, int]] = []
            for written in written_by_all:
                for lo, hi in written[name]:
                    _claim(ranges, lo, hi, name)
            if entry.numel and ranges != [(0, entry.numel)]:
                count = sum(hi - lo for lo, hi in ranges)
                raise ValueError(f"{entry.file}: {name} has {count} of {entry.numel} elements written")

    def _write_index(self) -> None:
        if [file.name for file in self._files] == [SINGLE_FILE]:
            return
        weight_map = {name: entry.file.name for name, entry in sorted(self._entries.items())}
        total = sum(entry.numel * entry.dtype.itemsize for entry in self._entries.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with open(self.folder / INDEX_FILE, "w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, exc_type: object, *exc_info: object) -> None:
        if exc_type is None:
            self.close()
        else:
            self._close_files()


def _plan_shards(
    specs: list[TensorSpec], max_shard_bytes: int, file_of: Mapping[str, str] | None
) -> dict[str, list[TensorSpec]]:
    """{file name: its tensors in the order of their bytes}."""
    if not specs:
        raise ValueError("specs: no tensors to write")
    seen: set[str] = set()
    for name, dtype, _ in specs:
        if name in seen or name == "__metadata__":
            raise ValueError(f"specs: tensor name {name} is given twice or reserved")
        if dtype not in _DTYPE_NAMES:
            raise ValueError(f"specs: {name} has {dtype}, which safetensors cannot hold")
        seen.add(name)

    if file_of is not None:
        shards: dict[str, list[TensorSpec]] = {}
        for spec in specs:
            shards.setdefault(file_of[spec[0]], []).append(spec)
    else:
        groups: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in specs:
            size = math.prod(spec[2]) * spec[1].itemsize
            if groups[-1] and size > max(max_shard_bytes - filled, 0):
                groups.append([])
                filled = 0
            groups[-1].append(spec)
            filled += size
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        shards = dict(zip(names if len(groups) > 1 else [SINGLE_FILE], groups))
    return {file: sorted(shard, key=lambda spec: -spec[1].itemsize) for file, shard in shards.items()}


def _reserve(file: Path, descriptor: int, size: int) -> None:
    """Give a new file its full size and, where the system can, its disk blocks."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(file)) from None


def _claim(written: list[tuple[int, int]], lo: int, hi: int, name: str) -> None:
    """Add [lo, hi) to sorted, disjoint ranges, joined with its neighbours. ValueError if any of it is there already."""
    at = bisect_left(written, (lo, hi))
    for other in written[max(at - 1, 0) : at + 1]:
        if other[0] < hi and lo < other[1]:
            raise ValueError(f"{name}: elements [{max(lo, other[0])}, {min(hi, other[1])}) are written twice")
    if at < len(written) and written[at][0] == hi:
        hi = written.pop(at)[1]
    if at > 0 and written[at - 1][1] == lo:
        lo = written.pop(at - 1)[0]
    insort(written, (lo, hi))
