"""Standard errors and tests against published numbers, the harness, and simulation."""

import math

import numpy as np
import pytest

from steep.eval.stats import (
    mcnemar,
    mean_stderr,
    paired_bootstrap,
    pooled_stderr,
    ratio_stderr,
    wilson_interval,
)


def test_mean_stderr() -> None:
    assert mean_stderr([1] * 37 + [0] * 63) == pytest.approx(0.04852365870939103, rel=1e-12)  # lm-eval 0.4.13
    assert math.isnan(mean_stderr([1.0]))


def test_pooled_stderr() -> None:
    assert pooled_stderr([0.04, 0.03, 0.02], [135, 265, 272]) == pytest.approx(0.01643231565957142, rel=1e-12)
    metrics = pytest.importorskip("lm_eval.api.metrics")
    assert pooled_stderr([0.1, 0.2], [7, 30]) == pytest.approx(float(metrics.pooled_sample_stderr([0.1, 0.2], [7, 30])))
    assert math.isnan(pooled_stderr([math.nan, math.nan], [1, 1]))
    with pytest.raises(ValueError, match="2 standard errors for 1 sizes"):
        pooled_stderr([0.1, 0.2], [7])


def test_wilson_interval() -> None:
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1


def test_ratio_stderr_is_the_spread_over_corpora() -> None:
    generator = np.random.default_rng(0)

    def corpus() -> tuple[np.ndarray, np.ndarray]:
        size = generator.integers(50, 2000, 400).astype(float)
        return size * generator.normal(0.7, 0.1, 400), size

    corpora = [corpus() for _ in range(400)]
    spread = np.std([y.sum() / x.sum() for y, x in corpora])
    claimed = np.mean([ratio_stderr(y, x) for y, x in corpora])
    assert claimed == pytest.approx(spread, rel=0.1)


def test_ratio_of_constant_weights_is_a_mean() -> None:
    values = np.array([1.0, 4.0, 2.0, 7.0])
    assert ratio_stderr(values, np.ones(4)) == pytest.approx(mean_stderr(values))


def test_mcnemar() -> None:
    before = [True] * 8 + [False] * 12
    after = [True] * 7 + [False] + [True] * 9 + [False] * 3  # 9 gained, 1 lost
    result = mcnemar(before, after)
    assert (result["gained"], result["lost"], result["delta"]) == (9, 1, 8 / 20)
    assert result["p_value"] == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar([True, False], [True, False])["p_value"] == 1
    many = mcnemar([True] * 5000 + [False] * 5000, [False] * 10000)  # 2^-5000 is below the smallest float
    assert many["p_value"] == 0
    with pytest.raises(ValueError, match="same items"):
        mcnemar([True], [True, False])


def test_paired_bootstrap_of_means() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.normal(0, 1, 300), generator.normal(0.1, 1, 300)
    result = paired_bootstrap(before, after, resamples=4000)
    assert result == paired_bootstrap(before, after, resamples=4000)
    difference = after - before
    assert result["delta"] == pytest.approx(difference.mean())
    half = 1.96 * mean_stderr(difference)
    assert (result["low"], result["high"]) == pytest.approx(
        (difference.mean() - half, difference.mean() + half), abs=0.1 * half
    )


def test_paired_bootstrap_of_corpus_ratios() -> None:
    generator = np.random.default_rng(2)
    size = generator.integers(100, 1000, 200).astype(float)
    before = -size * generator.normal(0.8, 0.1, 200)
    result = paired_bootstrap(before, before + 0.05 * size, size)
    assert result["delta"] == pytest.approx(0.05)
    assert result["low"] == pytest.approx(0.05)
    assert result["p_value"] == 2 / 10_000
    with pytest.raises(ValueError, match="0 paired items"):
        paired_bootstrap([], [])
