"""One tensor, streamed: its inputs are read piece by piece, shown to the method, merged, rounded once, hashed, written.

Several merges of the same inputs (a sweep over strengths) share one reading. Memory is a few vectors of one piece. The
result depends on neither the size of pieces nor the device (tensor_merge.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.safetensors_io import is_finite
from .arranged import TensorReader
from .plan import TensorPlan
from .tensor_merge import Sums, TensorMerge

BLOCK = 1 << 24  # elements of a piece whose products are formed at once
AHEAD_BYTES = 16 << 20  # of every input; the system is told to read so far ahead

Write = Callable[[int, Tensor], None]  # (first flat element, values)


@dataclass(frozen=True)
class Input:
    """A tensor in a model folder; `model` is its number in the plan."""

    folder: TensorReader
    name: str
    model: int

    def __str__(self) -> str:
        return f"{self.folder.file_of(self.name)}: {self.name}"


@dataclass(frozen=True)
class Target:
    """One result made of a tensor's inputs: its plan, the method that makes it and where it goes."""

    tensor: TensorPlan
    method: TensorMerge
    write: Write


@dataclass(frozen=True)
class Merged:
    """What there is to know of a tensor that is written. `sums`: dot products of the vectors the method saw."""

    sha256: str
    sums: Sums
    figures: dict[str, Any]
    not_finite: list[int]  # models whose tensor holds NaN or infinity; empty unless allowed


class Equal(TensorMerge):
    """An integer tensor, copied if all inputs agree."""

    def pairs(self, models: int) -> list[tuple[int, int]]:
        return []

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        for other in vectors[1:]:
            if not torch.equal(vectors[0], other):
                raise ValueError(
                    f"{self.subject.name}: integer tensor that differs between the models cannot be merged"
                )
        return vectors[0]


def merge_tensor(
    inputs: Sequence[Input],
    targets: Sequence[Target],
    device: torch.device,
    chunk: int,
    allow_not_finite: bool = False,
) -> list[Merged]:
    """Look at the inputs as often as the methods need, then merge, round, hash and write them piece by piece.

    Args:
        inputs: the base first, where there is one.
        targets: whose methods want the same vectors in the same pieces.
        chunk: elements of a piece, a multiple of ROW; more where methods need whole rows or the whole tensor.
        allow_not_finite: NaN and infinity pass through, and are reported, instead of being refused.

    Raises:
        ValueError: naming the file and tensor, for NaN or infinite inputs, or a result that its dtype cannot hold.
    """
    methods = [target.method for target in targets]
    pieces = Pieces(inputs, targets[0].tensor, methods[0], device, chunk)
    pairs = sorted({pair for method in methods for pair in method.pairs(len(inputs))})
    products = _Products(pairs, methods[0].unit)
    known: list[Sums] = []
    not_finite: list[int] = []
    looks = max(method.looks for method in methods)
    for number in range(looks):
        looking = [method for method in methods if number < method.looks]
        for lo, vectors in pieces:
            if not number:
                products.add(vectors)
            for method in looking:
                method.look(number, lo, vectors)
        if not number:
            not_finite = _check(inputs, products, chunk, allow_not_finite)
            known = [products.of(method.pairs(len(inputs))) for method in methods]
        for method, sums in zip(methods, known):
            if number < method.looks:
                method.end_look(number, sums)

    digests = [hashlib.sha256() for _ in targets]
    for lo, vectors in pieces:
        if not looks:
            products.add(vectors)
        for target, digest in zip(targets, digests):
            rounded = target.method.merge(lo, vectors).to(target.tensor.dtype).cpu()
            if not allow_not_finite and not is_finite(rounded):
                _refuse(_not_finite(inputs, chunk))  # the input, if it is to blame
                raise ValueError(f"{target.tensor.name}: the result has values that {rounded.dtype} cannot hold")
            digest.update(rounded.view(torch.uint8).numpy().data)
            target.write(lo, rounded)
    if not looks:
        not_finite = _check(inputs, products, chunk, allow_not_finite)
        known = [products.of(method.pairs(len(inputs))) for method in methods]
    return [
        Merged(digest.hexdigest(), sums, target.method.figures(), not_finite)
        for target, digest, sums in zip(targets, digests, known)
    ]


class Pieces:
    """The inputs of a tensor in pieces, in order: (first flat element, vectors as the method wants them) on the device.

    Can be gone through repeatedly; vectors are overwritten by the next piece. A tensor of one piece is read once.
    Integers stay as they are.
    """

    def __init__(
        self, inputs: Sequence[Input], tensor: TensorPlan, method: TensorMerge, device: torch.device, chunk: int
    ) -> None:
        self._inputs, self._numel = inputs, tensor.numel
        self._chunk = min(_piece(tensor, method, chunk), tensor.numel)
        pinned = device.type == "cuda"
        dtypes = [source.folder.dtype(source.name) for source in inputs]
        self._raw = [torch.empty(self._chunk, dtype=dtype, pin_memory=pinned) for dtype in dtypes]
        # vectors[i] is made from raw[i]; the same memory where nothing has to be converted
        self._values = [
            raw
            if not raw.is_floating_point() or (raw.dtype == torch.float32 and device.type == "cpu")
            else torch.empty(self._chunk, device=device)
            for raw in self._raw
        ]
        self._wanted = method.vectors if tensor.base is not None else "models"
        self._deltas = [torch.empty(self._chunk, device=device) for _ in inputs[1:] if self._wanted == "both"]
        self._ahead = -(-AHEAD_BYTES // max(self._chunk * dtypes[0].itemsize, 1))  # pieces
        self._only: list[Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[int, list[Tensor]]]:
        if self._numel <= self._chunk:
            self._only = self._only or self._load(0, self._numel)
            yield 0, self._only
            return
        for number, lo in enumerate(range(0, self._numel, self._chunk)):
            if number % self._ahead == 0:
                for source in self._inputs:
                    source.folder.will_read(source.name, lo + self._chunk, 2 * self._ahead * self._chunk)
            yield lo, self._load(lo, min(self._chunk, self._numel - lo))

    def _load(self, lo: int, count: int) -> list[Tensor]:
        values = []
        for source, raw, value in zip(self._inputs, self._raw, self._values):
            read = source.folder.read_into(source.name, lo, raw[:count])
            values.append(read if value is raw else value[:count].copy_(read))
        if self._wanted == "models":
            return values
        if self._wanted == "deltas":  # each takes the place of its model
            return [values[0], *(value.sub_(values[0]) for value in values[1:])]
        return values + [torch.sub(value, values[0], out=out[:count]) for value, out in zip(values[1:], self._deltas)]


class _Products:
    """Dot products of pairs of vectors that come in pieces, as `methods.partial_sums` of the whole vectors gives them.

    unit: pieces begin at multiples of it, and rows of that length are added up.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], unit: int) -> None:
        self._parts: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}
        self._unit, self._scratch = unit, torch.empty(0)
        self.finite = True

    def add(self, vectors: Sequence[Tensor]) -> None:
        step = max(BLOCK // self._unit, 1) * self._unit
        for lo in range(0, vectors[0].numel(), step):
            self._add([vector[lo : lo + step] for vector in vectors])

    def _add(self, vectors: Sequence[Tensor]) -> None:
        """The products of all pairs go through one tree of additions: few operations for small pieces."""
        numel, device = vectors[0].numel(), vectors[0].device
        padded = -(-numel // self._unit) * self._unit
        size = len(self._parts) * padded
        if not size:
            return
        if self._scratch.numel() < size or self._scratch.device != device:
            self._scratch = torch.empty(size, device=device)
        products = self._scratch[:size].view(-1, padded)
        products[:, numel:] = 0
        for (i, j), product in zip(self._parts, products):
            torch.mul(vectors[i], vectors[j], out=product[:numel])
        sums = _row_sums(products.view(-1, self._unit)).view(len(products), -1).tolist()
        for (i, j), found in zip(self._parts, sums):
            self._parts[i, j] += found
            if i == j and self.finite:
                self.finite = all(map(math.isfinite, found))

    def of(self, pairs: Sequence[tuple[int, int]]) -> Sums:
        """The dot products, each rounded once, when all pieces have been added."""
        return {pair: _fsum(self._parts[pair]) for pair in pairs}


def _row_sums(rows: Tensor) -> Tensor:
    """`methods.tree_sum` of rows, which are overwritten: nothing is allocated."""
    length = rows.shape[1]
    while length > 1:
        half = length // 2
        rows[:, :half].add_(rows[:, length - half : length])
        length -= half
    return rows[:, 0].contiguous()


def _fsum(values: Sequence[float]) -> float:
    """math.fsum, which refuses to add infinities of both signs."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan


def _check(inputs: Sequence[Input], products: _Products, chunk: int, allowed: bool) -> list[int]:
    """Models whose tensor holds NaN or infinity. A square that is not finite tells, unless it has only overflowed."""
    found = [] if products.finite else _not_finite(inputs, chunk)
    if not allowed:
        _refuse(found)
    return [source.model for source in found]


def _refuse(not_finite: Sequence[Input]) -> None:
    if not_finite:
        raise ValueError(f"{not_finite[0]} holds NaN or infinite values")


def _not_finite(inputs: Sequence[Input], chunk: int) -> list[Input]:
    return [source for source in inputs if not _holds_finite(source, chunk)]


def _holds_finite(source: Input, chunk: int) -> bool:
    numel = source.folder.numel(source.name)
    buffer = torch.empty(min(chunk, numel), dtype=source.folder.dtype(source.name))
    return all(
        is_finite(source.folder.read_into(source.name, lo, buffer[: min(chunk, numel - lo)]))
        for lo in range(0, numel, chunk)
    )


def _piece(tensor: TensorPlan, method: TensorMerge, chunk: int) -> int:
    """Elements read at once: a multiple of the method's unit, or everything."""
    return max(tensor.numel if method.pieces == "whole" else -(-chunk // method.unit) * method.unit, 1)
