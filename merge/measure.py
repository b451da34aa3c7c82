"""What `diff` and the report share: where a tensor belongs, sums and histograms that add up, tensors side by side.

Every figure is made of sums over runs of ROW elements, each by a fixed tree (methods.py), and of counts; both are then
added exactly. So figures depend on neither pieces nor threads, and those of a layer or a role follow from its tensors'.
Touches no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .layers import split_layer
from .methods import partial_sums
from .tensor_merge import ROW

PIECE = 1 << 18  # elements read at once, a multiple of ROW
WORKERS = 8

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, order=True)
class Place:
    """Where a tensor belongs. stack: the list of layers, "" outside of them; layer: -1 outside.

    role: what is left of the name without stack, layer, numbers (of experts) and `.weight`.
    """

    stack: str
    layer: int
    role: str


def place_of(name: str) -> Place:
    """model.layers.3.block_sparse_moe.experts.5.w1.weight -> layer 3 of model.layers, block_sparse_moe.experts.w1."""
    found = split_layer(name)
    stack, layer, rest = found if found else ("", -1, name.removeprefix("model."))
    return Place(stack, layer, re.sub(r"\.\d+(?=\.|$)", "", rest).removesuffix(".weight"))


def layer_label(place: Place, stacks: int) -> str:
    """For people: the number, with its list's name where there are several; "outside" the layers."""
    if place.layer < 0:
        return "outside"
    return str(place.layer) if stacks == 1 else f"{place.stack}.{place.layer}"


def pieces(numel: int, size: int = PIECE) -> Iterator[tuple[int, int]]:
    """[lo, hi) of the pieces of a tensor; they begin at multiples of ROW."""
    size = -(-size // ROW) * ROW
    for lo in range(0, numel, size):
        yield lo, min(lo + size, numel)


class Products:
    """Dot products of vectors that come in pieces: float32 sums over runs of ROW elements, added up exactly.

    pairs: positions i <= j of the vectors whose products are wanted.
    """

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        self._parts: dict[tuple[int, int], list[float]] = {pair: [] for pair in pairs}

    def add(self, vectors: Sequence[Tensor]) -> None:
        """One piece, of float32 vectors."""
        for (i, j), parts in self._parts.items():
            parts += partial_sums(vectors[i], vectors[j]).tolist()

    def total(self, i: int, j: int) -> float:
        """The dot product, rounded once; NaN or infinity where a vector holds some."""
        parts = self._parts[i, j]
        return math.fsum(parts) if all(map(math.isfinite, parts)) else math.nan


class Magnitudes:
    """A histogram of magnitudes in bins of at most 2^-7 of their value: the upper 15 bits of |x| as a float32.

    Integers up to 256 have bins of their own.
    """

    BINS = 1 << 15

    def __init__(self) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """A piece, float32."""
        bits = (x.contiguous().view(torch.int32) & 0x7FFFFFFF) >> 16
        self.counts += torch.bincount(bits, minlength=self.BINS)

    def quantile(self, q: float) -> float:
        """The least magnitude that a share q of all are not above, as the lower end of its bin; 0 of nothing."""
        total = int(self.counts.sum())
        if not total:
            return 0.0
        place = max(1, math.ceil(q * total))
        return float(_edges()[int(torch.searchsorted(self.counts.cumsum(0), place))])

    def largest(self, k: int) -> tuple[int, float]:
        """Of the k largest magnitudes, how many are not 0 and the sum of their squares (to within a hundredth)."""
        above = self.counts.flip(0).cumsum(0).flip(0) - self.counts  # elements in higher bins
        taken = (k - above).clamp(min=0).minimum(self.counts)
        squares = taken[1:].double() * _mean_squares()[1:]
        return int(taken[1:].sum()), math.fsum(squares.tolist())


def _edges() -> Tensor:
    """The lower ends of the bins, float64."""
    return (torch.arange(Magnitudes.BINS, dtype=torch.int32) << 16).view(torch.float32).double()


def _mean_squares() -> Tensor:
    """Of values spread evenly over a bin; 0 for bins of NaN and infinity."""
    low = _edges()
    high = torch.cat([low[1:], low[-1:]])
    return torch.nan_to_num((low * low + low * high + high * high) / 3, nan=0.0, posinf=0.0)


def add_up(parts: Iterable[dict[T, float]]) -> dict[T, float]:
    """The sums of dictionaries key by key, each rounded once, so that their order does not matter."""
    lists: dict[T, list[float]] = {}
    for part in parts:
        for key, value in part.items():
            lists.setdefault(key, []).append(value)
    return {key: math.fsum(values) for key, values in lists.items()}


def ratio(above: float, below: float) -> float | None:
    """None instead of a division by 0, NaN or infinity, which JSON does not have."""
    found = above / below if below else math.nan
    return found if math.isfinite(found) else None


def side_by_side(function: Callable[[T], R], items: Sequence[T], done: Callable[[T], None] | None = None) -> list[R]:
    """function of every item, in order, on a few threads with one thread for each torch operation.

    Args:
        done: called for every item that is finished, in order.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        with ThreadPoolExecutor(min(WORKERS, before), "steep-measure") as pool:
            try:
                for item, result in zip(items, pool.map(function, items)):
                    results.append(result)
                    if done:
                        done(item)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)
    return results
