"""Merge methods as pure functions on tensors: float32 in, float32 out, each readable as its paper's formula.

Each function on whole tensors comes with the class that carries it out on a tensor seen in pieces (tensor_merge.py),
made of the same parts. Every arithmetic step is one IEEE operation on each element, or a sum with a fixed tree, so a
tensor merged whole, in pieces, by any number of threads or on another device has the same bits. What needs to see a
whole tensor first (slerp's angle, the k largest of a task vector) is `partial_sums` with `slerp_weights`, and
`LargestK`. Touches no files.

B is the base, M_i the models, delta_i = M_i - B the task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .tensor_merge import Subject, Sums, TensorMerge

ROW = 4096
PARALLEL_COSINE = 0.9995
SMALL_NORM = 1e-8
SMALL_WEIGHT_SUM = 1e-8


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """sum_i w_i M_i, divided by sum_i w_i if normalize (model soups, https://arxiv.org/abs/2203.05482).

    Args:
        tensors: M_i, float32, all of one shape.
        weights: one number per tensor; under `normalize` their sum must not be zero.
    """
    total = math.fsum(weights) if normalize else 1.0
    return _weighted_sum(tensors, [weight / total for weight in weights])


class Linear(TensorMerge):
    """`linear`, element by element."""

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        parameters = self.subject.parameters
        return linear(vectors, parameters["weight"], parameters["normalize"])


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation of two tensors as flat vectors (Shoemake 1985); a at t = 0 and b at t = 1, bit for bit.

    theta is the angle between a and b; the result is (sin((1-t) theta) a + sin(t theta) b) / sin(theta), or the
    straight line (1-t) a + t b where |cos theta| > 0.9995.

    Args:
        a, b: float32, of one shape.
        t: position; outside [0, 1] it extrapolates.
    """
    dot, aa, bb = (math.fsum(partial_sums(x, y).tolist()) for x, y in ((a, b), (a, a), (b, b)))
    weight_a, weight_b, _ = slerp_weights(dot, math.sqrt(aa), math.sqrt(bb), t)
    return slerp_apply(a, b, weight_a, weight_b)


def slerp_weights(dot: float, norm_a: float, norm_b: float, t: float) -> tuple[float, float, float]:
    """What slerp multiplies a and b by, and the cosine between them.

    A norm of at most 1e-8 counts as 1, as in mergekit: the angle of a zero vector is then a right one.
    """
    scale = (norm_a if norm_a > SMALL_NORM else 1.0) * (norm_b if norm_b > SMALL_NORM else 1.0)
    cosine = max(-1.0, min(1.0, dot / scale))
    if abs(cosine) > PARALLEL_COSINE or t in (0, 1):
        return 1 - t, t, cosine
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta), cosine


def slerp_apply(a: Tensor, b: Tensor, weight_a: float, weight_b: float) -> Tensor:
    """weight_a a + weight_b b, element by element: slerp once its weights are known."""
    return _weighted_sum([a, b], [weight_a, weight_b])


class Slerp(TensorMerge):
    """`slerp` from the base to the other model: one look for the angle."""

    vectors = "both"
    looks = 1

    def end_look(self, number: int, sums: Sums) -> None:
        dot, norm_a, norm_b = sums[0, 1], math.sqrt(sums[0, 0]), math.sqrt(sums[1, 1])
        if not all(map(math.isfinite, (dot, norm_a, norm_b))):
            raise ValueError(f"{self.subject.name}: values too large for a dot product in float32")
        self._weights = slerp_weights(dot, norm_a, norm_b, self.subject.parameters["t"])[:2]

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return slerp_apply(vectors[0], vectors[1], *self._weights)


def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = False, scale: float = 1.0
) -> Tensor:
    """B + scale sum_i w_i delta_i, divided by sum_i w_i if normalize (https://arxiv.org/abs/2212.04089).

    With scale 0, or all weights 0, the result is the base bit for bit. A sum of weights under 1e-8 does not divide.

    Args:
        base: B, float32. deltas: delta_i = M_i - B in float32, of the same shape. scale: mergekit's `lambda`.
    """
    total = math.fsum(weights)
    divisor = total if normalize and abs(total) >= SMALL_WEIGHT_SUM else 1.0
    coefficients = [scale * weight / divisor for weight in weights]
    if not any(coefficients):
        return base
    return base + _weighted_sum(deltas, coefficients)


class TaskArithmetic(TensorMerge):
    """`task_arithmetic`, element by element."""

    vectors = "deltas"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        parameters = self.subject.parameters
        return task_arithmetic(
            vectors[0], vectors[1:], parameters["weight"], parameters["normalize"], parameters["lambda"]
        )


def ties(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """Trim, elect sign, merge (https://arxiv.org/abs/2306.01708): `trim` of each delta_i, then `ties_consensus`."""
    trimmed = [trim(delta, density) for delta, density in zip(deltas, densities, strict=True)]
    return ties_consensus(base, trimmed, weights, normalize, scale)


def trim(delta: Tensor, density: float) -> Tensor:
    """The k = max(1, int(density n)) elements of largest magnitude, zeros elsewhere; nothing is kept at density 0.

    Exactly k: among elements of equal magnitude the lowest flat index goes first.
    """
    largest = LargestK(delta.numel(), density, delta.device)
    flat = delta.reshape(-1)
    for _ in range(largest.passes):
        largest.count(flat)
        largest.end_pass()
    return largest.keep(flat).reshape(delta.shape)


def ties_consensus(
    base: Tensor, trimmed: Sequence[Tensor], weights: Sequence[float], normalize: bool = True, scale: float = 1.0
) -> Tensor:
    """B + scale sum_i m_i d_i, divided by sum_i m_i w_i if normalize; element by element.

    d_i = w_i tau_i for the trimmed task vectors tau_i. The elected sign is that of sum_i d_i, plus where the sum is 0;
    m_i is 1 where d_i has that sign, so zeros take no part in the divisor. A divisor of 0 does not divide.
    """
    if scale == 0:
        return base
    weighted = [tau * weight for tau, weight in zip(trimmed, weights, strict=True)]
    total = weighted[0].clone()
    for d in weighted[1:]:
        total += d
    # Float arithmetic throughout: boolean masks and torch.where are ten times slower on a CPU.
    elected = torch.copysign(torch.ones_like(total), total + 0.0)  # -0 + 0 is 0, whose sign is plus
    merged = torch.zeros_like(base)
    divisor = torch.zeros_like(base)
    for d, weight in zip(weighted, weights):
        agreeing = (d * elected).clamp_(min=0)  # m_i |d_i|
        merged += agreeing
        divisor += agreeing.sign_() * weight
    if normalize:
        divisor += torch.eq(divisor, 0, out=torch.empty_like(divisor))
        merged /= divisor
    if scale != 1:
        merged *= scale
    return (merged * elected).add_(base)


class Ties(TensorMerge):
    """`ties`: the looks find the k largest of every task vector."""

    vectors = "deltas"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        densities = subject.parameters["density"]
        self._largest = [LargestK(subject.numel, density, subject.device) for density in densities]
        self.looks = max(largest.passes for largest in self._largest)

    def look(self, number: int, lo: int, vectors: Sequence[Tensor]) -> None:
        for largest, delta in zip(self._largest, vectors[1:], strict=True):
            if largest.passes:
                largest.count(delta)

    def end_look(self, number: int, sums: Sums) -> None:
        for largest in self._largest:
            if largest.passes:
                largest.end_pass()

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        parameters = self.subject.parameters
        trimmed = [largest.keep(delta) for largest, delta in zip(self._largest, vectors[1:], strict=True)]
        return ties_consensus(vectors[0], trimmed, parameters["weight"], parameters["normalize"], parameters["lambda"])


class LargestK:
    """Selects the k largest magnitudes of a tensor seen in chunks, exactly, in a fixed amount of memory.

    The bits of |x| as a 31-bit integer are in the order of the magnitudes. The first pass over all chunks counts their
    upper 16 bits, which finds the bin that holds the k-th largest; the second counts the lower 15 bits within that bin,
    which finds the k-th largest itself and how many elements equal to it belong to the k. Then `keep` is called once on
    every chunk, in the order of the tensor, because the lowest flat index wins among equals.

    Usage: for each of `passes` passes: `count` every chunk, then `end_pass`; then `keep` every chunk in order.
    """

    COARSE_BINS, FINE_BINS = 1 << 16, 1 << 15

    def __init__(self, numel: int, density: float, device: torch.device | str = "cpu") -> None:
        """numel: elements of the whole tensor. density in [0, 1]: k = max(1, int(density numel)), 0 at density 0."""
        self.k = min(numel, max(1, int(density * numel))) if density > 0 else 0
        self.passes = 2 if 0 < self.k < numel else 0
        self._above = 0  # elements known to be larger than the current bin
        self._bin: int | None = None
        self._counts = torch.zeros(self.COARSE_BINS, dtype=torch.int64, device=device)
        self._threshold = -1 if self.k else 0x7FFFFFFE  # keep all, or none, when there is nothing to count
        self._equal_left = 0

    def count(self, x: Tensor) -> None:
        """One chunk (float32) of the current pass; the order of chunks does not matter."""
        bits = _magnitude_bits(x)
        if self._bin is None:
            self._counts += torch.bincount(bits >> 15, minlength=self.COARSE_BINS)
        else:  # bin 0 takes all that is smaller than the coarse bin, the last all that is larger
            lower = (bits - ((self._bin << 15) - 1)).clamp_(0, self.FINE_BINS + 1)
            self._counts += torch.bincount(lower, minlength=self.FINE_BINS + 2)

    def end_pass(self) -> None:
        """All chunks have been counted: find the bin in which the k-th largest lies."""
        counts = self._counts if self._bin is None else self._counts[1:-1]
        at_least = counts.flip(0).cumsum(0).flip(0) + self._above  # elements in this bin or a higher one
        found = int((at_least >= self.k).sum()) - 1  # at_least never grows with the bin
        self._above = int(at_least[found] - counts[found])
        if self._bin is None:
            self._bin = found
            self._counts = self._counts.new_zeros(self.FINE_BINS + 2)
        else:
            self._threshold = (self._bin << 15) + found
            self._equal_left = self.k - self._above

    def keep(self, x: Tensor) -> Tensor:
        """x where it is one of the k largest, 0 elsewhere. Chunks must come in the order of the tensor."""
        if self._threshold < 0:
            return x
        bits = _magnitude_bits(x)
        equal = bits == self._threshold if self._equal_left else None
        kept = x.contiguous().view(torch.int32) & ~((bits - (self._threshold + 1)) >> 31)  # x if larger, else 0
        kept = kept.view(torch.float32)
        if equal is not None and (found := int(equal.sum())):
            if found > self._equal_left:
                equal &= equal.cumsum(0) <= self._equal_left
            self._equal_left -= min(found, self._equal_left)
            kept = torch.where(equal, x, kept)
        return kept


def partial_sums(x: Tensor, y: Tensor) -> Tensor:
    """Sums of x * y over rows of ROW elements, float32 [ceil(n / ROW)]: the same bits wherever they are computed.

    Each row is added up by a fixed binary tree of elementwise additions; a last short row is filled with zeros.
    `math.fsum` over the rows of all chunks then gives the dot product, rounded once.
    """
    products = (x * y).reshape(-1)
    missing = -products.numel() % ROW
    if missing:
        products = torch.nn.functional.pad(products, (0, missing))
    rows = products.view(-1, ROW)
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows[:, 0]


def _magnitude_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights_i tensors_i in the given order. A weight of 0 leaves its tensor out, so that 1 * x + 0 * y is x
    even where x is -0. Multiplication and addition stay two operations: fused they round differently elsewhere."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total = tensor * weight if total is None else total.add_(tensor * weight)
    return torch.zeros_like(tensors[0]) if total is None else total
