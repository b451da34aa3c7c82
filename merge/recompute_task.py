"""The parts of a recomputation in numpy and float64: a tensor to recompute, and what is expected of it (recompute.py).

Task vectors are M - B in float32, which is how they are defined, so that an order by magnitude is the same here as in
the merge. All else is float64. Touches no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Load = Callable[[int, int, int], Array]  # (vector, lo, hi): its elements as float32; a base is vector 0

EPS = 2.0**-24  # half an ulp of 1 in float32
BLOCK = 1 << 20


@dataclass(frozen=True)
class Expected:
    """float64, before the final rounding. slack: what float32 arithmetic may change. other: the value where a sign or a
    selection falls the other way; equal to `values` where it cannot."""

    values: Array
    slack: Array
    other: Array


@dataclass(frozen=True)
class Formula:
    """A method on one tensor, with all that needs the whole tensor known. unit: pieces are multiples of it."""

    unit: int
    at: Callable[[int, int], Expected]


@dataclass(frozen=True)
class Task:
    """One tensor to recompute. models: names of the models that are not the base, as in `Subject`."""

    name: str
    shape: tuple[int, ...]
    parameters: dict[str, Any]
    models: tuple[str, ...]
    seed: int
    based: bool
    load: Load

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return max(self.shape[-1] if self.shape else 1, 1)

    @property
    def count(self) -> int:
        """Of the models that are not the base."""
        return len(self.models)

    def model(self, i: int, lo: int, hi: int) -> Array:
        return self.load(i + self.based, lo, hi)

    def delta(self, i: int, lo: int, hi: int) -> Array:
        """float32."""
        return self.load(i + 1, lo, hi) - self.load(0, lo, hi)

    def vector(self, i: int, lo: int, hi: int) -> Array:
        """The task vector under a base, else the model; float32."""
        return self.delta(i, lo, hi) if self.based else self.model(i, lo, hi)

    def base(self, lo: int, hi: int) -> Array:
        """float64; 0 without a base."""
        return self.load(0, lo, hi).astype(np.float64) if self.based else np.zeros(hi - lo)

    def whole_delta(self, i: int) -> Array:
        out = np.empty(self.numel, np.float32)
        for lo, hi in blocks(self.numel):
            out[lo:hi] = self.delta(i, lo, hi)
        return out


def blocks(numel: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK // unit) * unit
    for lo in range(0, numel, step):
        yield lo, min(lo + step, numel)


def weighted(task: Task, coefficients: Sequence[float], errors: Sequence[float] | float = 0.0) -> Formula:
    """B + sum_i c_i x_i of task vectors, or of the models without a base; `errors` are those of the c_i."""
    errors = [errors] * len(coefficients) if isinstance(errors, float) else errors

    def at(lo: int, hi: int) -> Expected:
        values, size = task.base(lo, hi), np.abs(task.base(lo, hi))
        slack = np.zeros(hi - lo)
        for i, (c, error) in enumerate(zip(coefficients, errors, strict=True)):
            x = task.vector(i, lo, hi).astype(np.float64)
            values, size, slack = values + c * x, size + abs(c * x), slack + error * abs(x)
        return decided(values, slack + 2 * (len(coefficients) + 4) * EPS * size)

    return Formula(1, at)


def decided(values: Array, slack: Array) -> Expected:
    return Expected(values, slack, values)


def coefficients(task: Task) -> list[float]:
    weights = task.parameters["weight"]
    divides = task.parameters["normalize"] and abs(sum(weights)) >= 1e-8
    return [task.parameters["lambda"] * w / (sum(weights) if divides else 1) for w in weights]
