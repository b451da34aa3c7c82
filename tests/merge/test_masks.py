"""Random masks of DARE and DELLA: which elements, how many, and on what they depend."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.kernels.philox import philox_bits
from steep.merge import Noise, dare, della, merge
from steep.merge.noise import WORDS, threshold
from steep.merge.sparsify import della_problem
from tests.merge.models import bits, random_tensors, read_model, sibling, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "model.layers.0.mlp.up_proj.weight"


def within(found: float, trials: int, probability: float, deviations: float = 4.5) -> bool:
    """Whether a count is what a binomial distribution gives: a false alarm in 150,000 draws."""
    return abs(found - trials * probability) <= deviations * math.sqrt(trials * probability * (1 - probability)) + 1


def test_bits_are_philox_of_a_hash_of_seed_tensor_and_model() -> None:
    """Pinned: another key would change every merge that was ever made."""
    noise = Noise.of(7, NAME, "models/a")
    assert (noise.key, noise.stream) == (0xD77E76B1C9932C3B, 0xF5F26E7E73A7E8FC)
    mask = noise.below(100, threshold(0.25), 50)
    assert torch.equal(mask, (philox_bits(noise.key, noise.stream, 100, 50) < WORDS // 4).float())
    assert torch.equal(noise.below(0, threshold(0.25), 150)[100:], mask)
    each = torch.tensor([0, WORDS] * 25)
    assert torch.equal(noise.below(100, each, 50), torch.tensor([0.0, 1.0] * 25))


def test_other_seeds_tensors_and_models_have_other_bits() -> None:
    keys = {
        (noise.key, noise.stream)
        for seed in (0, 1, 2**40)
        for name in (NAME, NAME + "s", "")
        for model in ("a", "b", "a/b")
        for noise in [Noise.of(seed, name, model)]
    }
    assert len(keys) == 27
    count = 100_000
    one, other = (Noise.of(0, NAME, model).below(0, threshold(0.3), count) for model in ("a", "b"))
    assert within(float((one * other).sum()), count, 0.09)


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_dare_keeps_a_share_of_density(density: float, seed: int) -> None:
    count = 200_000
    delta = torch.rand(count) + 0.5
    kept = dare(delta, density, Noise.of(seed, NAME, "a"), "none")
    mask = kept != 0
    assert torch.equal(kept[mask], delta[mask])
    assert within(int(mask.sum()), count, density)
    pairs = mask[:-1] & mask[1:]  # neighbours, also those that share an evaluation of Philox, are independent
    assert within(int(pairs[::2].sum()), len(pairs[::2]), density**2)
    for start in range(8):
        assert within(int(mask[start::8].sum()), len(mask[start::8]), density)


def test_dare_rescales() -> None:
    delta = torch.randn(50_000)
    noise = Noise.of(3, NAME, "a")
    kept = dare(delta, 0.4, noise, "none")
    torch.testing.assert_close(dare(delta, 0.4, noise), kept / 0.4)
    by_norm = dare(delta, 0.4, noise, "l1")
    assert float(by_norm.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=1e-6)
    torch.testing.assert_close(by_norm, kept * (delta.double().abs().sum() / kept.double().abs().sum()).float())
    for rescale in ("none", "l1", "inv_density"):
        assert bits(dare(delta, 1.0, noise, rescale)) == bits(delta)
        assert not dare(delta, 0.0, noise, rescale).any()


def test_dare_keeps_the_expectation() -> None:
    delta = torch.randn(500)
    total = torch.zeros(500, dtype=torch.float64)
    for seed in range(2000):
        total += dare(delta, 0.5, Noise.of(seed, NAME, "a")).double()
    deviation = delta.double().abs() / math.sqrt(2000)  # of the mean: |delta| sqrt((1 - p) / (p draws))
    assert ((total / 2000 - delta).abs() <= 4.5 * deviation).all()


def test_della_keeps_by_rank_within_the_row() -> None:
    rows, columns, density, epsilon = 4000, 40, 0.4, 0.3
    delta = torch.randn(rows, columns)
    kept = della(delta, density, epsilon, Noise.of(0, NAME, "a"), "none")
    ranks = delta.abs().argsort(1).argsort(1)  # 0 the smallest
    for rank in range(columns):
        found = int((kept[ranks == rank] != 0).sum())
        assert within(found, rows, (density - epsilon) + 2 * epsilon * rank / (columns - 1)), rank
    assert torch.equal(kept[kept != 0], delta[kept != 0])


def test_della_ranks_the_lower_index_higher_among_equals() -> None:
    delta = torch.ones(3000, 2)
    kept = della(delta, 0.5, 0.4, Noise.of(0, NAME, "a"), "none")
    assert within(int(kept[:, 0].sum()), 3000, 0.9)
    assert within(int(kept[:, 1].sum()), 3000, 0.1)


def test_della_divides_by_an_elements_own_probability() -> None:
    delta = torch.tensor([[3.0, -1.0, 2.0]]).repeat(2000, 1)
    noise = Noise.of(0, NAME, "a")
    kept, divided = della(delta, 0.5, 0.2, noise, "none"), della(delta, 0.5, 0.2, noise)
    torch.testing.assert_close(divided, kept / torch.tensor([0.7, 0.3, 0.5]))
    torch.testing.assert_close(della(delta, 0.5, 0.2, noise, "inv_density"), kept * 2)
    by_norm = della(delta, 0.5, 0.2, noise, "l1")
    assert float(by_norm.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)


def test_della_of_rows_of_one_and_of_vectors() -> None:
    noise = Noise.of(0, NAME, "a")
    assert within(int((della(torch.ones(5000, 1), 0.3, 0.2, noise, "none") != 0).sum()), 5000, 0.3)
    vector = torch.randn(5000)
    assert torch.equal(della(vector, 0.5, 0.2, noise), della(vector.view(1, -1), 0.5, 0.2, noise).view(-1))
    assert bits(della(vector, 1.0, 0.2, noise)) == bits(vector)
    assert not della(vector, 0.0, 0.2, noise).any()


@pytest.mark.parametrize(
    ("density", "epsilon", "fine"),
    [
        (0.5, 0.15, True),
        (0.1, 0.15, False),
        (0.9, 0.15, False),
        (1.0, 0.15, True),
        (0.0, 0.15, True),
        (0.5, 0.5, False),
    ],
)
def test_della_probabilities_lie_between_zero_and_one(density: float, epsilon: float, fine: bool) -> None:
    assert (della_problem(density, epsilon) is None) == fine


def test_masks_of_a_merge_depend_on_seed_and_names_alone(tmp_path: Path) -> None:
    """Not on where the folders lie, the order of the models, further models, pieces or workers."""
    base = random_tensors(0, layers=1)
    for place in ("here", "there"):
        for number, name in enumerate(("base", "a", "b")):
            tensors = sibling(base, number) if number else base
            write_model(tmp_path / place / name, tensors, num_hidden_layers=1)

    runs = iter(range(100))

    def merged(names: str, place: str = "here", method: str = "dare_linear", weights: Any = None, **keys: Any) -> Any:
        models = [
            {"model": name, "parameters": {"weight": (weights or {}).get(name, 1.0), "density": 0.5}} for name in names
        ]
        run = {key: keys.pop(key) for key in ("workers", "chunk_elements") if key in keys}
        config = {"merge_method": method, "base_model": "base", "models": models} | keys
        yaml_file = tmp_path / place / f"{next(runs)}.yml"
        yaml_file.write_text(json.dumps(config))
        merge(yaml_file, out := yaml_file.with_suffix(""), **run)
        return {name: bits(x) for name, x in read_model(out).items()}

    for method in ("dare_linear", "della_linear"):
        first = merged("ab", method=method, random_seed=5)
        assert merged("ab", "there", method, random_seed=5, workers=2, chunk_elements=4096) == first
        assert merged("ab", method=method, random_seed=6) != first
        assert merged("ab", method=method) != first
        only_b = merged("b", method=method)
        assert merged("ba", method=method, weights={"a": 0.0}) == only_b
        assert merged("ab", method=method, weights={"a": 0.0}) == only_b
