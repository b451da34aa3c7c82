"""Merge methods in which task vectors agree on each element: by sign, by number, or by how much they vary.

TIES and what is built like it (thin every task vector, then add up, with or without election of a sign), SCE, RAM and
consensus task arithmetic. Pure functions and the classes that carry them out on pieces. Touches no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .methods import run_sums, task_arithmetic, weighted_sum
from .sparsify import Dare, Della, LargestK, Sparsifier, Thinned, Trim, TrimOutliers, della_problem, largest, trim
from .tensor_merge import Subject, Sums, TensorMerge

SignOf = Literal["weighted", "unweighted"]


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


def ties_consensus(
    base: Tensor,
    trimmed: Sequence[Tensor],
    weights: Sequence[float],
    normalize: bool = True,
    scale: float = 1.0,
    sign: SignOf = "weighted",
) -> Tensor:
    """B + scale sum_i m_i d_i, divided by sum_i m_i w_i if normalize; element by element.

    d_i = w_i tau_i for the trimmed task vectors tau_i. The elected sign is that of sum_i d_i, plus where the sum is 0;
    m_i is 1 where d_i has that sign, so zeros take no part in the divisor. A divisor of 0 does not divide.

    Args:
        sign: "unweighted": the elected sign is that of sum_i tau_i and m_i is 1 where tau_i has it, as in the paper.
    """
    if scale == 0:
        return base
    weighted = [tau * weight for tau, weight in zip(trimmed, weights, strict=True)]
    voting = weighted if sign == "weighted" else trimmed
    # Float arithmetic throughout: boolean masks and torch.where are ten times slower on a CPU.
    elected = _elected_sign(voting)
    merged = torch.zeros_like(base)
    divisor = torch.zeros_like(base)
    for vote, d, weight in zip(voting, weighted, weights):
        agreeing = (vote * elected).clamp_(min=0)  # m_i |d_i|
        if sign == "weighted":
            merged += agreeing
            divisor += agreeing.sign_() * weight
        else:
            agreeing.sign_()  # m_i
            merged += d * elected * agreeing
            divisor += agreeing * weight
    if normalize:
        divisor += torch.eq(divisor, 0, out=torch.empty_like(divisor))
        merged /= divisor
    if scale != 1:
        merged *= scale
    return (merged * elected).add_(base)


def _elected_sign(votes: Sequence[Tensor]) -> Tensor:
    """1 or -1: the sign of the sum, plus where it is 0."""
    total = votes[0].clone()
    for vote in votes[1:]:
        total += vote
    return torch.copysign(torch.ones_like(total), total + 0.0)  # -0 + 0 is 0, whose sign is plus


class ThinnedMerge(TensorMerge):
    """Task vectors thinned by a rule (sparsify.py), then `task_arithmetic` of what is left, or `ties_consensus`."""

    vectors = "deltas"
    thin_by: ClassVar[type[Sparsifier]]
    elect_sign: ClassVar[bool]

    @classmethod
    def check(cls, parameters: Mapping[str, Any]) -> list[str]:
        if parameters["rescale"] == "elementwise" and not issubclass(cls.thin_by, Della):
            return ["rescale: 'elementwise' divides by DELLA's probabilities; allowed: true, false, l1, inv_density"]
        return []

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._thinned = Thinned(self.thin_by, subject)
        self.looks, self.pieces = self._thinned.looks, self._thinned.pieces

    def look(self, number: int, lo: int, vectors: Sequence[Tensor]) -> None:
        self._thinned.look(number, lo, vectors[1:])

    def end_look(self, number: int, sums: Sums) -> None:
        self._thinned.end_look(number)

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        parameters = self.subject.parameters
        weights, normalize, scale = (parameters[name] for name in ("weight", "normalize", "lambda"))
        taus = self._thinned.keep(lo, vectors[1:])
        if self.elect_sign:
            return ties_consensus(vectors[0], taus, weights, normalize, scale, parameters["ties_sign"])
        return task_arithmetic(vectors[0], taus, weights, normalize, scale)

    def figures(self) -> dict[str, Any]:
        return self._thinned.figures()


class Ties(ThinnedMerge):
    """`ties`: `trim`, or `trim_rows` under `topk_scope: row`, then `ties_consensus`."""

    thin_by, elect_sign = Trim, True


class Breadcrumbs(ThinnedMerge):
    """`trim_outliers`, then `task_arithmetic` (https://arxiv.org/abs/2312.06795)."""

    thin_by, elect_sign = TrimOutliers, False


class BreadcrumbsTies(ThinnedMerge):
    """`trim_outliers`, then `ties_consensus`."""

    thin_by, elect_sign = TrimOutliers, True


class DareLinear(ThinnedMerge):
    """`dare`, then `task_arithmetic` (https://arxiv.org/abs/2311.03099)."""

    thin_by, elect_sign = Dare, False


class DareTies(ThinnedMerge):
    """`dare`, then `ties_consensus`."""

    thin_by, elect_sign = Dare, True


class DellaLinear(ThinnedMerge):
    """`della`, then `task_arithmetic` (https://arxiv.org/abs/2406.11617)."""

    thin_by, elect_sign = Della, False

    @classmethod
    def check(cls, parameters: Mapping[str, Any]) -> list[str]:
        pairs = zip(parameters["density"], parameters["epsilon"], strict=True)
        return [problem for density, epsilon in pairs if (problem := della_problem(density, epsilon))]


class DellaTies(DellaLinear):
    """`della`, then `ties_consensus`: mergekit's `della`."""

    elect_sign = True


def sce(base: Tensor, deltas: Sequence[Tensor], select_topk: float = 1.0) -> Tensor:
    """Select, calculate, erase (https://arxiv.org/abs/2408.07990).

    Selected are the int(select_topk c) positions whose delta_i vary most over the models, c counting those that vary at
    all (equal variances: lowest index first); tau_i is delta_i there and 0 elsewhere, all of delta_i at select_topk 1.
    The models' weights w_i are proportional to mean(tau_i^2); the elected sign is that of sum_i tau_i, plus where it is
    0. The result is B + sum_i m_i w_i tau_i / sum_i m_i w_i with m_i = 1 where tau_i has the elected sign.

    mergekit falls back to equal weights when sum_i mean(tau_i^2) < 1e-6, which ordinary fine-tuning never exceeds, and
    does not divide by less than 1e-6; here weights are equal only when all tau_i are 0, and only 0 does not divide.
    """
    taus = list(deltas)
    if select_topk < 1:
        spread = _variance(deltas)
        selected = _selected(largest(spread, int(select_topk * int(spread.count_nonzero()))))
        taus = [delta * selected for delta in deltas]
    squares = [math.fsum(run_sums((tau * tau).reshape(-1)).tolist()) for tau in taus]
    return _sce_merge(base, taus, _sce_weights(squares))


def _variance(deltas: Sequence[Tensor]) -> Tensor:
    """Over the models, element by element; divided by their number."""
    share = 1 / len(deltas)
    mean = weighted_sum(deltas, [share] * len(deltas))
    deviations = [delta - mean for delta in deltas]
    return weighted_sum([deviation * deviation for deviation in deviations], [share] * len(deltas))


def _selected(largest_variances: Tensor) -> Tensor:
    """1 where a variance was kept, 0 elsewhere: all that are kept are positive."""
    return largest_variances.sign()


def _sce_weights(squares: Sequence[float]) -> list[float]:
    total = math.fsum(squares)
    return [square / total for square in squares] if total else [1 / len(squares)] * len(squares)


def _sce_merge(base: Tensor, taus: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return ties_consensus(base, taus, weights, normalize=True, sign="unweighted")


class Sce(TensorMerge):
    """`sce`: two looks for the selection by variance and one for the weights; for select_topk 1 one look."""

    vectors = "deltas"

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._share: float = subject.parameters["select_topk"]
        self._selecting = self._share < 1
        self.looks = 3 if self._selecting else 1
        self._largest = LargestK(subject.numel, [0], subject.device)
        self._varying = 0
        self._squares: list[list[float]] = [[] for _ in subject.models]
        self._weights: list[float] = []

    def look(self, number: int, lo: int, vectors: Sequence[Tensor]) -> None:
        deltas = vectors[1:]
        if number < self.looks - 1:
            spread = _variance(deltas)
            self._largest.count(spread)
            if not number:
                self._varying += int(spread.count_nonzero())
        else:
            for squares, tau in zip(self._squares, self._select(deltas), strict=True):
                squares += run_sums(tau * tau).tolist()

    def end_look(self, number: int, sums: Sums) -> None:
        if number == self.looks - 1:
            self._weights = _sce_weights([math.fsum(squares) for squares in self._squares])
            return
        if not number:
            self._largest.ks = [int(self._share * self._varying)]
        self._largest.end_pass()

    def _select(self, deltas: Sequence[Tensor]) -> list[Tensor]:
        if not self._selecting:
            return list(deltas)
        selected = _selected(self._largest.keep(_variance(deltas))[0])
        return [delta * selected for delta in deltas]

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return _sce_merge(vectors[0], self._select(vectors[1:]), self._weights)

    def figures(self) -> dict[str, Any]:
        return {"weights": self._weights}


def ram(base: Tensor, deltas: Sequence[Tensor], epsilon: float = 1e-5) -> Tensor:
    """Reinforced agent merging (https://arxiv.org/abs/2601.13572): B + the mean of those delta_i that are active.

    delta_i is active on an element where |delta_i| > epsilon; elements that no model changes keep the base.
    """
    return _ram_merge(base, deltas, epsilon, [1.0] * len(deltas))


def ramplus_tl(
    base: Tensor, deltas: Sequence[Tensor], epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Tensor:
    """`ram` in which elements that only model i changes are multiplied by 1 + r min(alpha, shared_i / unique_i).

    shared_i and unique_i count the elements of this tensor that model i changes with others and alone; a unique_i of 0
    counts as epsilon.
    """
    factors = [_ram_factor(*counts, epsilon, r, alpha) for counts in _ram_counts(deltas, epsilon)]
    return _ram_merge(base, deltas, epsilon, factors)


def _active(delta: Tensor, epsilon: float) -> Tensor:
    """1 where |delta| > epsilon, else 0."""
    return torch.gt(delta.abs(), epsilon, out=torch.empty_like(delta))


def _actives(deltas: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Where each task vector is active, and how many are."""
    active = [_active(delta, epsilon) for delta in deltas]
    return active, weighted_sum(active, [1.0] * len(active))


def _ram_counts(deltas: Sequence[Tensor], epsilon: float) -> list[tuple[int, int]]:
    """(shared, unique) elements of every model."""
    active, models = _actives(deltas, epsilon)
    here = [models * own for own in active]
    return [(int((count > 1).sum()), int((count == 1).sum())) for count in here]


def _ram_factor(shared: int, unique: int, epsilon: float, r: float, alpha: float) -> float:
    divisor = max(unique, epsilon)
    return 1 + r * (min(alpha, shared / divisor) if divisor else alpha)


def _ram_merge(base: Tensor, deltas: Sequence[Tensor], epsilon: float, factors: Sequence[float]) -> Tensor:
    active, models = _actives(deltas, epsilon)
    alone = torch.eq(models, 1, out=torch.empty_like(models))
    total = torch.zeros_like(base)
    for delta, here, factor in zip(deltas, active, factors, strict=True):
        part = delta * here
        if factor != 1:
            part *= alone * (factor - 1) + 1
        total += part
    return base + total / models.clamp_(min=1)


class Ram(TensorMerge):
    """`ram`, element by element."""

    vectors = "deltas"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return ram(vectors[0], vectors[1:], self.subject.parameters["epsilon"])


class RamPlus(TensorMerge):
    """`ramplus_tl`: one look counts shared and unique elements."""

    vectors = "deltas"
    looks = 1

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self._counts = [(0, 0)] * len(subject.models)
        self._factors: list[float] = []

    def look(self, number: int, lo: int, vectors: Sequence[Tensor]) -> None:
        found = _ram_counts(vectors[1:], self.subject.parameters["epsilon"])
        self._counts = [(a + c, b + d) for (a, b), (c, d) in zip(self._counts, found, strict=True)]

    def end_look(self, number: int, sums: Sums) -> None:
        epsilon, r, alpha = (self.subject.parameters[name] for name in ("epsilon", "r", "alpha"))
        self._factors = [_ram_factor(*counts, epsilon, r, alpha) for counts in self._counts]

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        return _ram_merge(vectors[0], vectors[1:], self.subject.parameters["epsilon"], self._factors)

    def figures(self) -> dict[str, Any]:
        shared, unique = zip(*self._counts)
        return {"shared": list(shared), "unique": list(unique), "factors": self._factors}


def consensus_ta(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    tall_lambdas: Sequence[float],
    consensus_k: float = 2,
    scale: float = 1.0,
) -> Tensor:
    """Consensus task arithmetic (https://arxiv.org/abs/2405.07813): B + scale tau where enough models need tau.

    tau = sum_i w_i delta_i. Model i needs an element (its TALL mask) where |delta_i| > lambda_i |tau - delta_i|; kept
    is what at least consensus_k models need, so that 2 drops what serves no model and what serves only one.

    Args:
        tall_lambdas: lambda_i; the paper chooses each among 0.2 ... 0.6 on validation data.
    """
    if scale == 0:
        return base
    tau = weighted_sum(deltas, weights)
    needing = torch.zeros_like(base)
    for delta, tall_lambda in zip(deltas, tall_lambdas, strict=True):
        needing += tall_mask(delta, tau, tall_lambda)
    agreed = torch.ge(needing, consensus_k, out=torch.empty_like(base))
    return base + tau * agreed * scale


def tall_mask(delta: Tensor, tau: Tensor, tall_lambda: float) -> Tensor:
    """1 where |delta| > lambda |tau - delta|, else 0: where the merged task vector tau serves this model."""
    return torch.gt(delta.abs(), (tau - delta).abs_().mul_(tall_lambda), out=torch.empty_like(delta))


class ConsensusTa(TensorMerge):
    """`consensus_ta`, element by element."""

    vectors = "deltas"

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        names = ("weight", "tall_lambda", "consensus_k", "lambda")
        return consensus_ta(vectors[0], vectors[1:], *(self.subject.parameters[name] for name in names))
