"""The merge methods once more, in numpy and float64, as `steep merge verify` recomputes them.

Written from the formulas for the eye that checks, not for speed, and sharing no arithmetic with what it checks
(methods.py and its like, kernels/philox.py): whole tensors are sorted, angles are taken from float64 dot products. What
is shared is how inputs are read: adapters and arranged vocabularies are not checked here. Each formula also says how
far float32 arithmetic may lead away from it, and where a sign or a selection hangs on rounding, what the result is the
other way round. Touches no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np

from .recompute_task import EPS, Array, Expected, Formula, Task, blocks, coefficients, decided, weighted
from .recompute_thinned import (
    arcee_fusion,
    consensus_ta,
    elected,
    isotropic,
    on_matrices,
    ram,
    sce,
    sum_of_thinned,
    task_singular_vectors,
)

DOT = 1e-6  # error of a cosine from float32 products added up in a tree
STRAIGHT, SMALL = 0.9995, 1e-8


def formula(method: str, task: Task) -> Formula:
    """What a method makes of a tensor. Reads it as a whole where the method depends on that.

    Raises:
        KeyError: a method that has no formula here.
    """
    return FORMULAS[method](task)


def _linear(task: Task) -> Formula:
    weights = task.parameters["weight"]
    return weighted(task, np.divide(weights, sum(weights) if task.parameters["normalize"] else 1).tolist())


def _passthrough(task: Task) -> Formula:
    return weighted(task, task.parameters["scale"])


def _task_arithmetic(task: Task) -> Formula:
    return weighted(task, coefficients(task))


def _chat_vector(task: Task) -> Formula:
    def at(lo: int, hi: int) -> Expected:
        cpt = task.model(0, lo, hi).astype(np.float64)
        part = task.parameters["scale"] * task.delta(1, lo, hi).astype(np.float64)
        return decided(cpt + part, 8 * EPS * (abs(cpt) + abs(part)) * (task.parameters["scale"] != 0))

    return Formula(1, at)


def _nearswap(task: Task) -> Formula:
    t = task.parameters["t"]

    def at(lo: int, hi: int) -> Expected:
        base, other = task.base(lo, hi), task.model(0, lo, hi).astype(np.float64)
        if t <= 0:
            return decided(base, np.zeros(hi - lo))
        distance = np.maximum(abs(task.delta(0, lo, hi).astype(np.float64)), 1e-6)
        weight = np.minimum(1, t / distance)
        return decided(weight * other + (1 - weight) * base, 16 * EPS * (abs(base) + abs(other)))

    return Formula(1, at)


# angles


def _gram(task: Task, vector: Callable[[int, int, int], Array], count: int) -> Array:
    parts = []
    for lo, hi in blocks(task.numel):
        x = np.stack([vector(i, lo, hi).astype(np.float64) for i in range(count)])
        parts.append(x @ x.T)
    return np.sum(parts, axis=0) if parts else np.zeros((count, count))


def _arc(cosine: float, t: float, straight: Callable[[float], bool]) -> tuple[float, float]:
    """Weights of the ends of an arc at t."""
    cosine = min(1.0, max(-1.0, cosine))
    if t in (0, 1) or straight(cosine):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _arc_with_errors(cosine: float, t: float, straight: Callable[[float], bool]) -> tuple[list[float], list[float]]:
    """Weights, and how far they move if the cosine is off by its error: far, where the line is nearly straight."""
    here = _arc(cosine, t, straight)
    near = [_arc(cosine + error, t, straight) for error in (-DOT, -DOT / 8, DOT / 8, DOT)]
    return list(here), [max(abs(other[i] - here[i]) for other in near) for i in (0, 1)]


def _collinear(cosine: float) -> bool:
    return 1 - cosine * cosine <= 1e-16


def _slerp(task: Task) -> Formula:
    both = Task(task.name, task.shape, task.parameters, ("base", *task.models), task.seed, False, task.load)
    gram = _gram(both, both.model, 2)
    norms = [norm if norm > SMALL else 1.0 for norm in np.sqrt(np.diag(gram))]
    cosine = float(gram[0, 1] / (norms[0] * norms[1]))
    return weighted(both, *_arc_with_errors(cosine, task.parameters["t"], lambda c: abs(c) > STRAIGHT))


def _nuslerp(task: Task) -> Formula:
    weights = task.parameters["weight"]
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    if task.parameters["nuslerp_flatten"]:
        gram = _gram(task, task.vector, 2)
        norms = np.sqrt(np.diag(gram))
        cosine = float(gram[0, 1] / norms.prod()) if norms.all() else 0.0
        return weighted(task, *_arc_with_errors(cosine, t, _collinear))
    first = task.parameters["nuslerp_row_wise"] and len(task.shape) > 1

    def at(lo: int, hi: int) -> Expected:
        shape = task.shape if first else (-1, task.columns)
        lines = [task.vector(i, lo, hi).astype(np.float64).reshape(shape) for i in (0, 1)]
        if first:
            lines = [np.moveaxis(x, 0, -1) for x in lines]
        a, b = lines
        norms = np.sqrt((a * a).sum(-1)) * np.sqrt((b * b).sum(-1))
        cosines = np.divide((a * b).sum(-1), norms, out=np.zeros_like(norms), where=norms > 0)
        found = [_arc_with_errors(float(cosine), t, _collinear) for cosine in cosines.reshape(-1)]
        w = np.array([here for here, _ in found]).reshape(*cosines.shape, 1, 2)
        e = np.array([errors for _, errors in found]).reshape(*cosines.shape, 1, 2)
        merged, size = w[..., 0] * a + w[..., 1] * b, abs(w[..., 0] * a) + abs(w[..., 1] * b)
        slack = e[..., 0] * abs(a) + e[..., 1] * abs(b)
        if first:
            merged, size, slack = (np.moveaxis(x, -1, 0) for x in (merged, size, slack))
        base = task.base(lo, hi)
        return decided(base + merged.reshape(-1), slack.reshape(-1) + 16 * EPS * (size.reshape(-1) + abs(base)))

    return Formula(task.numel if first else task.columns, at)


def _multislerp(task: Task) -> Formula:
    weights, eps = task.parameters["weight"], task.parameters["eps"]
    if len(weights) == 1:
        return weighted(task, [1.0])
    gram = _gram(task, task.vector, task.count)
    shares = np.divide(weights, sum(weights) if task.parameters["normalize_weights"] else 1)
    norms = np.sqrt(np.diag(gram))
    if not norms.any():
        return weighted(task, shares.tolist())
    units = shares / (norms + eps)
    length = math.sqrt(max(0.0, float(units @ gram @ units)))
    if length < eps:
        return weighted(task, shares.tolist())
    weights = float(shares @ norms) / length * units
    off = DOT * float(abs(shares).sum() / length) ** 2
    return weighted(task, weights.tolist(), (off * abs(weights)).tolist())


def _karcher(task: Task) -> Formula:
    """The mean direction from the dot products of the models' directions."""
    count, tol = task.count, task.parameters["tol"]
    gram = _gram(task, task.model, count)
    norms = np.sqrt(np.diag(gram))
    valid = np.flatnonzero(norms > tol)
    if count == 1 or not len(valid):
        return weighted(task, [1 / count] * count)
    cosines = (gram / np.outer(norms, norms).clip(min=np.finfo(float).tiny))[np.ix_(valid, valid)]

    def unit(vector: Array) -> Array | None:
        length = math.sqrt(max(0.0, float(vector @ cosines @ vector)))
        return None if length < tol else vector / length

    share = 1 / len(valid)
    started = unit(np.full(len(valid), share))
    mean = np.eye(len(valid))[0] if started is None else started
    for _ in range(int(task.parameters["max_iter"])):
        projections = cosines @ mean
        angles = np.arccos(projections.clip(-1, 1))
        pulls = np.array([
            share * a / math.sin(a) if tol <= a <= math.pi - tol else 0.0 for a in angles.tolist()
        ])  # fmt: skip
        step = pulls - float(pulls @ projections) * mean
        length = math.sqrt(max(0.0, float(step @ cosines @ step)))
        if length < tol:
            break
        turned = math.cos(length) * mean + math.sin(length) / length * step
        turned_unit = unit(turned)
        mean = turned if turned_unit is None else turned_unit
    shares = np.zeros(count)
    shares[valid] = norms.mean() * mean / norms[valid]
    return weighted(task, shares.tolist(), ((4 * tol + 4 * DOT) * abs(shares)).tolist())


def _model_stock(task: Task) -> Formula:
    count, columns = task.count, task.columns

    def ratio(cosine: Array) -> Array:
        divisor = 1 + (count - 1) * cosine
        return np.where(abs(divisor) < 1e-6, 0.0, count * cosine / np.where(divisor == 0, 1, divisor))

    def with_error(cosine: Array) -> tuple[Array, Array]:
        here = ratio(cosine)
        near = [abs(ratio(cosine + error) - here) for error in (-DOT, DOT)]
        return here / count, np.maximum(*near) / count

    def mean_cosine(dots: Callable[[int, int], Array]) -> Array:
        found = []
        for i, j in combinations(range(count), 2):
            norms = np.sqrt(dots(i, i)) * np.sqrt(dots(j, j))
            cosine = np.divide(dots(i, j), norms, out=np.zeros_like(norms), where=norms > 0)
            found.append(cosine.clip(-1, 1))
        return np.mean(found, axis=0)

    if not task.parameters["filter_wise"]:
        gram = _gram(task, task.delta, count)
        t, error = with_error(mean_cosine(lambda i, j: np.asarray(gram[i, j])))
        return weighted(task, [float(t)] * count, [float(error)] * count)

    def at(lo: int, hi: int) -> Expected:
        deltas = [task.delta(i, lo, hi).astype(np.float64).reshape(-1, columns) for i in range(count)]
        t, error = with_error(mean_cosine(lambda i, j: (deltas[i] * deltas[j]).sum(-1)))
        total, size = sum(deltas), sum(abs(delta) for delta in deltas)
        base = task.base(lo, hi)
        slack = (error[:, None] * size + 16 * EPS * abs(t)[:, None] * size).reshape(-1) + 16 * EPS * abs(base)
        return decided(base + (t[:, None] * total).reshape(-1), slack)

    return Formula(columns, at)


FORMULAS: dict[str, Callable[[Task], Formula]] = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "task_arithmetic": _task_arithmetic,
    "ties": elected("trim"),
    "dare_linear": sum_of_thinned("dare"),
    "dare_ties": elected("dare"),
    "breadcrumbs": sum_of_thinned("outliers"),
    "breadcrumbs_ties": elected("outliers"),
    "della": elected("della"),
    "della_linear": sum_of_thinned("della"),
    "sce": sce,
    "ram": ram,
    "ramplus_tl": lambda task: ram(task, plus=True),
    "nearswap": _nearswap,
    "arcee_fusion": arcee_fusion,
    "passthrough": _passthrough,
    "chat_vector": _chat_vector,
    "consensus_ta": consensus_ta,
    "tsv_m": on_matrices(task_singular_vectors),
    "iso_c": on_matrices(isotropic),
}
