"""A model whose vocabulary tensors are seen with their rows in the order of another vocabulary.

An `ArrangedModel` reads like the model it wraps, except for the tensors it has a `RowMap` of: their rows come from this
or other models, are means of such rows, zeros, or the mean of all tokens' rows. Reads rows when asked; holds none but
the one that pads. Safe to use from several threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ZERO, MEAN, PAD = -1, -2, -3  # what a row is that is no row of a model
_ROWS = 1024  # read at once for the mean of all rows


class TensorReader(Protocol):
    """The tensors of a model: a SafetensorsFolder, or what reads like one."""

    @property
    def path(self) -> Path: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def files(self) -> list[Path]: ...
    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def numel(self, name: str) -> int: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def file_of(self, name: str) -> Path: ...
    def read_into(self, name: str, lo: int, out: Tensor) -> Tensor:
        """Fill `out`, contiguous, 1-D, on the CPU, of `dtype(name)`, with the flat elements [lo, lo + len(out))."""
        ...

    def will_read(self, name: str, lo: int, count: int) -> None: ...
    def span(self, name: str) -> tuple[int, int]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where each row of one model's arranged tensor comes from.

    models: int64 [rows], the position of a model among the merge's, or ZERO, MEAN, PAD (the mean of all rows that are
        not PAD).
    rows: int64 [rows], the row in that model; of a MEAN the position in `means`.
    means: (model, row) of the rows that are added in this order and divided by their number.
    """

    models: np.ndarray
    rows: np.ndarray
    means: tuple[tuple[tuple[int, int], ...], ...] = ()

    def runs(self, lo: int, hi: int) -> Iterator[tuple[int, int, int, int]]:
        """(first, last, model, row): output rows [first, last) are consecutive rows of one model from `row` on, or all
        ZERO, or all PAD; a MEAN stands alone."""
        models, rows = self.models[lo:hi], self.rows[lo:hi]
        step = np.where(models[1:] >= 0, 1, 0)
        goes_on = (models[1:] == models[:-1]) & (models[1:] != MEAN) & (rows[1:] == rows[:-1] + step)
        starts = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), hi - lo]
        for first, last in zip(starts, starts[1:]):
            if first < last:
                yield lo + first, lo + last, int(models[first]), int(rows[first])

    def counts(self, own: int) -> dict[str, int]:
        """How many rows are the model's own, another's, means, zeros and padding; `own`: the model's position."""
        return {
            "own": int((self.models == own).sum()),
            "of others": int(((self.models >= 0) & (self.models != own)).sum()),
            "means": int((self.models == MEAN).sum()),
            "zeros": int((self.models == ZERO).sum()),
            "padding": int((self.models == PAD).sum()),
        }


@dataclass(frozen=True, eq=False)
class ArrangedTensor:
    """`tensors`: by model, the name of the tensor there whose rows are taken."""

    tensors: Mapping[int, str]
    row_map: RowMap
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(eq=False)
class ArrangedModel:
    """`base` with the tensors in `arranged` put over it, by name. `models` are all of the merge.

    exact: means are formed in float32 and the padding's in float64, each step one operation on each element; else as
        mergekit does, step by step in the tensor's dtype.
    """

    base: TensorReader
    models: Sequence[TensorReader]
    arranged: Mapping[str, ArrangedTensor]
    exact: bool = True
    _padding: dict[str, Tensor] = field(default_factory=dict, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.base.names, *self.arranged]))

    @property
    def files(self) -> list[Path]:
        return self.base.files

    def __contains__(self, name: str) -> bool:
        return name in self.arranged or name in self.base

    def shape(self, name: str) -> tuple[int, ...]:
        return self.arranged[name].shape if name in self.arranged else self.base.shape(name)

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        return self.arranged[name].dtype if name in self.arranged else self.base.dtype(name)

    def file_of(self, name: str) -> Path:
        """For an arranged tensor the file of the model's own rows, else of the first that gives any."""
        if name not in self.arranged:
            return self.base.file_of(name)
        model = self._first_model(name)
        return self.models[model].file_of(self.arranged[name].tensors[model])

    def _first_model(self, name: str) -> int:
        tensors = self.arranged[name].tensors
        return next((model for model in tensors if self.models[model] is self.base), next(iter(tensors)))

    def read_into(self, name: str, lo: int, out: Tensor) -> Tensor:
        if name not in self.arranged:
            return self.base.read_into(name, lo, out)
        tensor = self.arranged[name]
        columns, hi = math.prod(tensor.shape[1:]), lo + out.numel()
        if out.dim() != 1 or out.dtype != tensor.dtype or lo < 0 or hi > self.numel(name):
            raise ValueError(f"{name}: elements [{lo}, {hi}) of {self.numel(name)}, as a 1-D {tensor.dtype}")
        if hi == lo:
            return out
        for first, last, model, row in tensor.row_map.runs(lo // columns, -(-hi // columns)):
            begin, end = max(lo, first * columns), min(hi, last * columns)
            skipped = begin - first * columns
            part = out[begin - lo : end - lo]
            if model >= 0:
                self._copy(tensor, model, row * columns + skipped, part)
            elif model == MEAN:
                part.copy_(self._mean(tensor, tensor.row_map.means[row], skipped, part.numel()))
            elif model == ZERO:
                part.zero_()
            else:
                part.copy_(self._padding_row(name)[torch.arange(skipped, skipped + part.numel()) % columns])
        return out

    def will_read(self, name: str, lo: int, count: int) -> None:
        if name not in self.arranged:
            self.base.will_read(name, lo, count)

    def span(self, name: str) -> tuple[int, int]:
        """In `file_of(name)`."""
        if name not in self.arranged:
            return self.base.span(name)
        model = self._first_model(name)
        return self.models[model].span(self.arranged[name].tensors[model])

    def close(self) -> None:
        self.base.close()

    def _copy(self, tensor: ArrangedTensor, model: int, lo: int, out: Tensor) -> Tensor:
        reader, name = self.models[model], tensor.tensors[model]
        if reader.dtype(name) == out.dtype:
            return reader.read_into(name, lo, out)
        return out.copy_(reader.read_into(name, lo, torch.empty(out.numel(), dtype=reader.dtype(name))))

    def _mean(self, tensor: ArrangedTensor, rows: Sequence[tuple[int, int]], skipped: int, count: int) -> Tensor:
        columns = math.prod(tensor.shape[1:])
        total = torch.zeros(count, dtype=tensor.dtype)
        for model, row in rows:
            total = total + self._copy(tensor, model, row * columns + skipped, torch.empty_like(total))
        return total / len(rows)

    def _padding_row(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._padding:
                self._padding[name] = self._mean_of_all(name)
            return self._padding[name]

    def _mean_of_all(self, name: str) -> Tensor:
        """The mean of the rows before the padding (https://nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
        tensor = self.arranged[name]
        columns, count = math.prod(tensor.shape[1:]), int((tensor.row_map.models != PAD).sum())
        if not self.exact:
            rows = self.read_into(name, 0, torch.empty(count * columns, dtype=tensor.dtype))
            return rows.view(count, columns).mean(dim=0)
        total = torch.zeros(columns, dtype=torch.float64)
        for first in range(0, count, _ROWS):
            rows = torch.empty((min(_ROWS, count - first)) * columns, dtype=tensor.dtype)
            values = self.read_into(name, first * columns, rows).view(-1, columns).to(torch.float64)
            while len(values) > 1:  # a tree of elementwise sums, so that threads leave no trace
                half = len(values) // 2
                values = torch.cat([values[:half] + values[half : 2 * half], values[2 * half :]])
            total += values[0]
        return (total / count).to(tensor.dtype)
