"""Element-wise merge methods, and the sums that all methods share: float32 in, float32 out.

Every method is a pure function on whole tensors, readable as its paper's formula, with a class that carries it out on a
tensor seen in pieces (tensor_merge.py), made of the same parts. Every arithmetic step is one IEEE operation on each
element, or a sum with a fixed tree, so a tensor merged whole, in pieces, by any number of threads or on another device
has the same bits. Others: geometry.py (on spheres), sparsify.py and consensus.py (on thinned task vectors), fusion.py
(by importance), spectral.py (singular vectors). Touches no files.

B is the base, M_i the models, delta_i = M_i - B the task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensor_merge import ROW, TensorMerge

SMALL_WEIGHT_SUM = 1e-8
SMALL_DIFFERENCE = 1e-6


def linear(tensors: Sequence[Tensor], weights: Sequence[float], normalize: bool = True) -> Tensor:
    """sum_i w_i M_i, divided by sum_i w_i if normalize (model soups, https://arxiv.org/abs/2203.05482).

    Args:
        tensors: M_i, float32, all of one shape.
        weights: one number per tensor; under `normalize` their sum must not be zero.
    """
    total = math.fsum(weights) if normalize else 1.0
    return weighted_sum(tensors, [weight / total for weight in weights])


class Linear(TensorMerge):
    """`linear`, element by element."""

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        parameters = self.subject.parameters
        return linear(vectors, parameters["weight"], parameters["normalize"])


def passthrough(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """scale M; M bit for bit at scale 1."""
    return weighted_sum([tensor], [scale])


class Passthrough(TensorMerge):
    """`passthrough`, element by element."""

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return passthrough(vectors[0], *self.subject.parameters["scale"])


def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], normalize: bool = False, scale: float = 1.0
) -> Tensor:
    """B + scale sum_i w_i delta_i, divided by sum_i w_i if normalize (https://arxiv.org/abs/2212.04089).

    With scale 0, or all weights 0, the result is the base bit for bit. A sum of weights under 1e-8 does not divide.

    Args:
        base: B, float32. deltas: delta_i = M_i - B in float32, of the same shape. scale: mergekit's `lambda`; a layer's
            value of `lines` makes it LiNeS.
    """
    total = math.fsum(weights)
    divisor = total if normalize and abs(total) >= SMALL_WEIGHT_SUM else 1.0
    coefficients = [scale * weight / divisor for weight in weights]
    if not any(coefficients):
        return base
    return base + weighted_sum(deltas, coefficients)


class TaskArithmetic(TensorMerge):
    """`task_arithmetic`, element by element."""

    vectors = "deltas"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        parameters = self.subject.parameters
        return task_arithmetic(
            vectors[0], vectors[1:], parameters["weight"], parameters["normalize"], parameters["lambda"]
        )


def lines(layer: int, layers: int, alpha: float, beta: float) -> float:
    """LiNeS (https://arxiv.org/abs/2410.17146): alpha + beta (l - 1) / (L - 1), the scale of layer l of L.

    Shallow layers, which are general, keep closer to the base than deep ones. In a YAML it is a gradient on the scale
    of any method on task vectors, `lambda: [alpha, alpha + beta]`. A gradient gives tensors outside the layers its
    first value; a filter gives them another: `lambda: [{filter: lm_head, value: 0.8}, {value: [0.2, 0.8]}]`.

    Args:
        layer: l - 1, counted from 0. layers: L; a single one has the scale alpha + beta, as in a gradient.
    """
    return alpha + beta * (layer / (layers - 1) if layers > 1 else 1.0)


def chat_vector(base: Tensor, cpt: Tensor, instruct: Tensor, scale: float = 1.0) -> Tensor:
    """C + scale (I - B): what instruction tuning added to B, added to a model C that went on from B.

    The chat vector of https://arxiv.org/abs/2310.04799, the instruction residual of https://arxiv.org/abs/2410.10739.
    In exact arithmetic it is task arithmetic with the weights 1 and scale; here C is not taken apart, so that the
    result is C bit for bit at scale 0, and equal to C where I equals B.

    Args:
        base, cpt, instruct: B, C, I, float32, of one shape.
    """
    return _add_residual(cpt, instruct - base, scale)


def _add_residual(cpt: Tensor, residual: Tensor, scale: float) -> Tensor:
    return cpt + (residual if scale == 1 else residual * scale) if scale else cpt


class ChatVector(TensorMerge):
    """`chat_vector`, element by element: the first of the two models is C, the second I.

    Filters leave out what should stay as C has it: `scale: [{filter: embed_tokens, value: 0}, {filter: lm_head, value:
    0}, {filter: norm, value: 0}, {value: 1}]`.
    """

    vectors = "both"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        _, cpt, _, _, residual = vectors
        return _add_residual(cpt, residual, self.subject.parameters["scale"])


def nearswap(base: Tensor, other: Tensor, t: float) -> Tensor:
    """w M + (1 - w) B with w = min(1, t / max(|M - B|, 1e-6)): where M is within t of B, M; elsewhere t away from B.

    From mergekit (huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001). B bit for bit at t <= 0; M where w = 1.
    """
    if t <= 0:
        return base
    weight = ((other - base).abs_().clamp_(min=SMALL_DIFFERENCE).reciprocal_() * t).clamp_(max=1)
    return other * weight + base * (1 - weight)


class Nearswap(TensorMerge):
    """`nearswap`, element by element."""

    vectors = "both"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return nearswap(vectors[0], vectors[1], self.subject.parameters["t"])


def check_weight_sum(parameters: Mapping[str, Any], switch: str) -> list[str]:
    """The problem of weights that shall be divided by their sum, if that is zero."""
    weights = parameters["weight"]
    total = math.fsum(weights)
    if parameters[switch] and abs(total) < SMALL_WEIGHT_SUM:
        return [f"weights {weights} sum to {total:g} under {switch}: true"]
    return []


def partial_sums(x: Tensor, y: Tensor, unit: int = ROW) -> Tensor:
    """Sums of x * y over runs of `unit` elements, float32 [ceil(n / unit)]: the same bits wherever they are computed.

    Each run is added up by a fixed binary tree of elementwise additions; a last short one is filled with zeros.
    `math.fsum` over the runs of all pieces then gives the dot product, rounded once, in whatever order they come.

    Args:
        x, y: float32, of one shape; a piece that begins at a multiple of `unit`.
    """
    return run_sums((x * y).reshape(-1), unit)


def run_sums(values: Tensor, unit: int = ROW) -> Tensor:
    """Sums of a flat tensor over runs of `unit` elements, each by a fixed binary tree; see `partial_sums`."""
    missing = -values.numel() % unit
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return tree_sum(values.view(-1, unit))


def tree_sum(rows: Tensor) -> Tensor:
    """Sums over the last dimension, each by a fixed binary tree of elementwise additions; 0 for a row of nothing."""
    if not rows.shape[-1]:
        return rows.sum(-1)
    while (length := rows.shape[-1]) > 1:
        half = length // 2
        total = rows[..., :half] + rows[..., length - half :]
        rows = torch.cat([total, rows[..., half : half + 1]], -1) if length % 2 else total
    return rows[..., 0]


def as_rows(flat: Tensor, columns: int) -> Tensor:
    """A flat piece as rows of the tensor's last dimension; rows of nothing are no rows."""
    return flat.view(-1, max(columns, 1))


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights_i tensors_i in the given order. A weight of 0 leaves its tensor out, so that 1 * x + 0 * y is x
    even where x is -0. Multiplication and addition stay two operations: fused they round differently elsewhere."""
    total: Tensor | None = None
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total = tensor * weight if total is None else total.add_(tensor * weight)
    return torch.zeros_like(tensors[0]) if total is None else total
