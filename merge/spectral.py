"""Merge methods on singular vectors of task vectors: TSV-M and Iso-C. A matrix is seen whole. Touches no files.

Singular values and vectors are float64, so the float32 result does not show in which order a library adds up, short of
a value that lies within 1e-12 of the middle between two float32 numbers. Directions whose singular value is below
max(rows, columns) 2^-52 of the largest are left out: their vectors are arbitrary.

An element costs 8 bytes several times: in a float64 task vector, in its singular vectors, in those of all task vectors
side by side, and in the result. Tensors of other than two dimensions have no singular vectors: there both methods take
the mean of the task vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .methods import task_arithmetic
from .tensor_merge import TensorMerge


def tsv_m(base: Tensor, deltas: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Task singular vectors (https://arxiv.org/abs/2412.00081): B + scale U' S V'^T.

    Of each of the N task vectors U_i S_i V_i^T the first min(rows, columns) / N singular triplets are kept, at least
    one. U, S and V are those of all task vectors side by side; U' and V' are the nearest matrices to U and V with
    orthonormal columns, which takes out what the tasks' singular vectors have in common.
    """
    if scale == 0 or base.ndim != 2 or not base.numel():
        return _mean_of_task_vectors(base, deltas, scale)
    rank = max(1, min(base.shape) // len(deltas))
    parts = [_first_triplets(delta, rank) for delta in deltas]
    left = torch.cat([u for u, _, _ in parts], 1)
    values = torch.cat([s for _, s, _ in parts])
    right = torch.cat([vh for _, _, vh in parts])
    merged = (orthonormal(left) * values) @ orthonormal(right)
    return base + (merged * scale).float()


def iso_c(base: Tensor, deltas: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Isotropic merging in the common subspace (https://arxiv.org/abs/2502.04959): B + scale mean(S) U V^T.

    U S V^T = sum_i delta_i: every direction of the summed task vector gets the mean of its singular values.
    """
    if scale == 0 or base.ndim != 2 or not base.numel():
        return _mean_of_task_vectors(base, deltas, scale)
    total = torch.stack([delta.double() for delta in deltas]).sum(0)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    return base + (_directions(u, s, vh) * (s.mean() * scale)).float()


def _first_triplets(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return u[:, :rank].clone(), s[:rank], vh[:rank].clone()  # without the rest, which would stay in memory


def orthonormal(x: Tensor) -> Tensor:
    """The partial isometry U V^T nearest to x = U S V^T (float64): orthogonal Procrustes."""
    return _directions(*torch.linalg.svd(x, full_matrices=False))


def _directions(u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    floor = s[0] * max(u.shape[0], vh.shape[1]) * torch.finfo(s.dtype).eps
    rank = int((s > floor).sum())
    return u[:, :rank] @ vh[:rank]


def _mean_of_task_vectors(base: Tensor, deltas: Sequence[Tensor], scale: float) -> Tensor:
    return task_arithmetic(base, deltas, [1.0] * len(deltas), normalize=True, scale=scale)


class TsvM(TensorMerge):
    """`tsv_m`."""

    vectors = "deltas"
    pieces = "whole"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        base, *deltas = (vector.view(self.subject.shape) for vector in vectors)
        return tsv_m(base, deltas, self.subject.parameters["lambda"]).view(-1)


class IsoC(TensorMerge):
    """`iso_c`."""

    vectors = "deltas"
    pieces = "whole"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        base, *deltas = (vector.view(self.subject.shape) for vector in vectors)
        return iso_c(base, deltas, self.subject.parameters["lambda"]).view(-1)
