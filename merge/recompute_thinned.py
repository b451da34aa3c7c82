"""Recomputation of methods on thinned or selected task vectors and on singular vectors, in numpy (recompute.py).

Whole task vectors are sorted or masked; Philox is spelt out. Touches no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .recompute_task import EPS, Array, Expected, Formula, Task, blocks, coefficients, decided, weighted

# task vectors that are thinned


def _largest(size: Array, k: int) -> Array:
    """True for the k largest, the lowest index first among equals."""
    if k <= 0 or k >= len(size):
        return np.full(len(size), k > 0)
    least = np.partition(size, len(size) - k)[len(size) - k]
    mask = size > least
    mask[np.flatnonzero(size == least)[: k - int(mask.sum())]] = True
    return mask


def _ranks(size: Array) -> Array:
    """0 for the smallest of every row ... columns - 1 for the largest; of equals the one of lower index is larger."""
    columns = size.shape[1]
    ascending = columns - 1 - np.argsort(size[:, ::-1], axis=1, kind="stable")
    ranks = np.empty_like(ascending)
    np.put_along_axis(ranks, ascending, np.arange(columns)[None].repeat(len(size), 0), 1)
    return ranks


def philox(key: int, stream: int, lo: int, hi: int) -> Array:
    """uint64 [hi - lo] below 2^32: Philox4x32-10 (Salmon et al. 2011) of the counters (index // 4, stream)."""
    word, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    index = np.arange(lo // 4, -(-hi // 4), dtype=np.uint64)
    x = [index & mask, index >> word, np.full_like(index, stream & 0xFFFFFFFF), np.full_like(index, stream >> 32)]
    keys = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        high = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [
            (high[1] >> word) ^ x[1] ^ np.uint64(keys[0]),
            high[1] & mask,
            (high[0] >> word) ^ x[3] ^ np.uint64(keys[1]),
            high[0] & mask,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(x, 1).reshape(-1)[lo - lo // 4 * 4 :][: hi - lo]


def _random_words(task: Task, i: int, lo: int, hi: int) -> Array:
    digest = hashlib.blake2b(json.dumps([task.seed, task.name, task.models[i]]).encode(), digest_size=16).digest()
    return philox(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"), lo, hi)


def _probabilities(task: Task, i: int, delta: Array) -> Array:
    """DELLA's, times 2^32 and rounded, for whole rows."""
    columns, density, epsilon = task.columns, task.parameters["density"][i], task.parameters["epsilon"][i]
    if columns == 1:
        return np.full(len(delta), round(density * 2**32), np.uint64)
    steps = (density - epsilon) + 2 * epsilon / (columns - 1) * np.arange(columns)
    return np.round(steps * 2**32).astype(np.uint64)[_ranks(abs(delta).reshape(-1, columns))].reshape(-1)


def _mask(task: Task, i: int, rule: str, delta: Array) -> tuple[Array, Array | None]:
    """Which elements of a whole task vector are kept; and what they are divided by, where that differs."""
    parameters, numel, density = task.parameters, task.numel, task.parameters["density"][i]
    if rule == "trim" and parameters["topk_scope"] == "row":
        columns = task.columns
        k = max(1, int(density * columns)) if density > 0 else 0
        return _ranks(abs(delta).reshape(-1, columns)).reshape(-1) >= columns - k, None
    if rule == "trim":
        return _largest(abs(delta), max(1, int(density * numel)) if density > 0 and numel else 0), None
    if rule == "outliers":
        k = int(density * numel)
        dropped = 0 if density >= 1 else min(int(parameters["gamma"][i] * numel), numel - k)
        return _largest(abs(delta), dropped + k) & ~_largest(abs(delta), dropped), None
    if density in (0, 1):
        return np.full(numel, bool(density)), None
    mask = np.empty(numel, bool)
    divisors = np.ones(numel, np.float32) if parameters["rescale"] == "elementwise" else None
    for lo, hi in blocks(numel, task.columns):
        limits: Any = np.uint64(round(density * 2**32))
        if rule == "della":
            limits = _probabilities(task, i, delta[lo:hi])
            if divisors is not None:
                divisors[lo:hi] = limits / 2**32
        mask[lo:hi] = _random_words(task, i, lo, hi) < limits
    return mask, divisors


def _thinned(task: Task, rule: str) -> Callable[[int, int], list[Array]]:
    """The thinned and rescaled task vectors of a range, float64."""
    rescale = task.parameters["rescale"]
    masks, divisors, factors = [], [], []
    for i, density in enumerate(task.parameters["density"]):
        delta = task.whole_delta(i)
        mask, divisor = _mask(task, i, rule, delta)
        factor = 1 / density if rescale == "inv_density" and density else 1.0
        if rescale == "l1":
            before = np.abs(delta).sum(dtype=np.float64)
            after = np.abs(delta[mask]).sum(dtype=np.float64)
            factor = 1.0 if min(before, after) < 1e-7 else before / after
        masks.append(mask)
        divisors.append(divisor)
        factors.append(factor)

    def at(lo: int, hi: int) -> list[Array]:
        taus = []
        for i, (mask, divisor, factor) in enumerate(zip(masks, divisors, factors)):
            tau = task.delta(i, lo, hi).astype(np.float64) * mask[lo:hi] * factor
            taus.append(tau if divisor is None else tau / divisor[lo:hi])
        return taus

    return at


def sum_of_thinned(rule: str) -> Callable[[Task], Formula]:
    def method(task: Task) -> Formula:
        thinned, shares = _thinned(task, rule), coefficients(task)

        def at(lo: int, hi: int) -> Expected:
            base, taus = task.base(lo, hi), thinned(lo, hi)
            parts = [c * tau for c, tau in zip(shares, taus, strict=True)]
            return decided(base + sum(parts), 64 * EPS * (abs(base) + sum(abs(part) for part in parts)))

        return Formula(1, at)

    return method


def elected(rule: str) -> Callable[[Task], Formula]:
    def method(task: Task) -> Formula:
        thinned, parameters = _thinned(task, rule), task.parameters
        names = ("weight", "normalize", "lambda", "ties_sign")
        weights, normalize, scale, sign = (parameters[name] for name in names)
        return Formula(1, lambda lo, hi: _elect(task.base(lo, hi), thinned(lo, hi), weights, normalize, scale, sign))

    return method


def _elect(
    base: Array, taus: Sequence[Array], weights: Sequence[float], normalize: bool, scale: float, sign: str
) -> Expected:
    """TIES from the election of a sign on, and what it gives with the other sign where the vote is a matter of float32
    rounding."""
    parts = [w * tau for w, tau in zip(weights, taus, strict=True)]
    votes = parts if sign == "weighted" else list(taus)
    total, cast = _add(votes), _add([abs(vote) for vote in votes])
    plus = total >= 0
    found = []
    for positive in (plus, ~plus):
        agree = [np.where(positive, vote > 0, vote < 0) for vote in votes]
        merged = _add([part * m for part, m in zip(parts, agree)])
        size = _add([abs(part) * m for part, m in zip(parts, agree)])
        divisor = sum(w * m for w, m in zip(weights, agree)) if normalize else np.ones_like(base)
        divisor = np.where(divisor == 0, 1.0, divisor)
        doubtful = abs(divisor) < 1e-6 * sum(map(abs, weights))  # weights that cancel but for rounding
        slack = 64 * EPS * (abs(base) + abs(scale / divisor) * size)
        found.append((base + scale * merged / divisor, np.where(doubtful, np.inf, slack)))
    (values, slack), (other, other_slack) = found
    undecided = (abs(total) <= 16 * EPS * cast) & (cast > 0) & (scale != 0)
    return Expected(
        values, np.where(undecided, np.maximum(slack, other_slack), slack), np.where(undecided, other, values)
    )


# task vectors that are selected


def sce(task: Task) -> Formula:
    count, numel, share = task.count, task.numel, np.float32(1 / task.count)
    mask = np.ones(numel, bool)
    if (topk := task.parameters["select_topk"]) < 1:
        spread = np.empty(numel, np.float32)
        for lo, hi in blocks(numel):
            deltas = [task.delta(i, lo, hi) for i in range(count)]
            mean = _add([delta * share for delta in deltas])
            spread[lo:hi] = _add([(delta - mean) * (delta - mean) * share for delta in deltas])
        mask = _largest(spread, int(topk * np.count_nonzero(spread)))
    squares = [0.0] * count
    for lo, hi in blocks(numel):
        for i in range(count):
            squares[i] += float(np.square(task.delta(i, lo, hi).astype(np.float64) * mask[lo:hi]).sum())
    total = sum(squares)
    weights = [square / total if total else 1 / count for square in squares]

    def at(lo: int, hi: int) -> Expected:
        taus = [task.delta(i, lo, hi).astype(np.float64) * mask[lo:hi] for i in range(count)]
        return _elect(task.base(lo, hi), taus, weights, True, 1.0, "unweighted")

    return Formula(1, at)


def _add(vectors: Sequence[Array]) -> Array:
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


def ram(task: Task, plus: bool = False) -> Formula:
    epsilon, count = task.parameters["epsilon"], task.count

    def active(lo: int, hi: int) -> list[Array]:
        return [abs(task.delta(i, lo, hi)) > np.float32(epsilon) for i in range(count)]

    factors = [1.0] * count
    if plus:
        alone, shared = np.zeros(count, int), np.zeros(count, int)
        for lo, hi in blocks(task.numel):
            here = np.stack(active(lo, hi))
            several = here.sum(0) > 1
            shared += (here & several).sum(1)
            alone += (here & ~several).sum(1)
        r, alpha = task.parameters["r"], task.parameters["alpha"]
        for i in range(count):
            divisor = max(int(alone[i]), epsilon)
            factors[i] = 1 + r * (min(alpha, shared[i] / divisor) if divisor else alpha)

    def at(lo: int, hi: int) -> Expected:
        here, base = active(lo, hi), task.base(lo, hi)
        models = sum(mask.astype(int) for mask in here)
        scale = [np.where(models == 1, factor, 1.0) for factor in factors]
        parts = [task.delta(i, lo, hi).astype(np.float64) * here[i] * scale[i] for i in range(count)]
        divisor = np.maximum(models, 1)
        size = abs(base) + sum(abs(part) for part in parts) / divisor
        return decided(base + sum(parts) / divisor, 16 * EPS * size)

    return Formula(1, at)


def consensus_ta(task: Task) -> Formula:
    names = ("weight", "tall_lambda", "consensus_k", "lambda")
    weights, limits, least, scale = (task.parameters[name] for name in names)

    def at(lo: int, hi: int) -> Expected:
        base = task.base(lo, hi)
        deltas = [task.delta(i, lo, hi).astype(np.float64) for i in range(task.count)]
        parts = [w * delta for w, delta in zip(weights, deltas, strict=True)]
        tau, size = sum(parts), sum(abs(part) for part in parts)
        needing = np.zeros(hi - lo)
        doubtful = np.zeros(hi - lo, bool)
        for delta, limit in zip(deltas, limits, strict=True):
            margin = abs(delta) - limit * abs(tau - delta)
            needing += margin > 0
            doubtful |= (abs(margin) <= 16 * EPS * (abs(delta) + limit * (size + abs(delta)))) & (size + abs(delta) > 0)
        agreed = needing >= least
        change = scale * tau
        return Expected(
            base + change * agreed,
            16 * EPS * (abs(base) + abs(scale) * size),
            base + change * np.where(doubtful, ~agreed, agreed),
        )

    return Formula(1, at)


def arcee_fusion(task: Task) -> Formula:
    columns, numel = task.columns, task.numel

    def softmax(x: Array) -> Array:
        rows = x.reshape(-1, columns).astype(np.float64)
        powers = np.exp(rows - rows.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True) + 1e-8

    def scores(lo: int, hi: int) -> Array:
        p, q = softmax(task.model(0, lo, hi)), softmax(task.load(0, lo, hi))
        divergence = (p * np.log(p / q)).sum(1).clip(min=0)
        return (abs(task.delta(0, lo, hi)).astype(np.float64).reshape(-1, columns) * divergence[:, None]).reshape(-1)

    importance = np.empty(numel, np.float32)
    for lo, hi in blocks(numel, columns):
        importance[lo:hi] = scores(lo, hi)
    places = [(numel - 1) * quarters // 4 for quarters in (1, 2, 3)]
    lower, median, upper = np.partition(importance, places)[places].astype(np.float64)
    limit = median + 1.5 * (upper - lower)

    def at(lo: int, hi: int) -> Expected:
        base, delta = task.base(lo, hi), task.delta(0, lo, hi).astype(np.float64)
        found = scores(lo, hi)
        chosen = found.astype(np.float32) >= limit
        doubtful = abs(found - limit) <= 1e-5 * (abs(median) + abs(upper) + abs(lower)) + 1e-14 * abs(delta)
        slack = 8 * EPS * (abs(base) + abs(delta))
        return Expected(base + delta * chosen, slack, base + delta * np.where(doubtful, ~chosen, chosen))

    return Formula(columns, at)


# singular vectors


def on_matrices(merge: Callable[[list[Array]], Array]) -> Callable[[Task], Formula]:
    """B + lambda merge(task vectors as matrices); the mean of the task vectors where they are none."""

    def method(task: Task) -> Formula:
        scale = task.parameters["lambda"]
        if scale == 0 or len(task.shape) != 2 or not task.numel:
            return weighted(task, [scale / task.count] * task.count)

        def at(lo: int, hi: int) -> Expected:
            deltas = [task.delta(i, lo, hi).astype(np.float64).reshape(task.shape) for i in range(task.count)]
            base, change = task.base(lo, hi), scale * merge(deltas).reshape(-1)
            largest = float(abs(change).max(initial=0.0))
            return decided(base + change, 8 * EPS * (abs(base) + abs(change)) + 1e-9 * largest)

        return Formula(task.numel, at)

    return method


def _directions(matrix: Array) -> Array:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[0] * max(matrix.shape) * np.finfo(np.float64).eps).sum())
    return u[:, :rank] @ vt[:rank]


def task_singular_vectors(deltas: list[Array]) -> Array:
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    right = np.concatenate([vt[:rank] for _, _, vt in parts], 0)
    values = np.concatenate([s[:rank] for _, s, _ in parts])
    return _directions(left) @ np.diag(values) @ _directions(right)


def isotropic(deltas: list[Array]) -> Array:
    total = sum(deltas)
    return float(np.linalg.svd(total, compute_uv=False).mean()) * _directions(np.asarray(total))
