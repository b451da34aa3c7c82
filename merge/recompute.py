"""The merge methods once more, in numpy and float64, as `steep merge verify` recomputes them.

Written from the formulas for the eye that checks, not for speed, and sharing no arithmetic with what it checks
(methods.py and its like, kernels/philox.py): whole tensors are sorted, angles are taken from float64 dot products,
Philox is spelt out. What is shared is how inputs are read: adapters and arranged vocabularies are not checked here.

Task vectors are M - B in float32, which is how they are defined, so that an order by magnitude is the same here. All
else is float64. Each formula also says how far float32 arithmetic may lead away from it, and where a sign or a selection
hangs on rounding, what the result is the other way round. Touches no files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Load = Callable[[int, int, int], Array]  # (vector, lo, hi): its elements as float32; a base is vector 0

EPS = 2.0**-24  # half an ulp of 1 in float32
DOT = 1e-6  # error of a cosine from float32 products added up in a tree
BLOCK = 1 << 20
STRAIGHT, SMALL = 0.9995, 1e-8


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


def formula(method: str, task: Task) -> Formula:
    """What a method makes of a tensor. Reads it as a whole where the method depends on that.

    Raises:
        KeyError: a method that has no formula here.
    """
    return FORMULAS[method](task)


def _sum(task: Task, coefficients: Sequence[float], errors: Sequence[float] | float = 0.0) -> Formula:
    """B + sum_i c_i x_i of task vectors, or of the models without a base; `errors` are those of the c_i."""
    errors = [errors] * len(coefficients) if isinstance(errors, float) else errors

    def at(lo: int, hi: int) -> Expected:
        values, size = task.base(lo, hi), np.abs(task.base(lo, hi))
        slack = np.zeros(hi - lo)
        for i, (c, error) in enumerate(zip(coefficients, errors, strict=True)):
            x = task.vector(i, lo, hi).astype(np.float64)
            values, size, slack = values + c * x, size + abs(c * x), slack + error * abs(x)
        return _decided(values, slack + 2 * (len(coefficients) + 4) * EPS * size)

    return Formula(1, at)


def _decided(values: Array, slack: Array) -> Expected:
    return Expected(values, slack, values)


def _linear(task: Task) -> Formula:
    weights = task.parameters["weight"]
    return _sum(task, np.divide(weights, sum(weights) if task.parameters["normalize"] else 1).tolist())


def _passthrough(task: Task) -> Formula:
    return _sum(task, task.parameters["scale"])


def _task_arithmetic(task: Task) -> Formula:
    return _sum(task, _coefficients(task))


def _coefficients(task: Task) -> list[float]:
    weights = task.parameters["weight"]
    divides = task.parameters["normalize"] and abs(sum(weights)) >= 1e-8
    return [task.parameters["lambda"] * w / (sum(weights) if divides else 1) for w in weights]


def _chat_vector(task: Task) -> Formula:
    def at(lo: int, hi: int) -> Expected:
        cpt = task.model(0, lo, hi).astype(np.float64)
        part = task.parameters["scale"] * task.delta(1, lo, hi).astype(np.float64)
        return _decided(cpt + part, 8 * EPS * (abs(cpt) + abs(part)) * (task.parameters["scale"] != 0))

    return Formula(1, at)


def _nearswap(task: Task) -> Formula:
    t = task.parameters["t"]

    def at(lo: int, hi: int) -> Expected:
        base, other = task.base(lo, hi), task.model(0, lo, hi).astype(np.float64)
        if t <= 0:
            return _decided(base, np.zeros(hi - lo))
        distance = np.maximum(abs(task.delta(0, lo, hi).astype(np.float64)), 1e-6)
        weight = np.minimum(1, t / distance)
        return _decided(weight * other + (1 - weight) * base, 16 * EPS * (abs(base) + abs(other)))

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
    return _sum(both, *_arc_with_errors(cosine, task.parameters["t"], lambda c: abs(c) > STRAIGHT))


def _nuslerp(task: Task) -> Formula:
    weights = task.parameters["weight"]
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    if task.parameters["nuslerp_flatten"]:
        gram = _gram(task, task.vector, 2)
        norms = np.sqrt(np.diag(gram))
        cosine = float(gram[0, 1] / norms.prod()) if norms.all() else 0.0
        return _sum(task, *_arc_with_errors(cosine, t, _collinear))
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
        return _decided(base + merged.reshape(-1), slack.reshape(-1) + 16 * EPS * (size.reshape(-1) + abs(base)))

    return Formula(task.numel if first else task.columns, at)


def _multislerp(task: Task) -> Formula:
    weights, eps = task.parameters["weight"], task.parameters["eps"]
    if len(weights) == 1:
        return _sum(task, [1.0])
    gram = _gram(task, task.vector, task.count)
    shares = np.divide(weights, sum(weights) if task.parameters["normalize_weights"] else 1)
    norms = np.sqrt(np.diag(gram))
    if not norms.any():
        return _sum(task, shares.tolist())
    units = shares / (norms + eps)
    length = math.sqrt(max(0.0, float(units @ gram @ units)))
    if length < eps:
        return _sum(task, shares.tolist())
    coefficients = float(shares @ norms) / length * units
    off = DOT * float(abs(shares).sum() / length) ** 2
    return _sum(task, coefficients.tolist(), (off * abs(coefficients)).tolist())


def _karcher(task: Task) -> Formula:
    """The mean direction from the dot products of the models' directions."""
    count, tol = task.count, task.parameters["tol"]
    gram = _gram(task, task.model, count)
    norms = np.sqrt(np.diag(gram))
    valid = np.flatnonzero(norms > tol)
    if count == 1 or not len(valid):
        return _sum(task, [1 / count] * count)
    cosines = (gram / np.outer(norms, norms).clip(min=np.finfo(float).tiny))[np.ix_(valid, valid)]

    def unit(coefficients: Array) -> Array | None:
        length = math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))
        return None if length < tol else coefficients / length

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
    coefficients = np.zeros(count)
    coefficients[valid] = norms.mean() * mean / norms[valid]
    return _sum(task, coefficients.tolist(), ((4 * tol + 4 * DOT) * abs(coefficients)).tolist())


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
        return _sum(task, [float(t)] * count, [float(error)] * count)

    def at(lo: int, hi: int) -> Expected:
        deltas = [task.delta(i, lo, hi).astype(np.float64).reshape(-1, columns) for i in range(count)]
        t, error = with_error(mean_cosine(lambda i, j: (deltas[i] * deltas[j]).sum(-1)))
        total, size = sum(deltas), sum(abs(delta) for delta in deltas)
        base = task.base(lo, hi)
        slack = (error[:, None] * size + 16 * EPS * abs(t)[:, None] * size).reshape(-1) + 16 * EPS * abs(base)
        return _decided(base + (t[:, None] * total).reshape(-1), slack)

    return Formula(columns, at)


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


def _sum_of_thinned(rule: str) -> Callable[[Task], Formula]:
    def method(task: Task) -> Formula:
        thinned, coefficients = _thinned(task, rule), _coefficients(task)

        def at(lo: int, hi: int) -> Expected:
            base, taus = task.base(lo, hi), thinned(lo, hi)
            parts = [c * tau for c, tau in zip(coefficients, taus, strict=True)]
            return _decided(base + sum(parts), 64 * EPS * (abs(base) + sum(abs(part) for part in parts)))

        return Formula(1, at)

    return method


def _elected(rule: str) -> Callable[[Task], Formula]:
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
    total, cast = sum(votes), sum(abs(vote) for vote in votes)
    plus = total >= 0
    found = []
    for positive in (plus, ~plus):
        agree = [np.where(positive, vote > 0, vote < 0) for vote in votes]
        merged = sum(part * m for part, m in zip(parts, agree))
        size = sum(abs(part) * m for part, m in zip(parts, agree))
        divisor = sum(w * m for w, m in zip(weights, agree)) if normalize else np.ones_like(base)
        divisor = np.where(divisor == 0, 1.0, divisor)
        doubtful = abs(divisor) < 1e-6 * sum(map(abs, weights))  # weights that cancel but for rounding
        slack = 64 * EPS * (abs(base) + abs(scale / divisor) * size)
        found.append((base + scale * merged / divisor, np.where(doubtful, np.inf, slack)))
    (values, slack), (other, other_slack) = found
    undecided = (abs(total) <= 16 * EPS * cast) & (cast > 0) & (scale != 0)
    return Expected(values, np.where(undecided, np.maximum(slack, other_slack), slack), np.where(undecided, other, values))


# task vectors that are selected


def _sce(task: Task) -> Formula:
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


def _ram(task: Task, plus: bool = False) -> Formula:
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
        return _decided(base + sum(parts) / divisor, 16 * EPS * size)

    return Formula(1, at)


def _consensus_ta(task: Task) -> Formula:
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


def _arcee_fusion(task: Task) -> Formula:
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


def _matrix(merge: Callable[[list[Array]], Array]) -> Callable[[Task], Formula]:
    """B + lambda merge(task vectors as matrices); the mean of the task vectors where they are none."""

    def method(task: Task) -> Formula:
        scale = task.parameters["lambda"]
        if scale == 0 or len(task.shape) != 2 or not task.numel:
            return _sum(task, [scale / task.count] * task.count)

        def at(lo: int, hi: int) -> Expected:
            deltas = [task.delta(i, lo, hi).astype(np.float64).reshape(task.shape) for i in range(task.count)]
            base, change = task.base(lo, hi), scale * merge(deltas).reshape(-1)
            largest = float(abs(change).max(initial=0.0))
            return _decided(base + change, 8 * EPS * (abs(base) + abs(change)) + 1e-9 * largest)

        return Formula(task.numel, at)

    return method


def _directions(matrix: Array) -> Array:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[0] * max(matrix.shape) * np.finfo(np.float64).eps).sum())
    return u[:, :rank] @ vt[:rank]


def _task_singular_vectors(deltas: list[Array]) -> Array:
    rank = max(1, min(deltas[0].shape) // len(deltas))
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    right = np.concatenate([vt[:rank] for _, _, vt in parts], 0)
    values = np.concatenate([s[:rank] for _, s, _ in parts])
    return _directions(left) @ np.diag(values) @ _directions(right)


def _isotropic(deltas: list[Array]) -> Array:
    total = sum(deltas)
    return float(np.linalg.svd(total, compute_uv=False).mean()) * _directions(np.asarray(total))


FORMULAS: dict[str, Callable[[Task], Formula]] = {
    "linear": _linear,
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
    "task_arithmetic": _task_arithmetic,
    "ties": _elected("trim"),
    "dare_linear": _sum_of_thinned("dare"),
    "dare_ties": _elected("dare"),
    "breadcrumbs": _sum_of_thinned("outliers"),
    "breadcrumbs_ties": _elected("outliers"),
    "della": _elected("della"),
    "della_linear": _sum_of_thinned("della"),
    "sce": _sce,
    "ram": _ram,
    "ramplus_tl": lambda task: _ram(task, plus=True),
    "nearswap": _nearswap,
    "arcee_fusion": _arcee_fusion,
    "passthrough": _passthrough,
    "chat_vector": _chat_vector,
    "consensus_ta": _consensus_ta,
    "tsv_m": _matrix(_task_singular_vectors),
    "iso_c": _matrix(_isotropic),
}
