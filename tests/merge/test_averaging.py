"""Weights for averaging checkpoints of one run, against the recursions and schedules that they stand for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.merge import average_config, ema_weights, linear, merge, selected_weights, uniform_weights, wsm_weights
from tests.merge.models import random_tensors, read_model, sibling, write_model


@given(count=st.integers(1, 30), beta=st.floats(0, 1), last=st.integers(1, 30))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_all_weights_sum_to_one_and_none_is_negative(count: int, beta: float, last: int) -> None:
    found = [ema_weights(count, beta), uniform_weights(count), uniform_weights(count, min(last, count))]
    found += [wsm_weights(count, decay) for decay in ("linear", "cosine", "inverse_sqrt")]
    found.append(selected_weights([float(i % 7) for i in range(count)], min(last, count)))
    for weights in found:
        assert len(weights) == count
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
        assert min(weights) >= 0


def test_uniform_is_the_mean_of_the_last() -> None:
    assert uniform_weights(4) == [0.25] * 4
    assert uniform_weights(5, 2) == [0, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.99, 1.0])
def test_ema_is_the_moving_average(beta: float) -> None:
    checkpoints = torch.randn(7, 100, dtype=torch.float64)
    average = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        average = beta * average + (1 - beta) * checkpoint
    weights = ema_weights(7, beta)
    torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64) @ checkpoints, average)
    merged = linear([*checkpoints.float()], weights, normalize=False)
    torch.testing.assert_close(merged, average.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", ["linear", "cosine", "inverse_sqrt"])
def test_wsm_applies_every_update_with_the_factor_of_a_decayed_learning_rate(decay: str) -> None:
    """theta_j = theta_(j-1) + u_j at a constant rate; decayed, u_j would have counted d_j times."""
    updates = torch.randn(6, 50, dtype=torch.float64)
    checkpoints = updates.cumsum(0)  # theta_0 = u_0, which no decay touches
    shape = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}
    shape["inverse_sqrt"] = lambda x: 1 - math.sqrt(x)
    factors = torch.tensor([shape[decay](j / 6) for j in range(6)], dtype=torch.float64)
    weights = torch.tensor(wsm_weights(6, decay), dtype=torch.float64)
    torch.testing.assert_close(weights @ checkpoints, factors @ updates)
    if decay == "linear":
        torch.testing.assert_close(weights, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_selected_are_the_best() -> None:
    assert selected_weights([0.1, 0.9, 0.5, 0.9], 2) == [0, 0.5, 0, 0.5]
    assert selected_weights([0.1, 0.9, 0.5, 0.1], 1, higher_is_better=False) == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="scores: must be finite"):
        selected_weights([1.0, math.nan], 1)


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="last: must be from 1 to 3, found 4"):
        uniform_weights(3, 4)
    with pytest.raises(ValueError, match="beta: must be from 0 to 1, found 1.5"):
        ema_weights(3, 1.5)
    with pytest.raises(ValueError, match="decay: 'exp'; allowed: linear, cosine, inverse_sqrt"):
        wsm_weights(3, "exp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights: 1 for 2 checkpoints"):
        average_config(["a", "b"], [1.0])


def test_the_average_of_checkpoints_is_merged_from_its_configuration(tmp_path: Path) -> None:
    base = random_tensors(0, layers=1)
    models = [sibling(base, seed) for seed in range(3)]
    folders = [write_model(tmp_path / str(i), x, num_hidden_layers=1) for i, x in enumerate(models)]
    merge(average_config(folders, uniform_weights(3, 2), dtype="float32"), tmp_path / "out")
    for name, found in read_model(tmp_path / "out").items():
        expected = (models[1][name].double() + models[2][name].double()) / 2
        torch.testing.assert_close(found, expected.float())
