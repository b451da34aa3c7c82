"""Arcee fusion: of what a model changed, only what matters most. Touches no files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .methods import as_rows, tree_sum
from .sparsify import Places
from .tensor_merge import Subject, Sums, TensorMerge

SOFTMAX_OFFSET = 1e-8


def arcee_fusion(base: Tensor, other: Tensor) -> Tensor:
    """B + delta where an element's importance is at least the median + 1.5 times the distance of the quartiles.

    mergekit's method of that name (arcee.ai); delta = M - B. The importance is |delta| KL(p, q) of the element's row,
    where p and q are the softmax of the row (last dimension) in M and B, each plus 1e-8. The quartiles are those
    elements at int((n - 1) / 4), int((n - 1) / 2) and int(3 (n - 1) / 4) of all n in ascending order.

    The divergence, a small difference of large terms, is float64 and importance is rounded to float32 once. mergekit
    computes it in the inputs' dtype, in which for siblings it is rounding errors, takes the quartiles of tensors of
    more than 10^6 elements from a random sample, and stores float32 whatever the dtype asked for.
    """
    columns = base.shape[-1] if base.ndim else 1
    delta = other - base
    scores = importance(base.reshape(-1), other.reshape(-1), delta.reshape(-1), columns)
    quartiles = Places(quartile_places(base.numel()), base.device)
    for _ in range(2 if base.numel() else 0):
        quartiles.count(scores)
        quartiles.end_pass()
    return _fuse(base, delta, scores.view(base.shape), dynamic_threshold(quartiles, base.numel()))


def importance(base: Tensor, other: Tensor, delta: Tensor, columns: int) -> Tensor:
    """|delta| KL(softmax(M), softmax(B)) of flat pieces of whole rows, float32."""
    p, q = (_softmax(as_rows(x, columns).double()) + SOFTMAX_OFFSET for x in (other, base))
    divergence = tree_sum(p * torch.log(p / q)).clamp_(min=0)
    return (as_rows(delta.abs(), columns).double() * divergence.unsqueeze(-1)).float().view(-1)


def _softmax(rows: Tensor) -> Tensor:
    powers = torch.exp(rows - rows.amax(-1, keepdim=True)) if rows.numel() else rows
    return powers / tree_sum(powers).unsqueeze(-1)


def quartile_places(numel: int) -> list[int]:
    """Places of the lower quartile, median and upper quartile when n elements are sorted downwards."""
    return [numel - (numel - 1) * quarters // 4 for quarters in (1, 2, 3)] if numel else []


def dynamic_threshold(quartiles: Places, numel: int) -> float:
    """median + 1.5 (upper - lower quartile) of the importance."""
    if not numel:
        return 0.0
    lower, median, upper = (quartiles.value(place) for place in quartile_places(numel))
    return median + 1.5 * (upper - lower)


def _fuse(base: Tensor, delta: Tensor, scores: Tensor, threshold: float) -> Tensor:
    return base + delta * torch.ge(scores, threshold, out=torch.empty_like(scores))


class ArceeFusion(TensorMerge):
    """`arcee_fusion`: two looks find the quartiles of the importance; pieces of whole rows."""

    vectors = "both"
    pieces = "rows"
    looks = 2

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._quartiles = Places(quartile_places(subject.numel), subject.device)
        self._threshold = 0.0

    def _scores(self, vectors: Sequence[Tensor]) -> Tensor:
        base, other, delta = vectors
        return importance(base, other, delta, self.subject.columns)

    def look(self, number: int, lo: int, vectors: Sequence[Tensor]) -> None:
        self._quartiles.count(self._scores(vectors))

    def end_look(self, number: int, sums: Sums) -> None:
        self._quartiles.end_pass()
        if number:
            self._threshold = dynamic_threshold(self._quartiles, self.subject.numel)

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return _fuse(vectors[0], vectors[2], self._scores(vectors), self._threshold)

    def figures(self) -> dict[str, Any]:
        return {"threshold": self._threshold}
