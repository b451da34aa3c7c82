"""Uncertainty of scores: standard errors, intervals and paired tests. Knows numbers only, numpy is all it touches.

Closed forms wherever one exists. Items of an evaluation are treated as a sample from a population of such items;
nothing here speaks of the noise between two training runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


def mean_stderr(values: ArrayLike) -> float:
    """Standard error of a mean, s / sqrt(n) with the n-1 sample deviation; nan for fewer than two values."""
    values = np.asarray(values, dtype=np.float64)
    if values.size < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(values.size))


def normal_interval(value: float, stderr: float, z: float = Z95) -> tuple[float, float]:
    """value +- z * stderr."""
    return value - z * stderr, value + z * stderr


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): sound for small n and for proportions near 0 and 1."""
    if n == 0:
        return math.nan, math.nan
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def pooled_stderr(stderrs: Sequence[float], sizes: Sequence[int]) -> float:
    """Standard error of the size-weighted mean over k sub-tasks, as lm-evaluation-harness pools them.

    sqrt( sum((n_i - 1) n_i se_i^2) / (N - k) / N ), N = sum n_i: the within-task variance only.
    """
    if len(stderrs) != len(sizes):
        raise ValueError(f"{len(stderrs)} standard errors for {len(sizes)} sizes")
    total = sum(sizes)
    if total <= len(sizes):
        return math.nan
    variance = sum((n - 1) * n * se * se for se, n in zip(stderrs, sizes) if n > 1) / (total - len(sizes))
    return math.sqrt(variance / total)


def ratio_stderr(numerators: ArrayLike, denominators: ArrayLike) -> float:
    """Standard error of sum(y) / sum(x) over n independent pairs by the delta method; nan for fewer than two.

    With r = sum(y)/sum(x) and residuals e_i = y_i - r x_i: se = sqrt(n/(n-1) sum(e_i^2)) / sum(x) (Cochran, Sampling
    Techniques, 6.3). Used for corpus ratios (log-likelihood per byte), where the document is what was sampled.
    """
    y, x = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    n = y.size
    if n < 2 or x.sum() == 0:
        return math.nan
    residual = y - y.sum() / x.sum() * x
    return float(math.sqrt(n / (n - 1) * float(residual @ residual)) / x.sum())


def paired_bootstrap(
    before: ArrayLike, after: ArrayLike, weights: ArrayLike | None = None, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Difference after - before on the same items, with a percentile bootstrap over the items.

    The statistic is sum(after - before) / sum(weights); weights None means the plain mean (accuracies), weights = bytes
    and values = log-likelihoods gives a difference of corpus ratios.

    Returns: delta, low, high (95 %), p_value: two-sided, 2 min(P(delta* <= 0), P(delta* >= 0)), at least 2/resamples.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    weight = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=np.float64)
    n = difference.size
    if n == 0 or weight.size != n:
        raise ValueError(f"{n} paired items with {weight.size} weights; at least one item and one weight each")
    generator = np.random.Generator(np.random.Philox(seed))
    deltas = np.empty(resamples)
    chunk = max(1, 2_000_000 // n)  # bounds the drawn indices to 16 MB
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, n, size=(min(chunk, resamples - start), n))
        deltas[start : start + len(drawn)] = difference[drawn].sum(axis=1) / weight[drawn].sum(axis=1)
    low, high = np.quantile(deltas, [0.025, 0.975])
    tail = min(float((deltas <= 0).mean()), float((deltas >= 0).mean()))
    return {
        "delta": float(difference.sum() / weight.sum()),
        "low": float(low),
        "high": float(high),
        "p_value": min(1.0, max(2 * tail, 2 / resamples)),
    }


def mcnemar(before: ArrayLike, after: ArrayLike) -> dict[str, float]:
    """Exact McNemar test of two sets of right/wrong answers to the same items.

    Returns: gained (wrong -> right), lost (right -> wrong), delta = (gained - lost) / n, and the two-sided exact
    binomial p_value that gained and lost are equally likely.
    """
    a, b = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired answers of shapes {a.shape} and {b.shape}; the same items are needed, at least one")
    gained, lost = int((~a & b).sum()), int((a & ~b).sum())
    discordant = gained + lost
    coefficient, cumulated = 1, 0  # exact integers: binomial coefficients of thousands of items overflow a float
    for k in range(min(gained, lost) + 1):
        cumulated += coefficient
        coefficient = coefficient * (discordant - k) // (k + 1)
    p_value = min(1.0, 2 * cumulated / 2**discordant)
    return {"gained": gained, "lost": lost, "delta": (gained - lost) / a.size, "p_value": p_value}
