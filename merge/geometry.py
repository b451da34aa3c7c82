"""Merge methods that see tensors as vectors with an angle between them: slerp and its relatives, model stock.

All of them end in a weighted sum of their inputs, whose weights follow from dot products alone: those are gathered in
one look, the angles are float64, and the tensor is then merged element by element. Where angles are taken row by row
(`filter_wise`, `nuslerp_flatten: false`) pieces are whole rows. Touches no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from .methods import as_rows, check_weight_sum, partial_sums, tree_sum, weighted_sum
from .tensor_merge import Subject, Sums, TensorMerge

Gram = Mapping[tuple[int, int], float]  # dot products of vectors i <= j

PARALLEL_COSINE = 0.9995
SMALL_NORM = 1e-8
SMALL_SUM = 1e-6
COLLINEAR = 1e-16  # of 1 - cosine^2


def gram(tensors: Sequence[Tensor]) -> dict[tuple[int, int], float]:
    """Dot products of all pairs i <= j of flat tensors, each rounded once from float32 sums with a fixed tree."""
    pairs = combinations_with_replacement(range(len(tensors)), 2)
    return {(i, j): math.fsum(partial_sums(tensors[i], tensors[j]).tolist()) for i, j in pairs}


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Spherical interpolation of two tensors as flat vectors (Shoemake 1985); a at t = 0 and b at t = 1, bit for bit.

    theta is the angle between a and b; the result is (sin((1-t) theta) a + sin(t theta) b) / sin(theta), or the
    straight line (1-t) a + t b where |cos theta| > 0.9995.

    Args:
        a, b: float32, of one shape.
        t: position; outside [0, 1] it extrapolates.
    """
    dots = gram([a, b])
    weight_a, weight_b, _ = slerp_weights(dots[0, 1], math.sqrt(dots[0, 0]), math.sqrt(dots[1, 1]), t)
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
    return weighted_sum([a, b], [weight_a, weight_b])


class Slerp(TensorMerge):
    """`slerp` from the base to the other model: one look for the angle."""

    vectors = "both"
    looks = 1

    def end_look(self, number: int, sums: Sums) -> None:
        _refuse_overflow(self.subject, sums)
        t = self.subject.parameters["t"]
        self._weights = slerp_weights(sums[0, 1], math.sqrt(sums[0, 0]), math.sqrt(sums[1, 1]), t)[:2]

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return slerp_apply(vectors[0], vectors[1], *self._weights)


def nuslerp(
    a: Tensor,
    b: Tensor,
    weights: Sequence[float],
    base: Tensor | None = None,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Slerp at t = w_1 / (w_0 + w_1) (0.5 where |w_0 + w_1| < 1e-6); with a base B + nuslerp(a - B, b - B).

    Unlike `slerp` a straight line is taken only where a and b are parallel or opposite to within 1 - cos^2 <= 1e-16.
    The angle is right where one of them is 0. mergekit takes the angle in the inputs' dtype: bf16 cosines of sibling
    models are 1 or at most 0.996.

    Args:
        nuslerp_flatten: one angle for the whole tensor; else one for every row (last dimension), or, under
            `nuslerp_row_wise`, for every line along the first dimension, as in mergekit.
    """
    if base is not None:
        return base + nuslerp(a - base, b - base, weights, None, nuslerp_flatten, nuslerp_row_wise)
    t = nuslerp_position(weights)
    if nuslerp_flatten:
        return weighted_sum([a, b], nuslerp_weights(gram([a, b]), t))
    return _nuslerp_lines(a, b, t, along_first=nuslerp_row_wise)


def nuslerp_position(weights: Sequence[float]) -> float:
    """t of two weights."""
    total = math.fsum(weights)
    return 0.5 if abs(total) < SMALL_SUM else weights[1] / total


def nuslerp_weights(dots: Gram, t: float) -> list[float]:
    """What nuslerp multiplies the two vectors by."""
    norms = math.sqrt(dots[0, 0]), math.sqrt(dots[1, 1])
    cosine = dots[0, 1] / (norms[0] * norms[1]) if all(norms) else 0.0
    cosine = max(-1.0, min(1.0, cosine))
    if 1 - cosine * cosine <= COLLINEAR or t in (0, 1):
        return [1 - t, t]
    theta = math.acos(cosine)
    return [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]


def _nuslerp_lines(a: Tensor, b: Tensor, t: float, along_first: bool) -> Tensor:
    """`nuslerp` of every line along the last or the first dimension; a vector is one line."""
    if along_first and a.ndim > 1:
        return _nuslerp_lines(a.transpose(0, -1), b.transpose(0, -1), t, False).transpose(0, -1).contiguous()
    a, b = a.contiguous(), b.contiguous()
    dots = [tree_sum(x * y) if x.ndim else x * y for x, y in ((a, b), (a, a), (b, b))]
    lines = zip(*(values.reshape(-1).tolist() for values in dots), strict=True)
    weights = [nuslerp_weights({(0, 1): ab, (0, 0): aa, (1, 1): bb}, t) for ab, aa, bb in lines]
    shape = (2, *a.shape[:-1], 1) if a.ndim else (2,)
    weight_a, weight_b = torch.tensor(weights, device=a.device).reshape(-1, 2).mT.reshape(shape)
    return a * weight_a + b * weight_b


class Nuslerp(TensorMerge):
    """`nuslerp`: one look for the angle; pieces of whole rows, or one piece, where there is more than one angle."""

    vectors = "deltas"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        parameters = subject.parameters
        self._flat: bool = parameters["nuslerp_flatten"]
        self._row_wise: bool = parameters["nuslerp_row_wise"]
        self._t = nuslerp_position(parameters["weight"])
        self.looks = int(self._flat)
        if not self._flat:
            self.pieces = "whole" if self._row_wise else "rows"

    def pairs(self, models: int) -> list[tuple[int, int]]:
        return super().pairs(models) if self.subject.based else _all_pairs(models)

    def end_look(self, number: int, sums: Sums) -> None:
        _refuse_overflow(self.subject, sums)
        self._weights = nuslerp_weights(_without_base(self.subject, sums), self._t)

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        base, (a, b) = _split(self.subject, vectors)
        if self._flat:
            merged = weighted_sum([a, b], self._weights)
        else:
            shape = self.subject.shape if self._row_wise else as_rows(a, self.subject.columns).shape
            merged = _nuslerp_lines(a.view(shape), b.view(shape), self._t, self._row_wise).reshape(-1)
        return merged if base is None else base + merged


def multislerp(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Weighted mean on a sphere (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea), of M_i - B with a base.

    With u_i = x_i / (|x_i| + eps) the result is (sum_i w_i |x_i|) m for m = sum_i w_i u_i / |sum_i w_i u_i|, plus B.

    mergekit goes on from m along T = sum_i w_i (u_i - <u_i, m> m). But m is the direction of sum_i w_i u_i, so T is
    what is left of a vector without its part along itself: 0, and in mergekit rounding errors.

    Where |sum_i w_i u_i| < eps (opposite vectors), two tensors are merged on the straight line sum_i w_i x_i; more are
    refused, unless all are 0. A single model is the result.

    Args:
        weights: divided by their sum if normalize_weights; it must then not be zero.

    Raises:
        ValueError: more than two vectors balance out.
    """
    vectors = tensors if base is None else [x - base for x in tensors]
    merged = weighted_sum(vectors, multislerp_weights(gram(vectors), weights, normalize_weights, eps))
    return merged if base is None else base + merged


def multislerp_weights(dots: Gram, weights: Sequence[float], normalize_weights: bool, eps: float) -> list[float]:
    """What multislerp multiplies its vectors by, from their dot products."""
    if len(weights) == 1:
        return [1.0]
    total = math.fsum(weights) if normalize_weights else 1.0
    shares = [weight / total for weight in weights]
    norms = [math.sqrt(dots[i, i]) for i in range(len(weights))]
    if not any(norms):
        return shares
    to_units = [share / (norm + eps) for share, norm in zip(shares, norms)]
    length = math.sqrt(max(0.0, _quadratic(dots, to_units)))
    if length < eps:
        if len(weights) == 2:
            return shares
        raise ValueError("multislerp: the weighted unit vectors balance out, which leaves no direction; change weights")
    radius = math.fsum(share * norm for share, norm in zip(shares, norms))
    return [radius / length * coefficient for coefficient in to_units]


class Multislerp(TensorMerge):
    """`multislerp`: one look for the dot products."""

    vectors = "deltas"
    looks = 1

    @classmethod
    def check(cls, parameters: Mapping[str, Any]) -> list[str]:
        return check_weight_sum(parameters, "normalize_weights")

    def pairs(self, models: int) -> list[tuple[int, int]]:
        return super().pairs(models) if self.subject.based else _all_pairs(models)

    def end_look(self, number: int, sums: Sums) -> None:
        _refuse_overflow(self.subject, sums)
        weights, normalize, eps = (self.subject.parameters[name] for name in ("weight", "normalize_weights", "eps"))
        try:
            self._weights = multislerp_weights(_without_base(self.subject, sums), weights, normalize, eps)
        except ValueError as error:
            raise ValueError(f"{self.subject.name}: {error}") from None

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        base, others = _split(self.subject, vectors)
        merged = weighted_sum(others, self._weights)
        return merged if base is None else base + merged


def karcher(tensors: Sequence[Tensor], max_iter: float = 10, tol: float = 1e-5) -> Tensor:
    """Karcher mean of the directions u_i = M_i / |M_i|, times the mean of the norms (arXiv:2603.04972).

    The point m of the unit sphere for which sum_i log_m(u_i) = 0, found by m <- exp_m(mean_i log_m(u_i)) from the
    normalised mean on, at most max_iter times and until a step is shorter than tol. All of it happens on the
    coefficients of the u_i, whose dot products are known. A norm of at most tol has no direction and counts only in the
    mean of the norms; an opposite of m does not pull; where the directions balance out m begins at the first of them.
    Where none has a direction the result is the mean of the tensors.

    mergekit rounds the u_i to the inputs' dtype and takes angles in it: in bf16 they are 0 or at least 0.088.
    """
    return weighted_sum(tensors, karcher_weights(gram(tensors), len(tensors), max_iter, tol))


def karcher_weights(dots: Gram, count: int, max_iter: float, tol: float) -> list[float]:
    """What karcher multiplies its tensors by, from their dot products."""
    norms = [math.sqrt(dots[i, i]) for i in range(count)]
    valid = [i for i in range(count) if norms[i] > tol]
    if count == 1 or not valid:
        return [1 / count] * count
    cosines = {(a, b): dots[i, j] / (norms[i] * norms[j]) for (a, i), (b, j) in _indexed_pairs(valid)}
    share = 1 / len(valid)
    mean = _unit(cosines, [share] * len(valid), tol) or [1.0] + [0.0] * (len(valid) - 1)
    for _ in range(int(max_iter)):
        dots_with_mean = [_product(cosines, mean, j) for j in range(len(valid))]
        pulls = [share * _log_factor(dot, tol) for dot in dots_with_mean]
        along = math.fsum(pull * dot for pull, dot in zip(pulls, dots_with_mean))
        tangent = [pull - along * coefficient for pull, coefficient in zip(pulls, mean)]
        length = math.sqrt(max(0.0, _quadratic(cosines, tangent)))
        if length < tol:
            break
        turned = [math.cos(length) * m + math.sin(length) / length * d for m, d in zip(mean, tangent)]
        mean = _unit(cosines, turned, tol) or turned
    radius = math.fsum(norms) / count
    weights = [0.0] * count
    for i, coefficient in zip(valid, mean):
        weights[i] = radius * coefficient / norms[i]
    return weights


def _log_factor(cosine: float, tol: float) -> float:
    """theta / sin(theta), by which u - cos(theta) m becomes log_m(u); 0 for what has no direction or pulls nowhere."""
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    return theta / math.sin(theta) if tol <= theta <= math.pi - tol else 0.0


def _unit(dots: Gram, coefficients: Sequence[float], tol: float) -> list[float] | None:
    """The combination of vectors scaled to length 1; None if it is shorter than tol."""
    length = math.sqrt(max(0.0, _quadratic(dots, coefficients)))
    return None if length < tol else [coefficient / length for coefficient in coefficients]


class Karcher(TensorMerge):
    """`karcher`: one look for the dot products."""

    looks = 1

    def pairs(self, models: int) -> list[tuple[int, int]]:
        return _all_pairs(models)

    def end_look(self, number: int, sums: Sums) -> None:
        _refuse_overflow(self.subject, sums)
        parameters = self.subject.parameters
        self._weights = karcher_weights(sums, len(self.subject.models), parameters["max_iter"], parameters["tol"])

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return weighted_sum(vectors, self._weights)


def model_stock(base: Tensor, deltas: Sequence[Tensor], filter_wise: bool = False) -> Tensor:
    """t mean(M_i) + (1 - t) B with t = N c / (1 + (N - 1) c) (https://arxiv.org/abs/2403.19522).

    c is the mean cosine of the pairs of the N task vectors; one for the tensor, or one for each row (last dimension)
    under filter_wise. Written as B + t mean(delta_i), which is B bit for bit at t = 0. A pair with a zero has the
    cosine 0; t = 0 where |1 + (N - 1) c| < 1e-6. mergekit does not divide by products of norms under 1e-6, which makes
    the cosines of small task vectors too small.
    """
    count = len(deltas)
    if filter_wise:
        columns = base.shape[-1] if base.ndim else 1
        rows = [as_rows(x.reshape(-1), columns) for x in (base, *deltas)]
        return _stock_rows(rows[0], rows[1:]).reshape(base.shape)
    t = stock_ratio(gram(deltas), count)
    return base + weighted_sum(deltas, [t / count] * count) if t else base


def stock_ratio(dots: Gram, count: int) -> float:
    """t of model stock from the dot products of the task vectors."""
    cosines = []
    for i, j in combinations(range(count), 2):
        norms = math.sqrt(dots[i, i]) * math.sqrt(dots[j, j])
        cosines.append(max(-1.0, min(1.0, dots[i, j] / norms)) if norms else 0.0)
    cosine = math.fsum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    return 0.0 if abs(divisor) < SMALL_SUM else count * cosine / divisor


def _stock_rows(base: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """`model_stock` of every row of matrices."""
    count = len(deltas)
    pairs = _all_pairs(count)
    dots = zip(*(tree_sum(deltas[i] * deltas[j]).tolist() for i, j in pairs), strict=True)
    ratios = [stock_ratio(dict(zip(pairs, row)), count) / count for row in dots]
    ones = weighted_sum(deltas, [1.0] * count)
    return base + ones * torch.tensor(ratios, device=base.device).unsqueeze(-1)


class ModelStock(TensorMerge):
    """`model_stock`: one look for the cosines, or pieces of whole rows."""

    vectors = "deltas"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._rows: bool = subject.parameters["filter_wise"]
        self.looks = int(not self._rows)
        self.pieces = "rows" if self._rows else "any"
        self._ratio: float | None = None

    def end_look(self, number: int, sums: Sums) -> None:
        _refuse_overflow(self.subject, sums)
        self._ratio = stock_ratio(_without_base(self.subject, sums), len(self.subject.models))

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        base, deltas = vectors[0], vectors[1:]
        if self._ratio is None:
            rows = [as_rows(x, self.subject.columns) for x in vectors]
            return _stock_rows(rows[0], rows[1:]).reshape(-1)
        count = len(deltas)
        return base + weighted_sum(deltas, [self._ratio / count] * count) if self._ratio else base

    def figures(self) -> dict[str, Any]:
        return {} if self._ratio is None else {"t": self._ratio}


def _all_pairs(count: int) -> list[tuple[int, int]]:
    return list(combinations_with_replacement(range(count), 2))


def _indexed_pairs(indices: Sequence[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (position, index), positions in order."""
    return list(combinations_with_replacement(list(enumerate(indices)), 2))


def _split(subject: Subject, vectors: Sequence[Tensor]) -> tuple[Tensor | None, Sequence[Tensor]]:
    """(base, task vectors), or (None, models) where there is no base."""
    return (vectors[0], vectors[1:]) if subject.based else (None, vectors)


def _without_base(subject: Subject, sums: Sums) -> dict[tuple[int, int], float]:
    """The dot products of all vectors but a base, numbered from 0."""
    first = int(subject.based)
    return {(i - first, j - first): value for (i, j), value in sums.items() if i >= first}


def _refuse_overflow(subject: Subject, sums: Sums) -> None:
    if not all(map(math.isfinite, sums.values())):
        raise ValueError(f"{subject.name}: values too large for a dot product in float32")


def _product(dots: Gram, coefficients: Sequence[float], j: int) -> float:
    """<sum_i c_i x_i, x_j>."""
    return math.fsum(c * dots[min(i, j), max(i, j)] for i, c in enumerate(coefficients))


def _quadratic(dots: Gram, coefficients: Sequence[float]) -> float:
    """|sum_i c_i x_i|^2."""
    return math.fsum(c * _product(dots, coefficients, j) for j, c in enumerate(coefficients))
