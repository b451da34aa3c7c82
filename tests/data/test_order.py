"""Order: bijections, mixtures within one draw of their share, and samples that depend on nothing but their number."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data import Mixture, Order, Permutation, Phase
from steep.data.order import MAX_PERIOD, integer_weights


@settings(max_examples=150, deadline=None, derandomize=True)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    images = Permutation(n, seed)(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))


def test_permutation_of_one_number_and_of_many_agree() -> None:
    permutation = Permutation(1000, 7)
    assert [permutation(i) for i in range(1000)] == permutation(np.arange(1000)).tolist()
    assert isinstance(permutation(3), int)
    with pytest.raises(IndexError):
        permutation(1000)
    with pytest.raises(IndexError):
        permutation(np.array([3, -1]))


def test_permutation_shuffles() -> None:
    n = 10_000
    images = Permutation(n, 0)(np.arange(n))
    other = Permutation(n, 1)(np.arange(n))
    assert (images == other).sum() < 20  # one expected
    assert (images == np.arange(n)).sum() < 20
    # Neighbours are as far apart as random numbers are: n/3 on average.
    assert abs(np.abs(np.diff(images)).mean() / (n / 3) - 1) < 0.05
    # The first tenth is spread over all of it.
    tenths = np.bincount(images[: n // 10] // (n // 10), minlength=10)
    assert tenths.min() > 60
    assert tenths.max() < 140


def permutation_in_plain_integers(n: int, seed: int, i: int) -> int:
    """The definition again, without numpy: the order of a run may never change between versions or machines."""
    modulus = 1 << 64

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % modulus
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % modulus
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % modulus
        return x ^ (x >> 31)

    half = max(1, ((n - 1).bit_length() + 1) // 2)
    start = int.from_bytes(hashlib.sha256(f"steep permutation {seed}".encode()).digest()[:8], "little")
    keys = [splitmix((start + round) % modulus) for round in range(6)]
    while True:
        left, right = i >> half, i % (1 << half)
        for key in keys:
            left, right = right, left ^ (splitmix(right ^ key) % (1 << half))
        i = (left << half) | right
        if i < n:
            return i


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 10**12])
def test_permutation_never_changes(n: int) -> None:
    for seed in (0, 1, 2**63):
        permutation = Permutation(n, seed)
        for i in {0, n // 3, n // 2, n - 1}:
            assert permutation(i) == permutation_in_plain_integers(n, seed, i)


WEIGHTS = st.lists(st.integers(0, 60), min_size=1, max_size=7).filter(any)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(weights=WEIGHTS)
def test_mixture_is_within_one_draw_at_every_prefix(weights: list[int]) -> None:
    mixture = Mixture(weights)
    total = sum(weights)
    drawn = [0] * len(weights)
    for n in range(2 * total + 3):
        assert mixture.counts(n).tolist() == drawn
        # |count - n w / W| < 1, in integers
        assert all(abs(count * total - n * weight) < total for count, weight in zip(drawn, weights))
        drawn[mixture.source(n)] += 1


def test_integer_weights() -> None:
    assert integer_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert integer_weights([3, 0, 6]) == [1, 0, 2]
    assert integer_weights([1.0]) == [1]
    assert integer_weights([1e-3, 1]) == [1, 1000]
    thirds = integer_weights([1 / 3, 1 / 3, 1 / 3])
    assert thirds == [1, 1, 1]
    large = integer_weights([5_123_456_789, 234_567, 1, 0])
    assert large[2:] == [1, 0]
    assert abs(large[0] / sum(large) - 5_123_456_789 / 5_123_691_357) < 2 / MAX_PERIOD
    for bad in ([], [0, 0], [1, -1], [float("nan")], [float("inf"), 1]):
        with pytest.raises(ValueError, match="weights must be"):
            integer_weights(bad)


def make_order(phases: list[Phase], seed: int = 0, max_epochs: list[float | None] | None = None) -> Order:
    return Order(["a", "b", "c"], [50, 7, 20], phases, seed, max_epochs)


def test_every_epoch_of_every_source_is_whole_and_shuffled_anew() -> None:
    order = make_order([Phase(0, (0.5, 0.3, 0.2))])
    seen: dict[tuple[int, int], list[int]] = {}
    for p in range(500):
        source, epoch, sequence = order(p)
        seen.setdefault((source, epoch), []).append(sequence)
    last = {source: max(epoch for s, epoch in seen if s == source) for source in range(3)}
    for (source, epoch), sequences in seen.items():
        assert len(set(sequences)) == len(sequences)
        if epoch < last[source]:
            assert sorted(sequences) == list(range(order.num_seqs[source]))
    assert seen[(0, 0)] != seen[(0, 1)]
    assert [order.draws(p).tolist() for p in (0, 10, 500)] == [[0, 0, 0], [5, 3, 2], [250, 150, 100]]
    assert order.epochs(500) == {"a": 5.0, "b": 150 / 7, "c": 5.0}


def test_a_phase_goes_on_where_each_source_was() -> None:
    before = make_order([Phase(0, (0.5, 0.5, 0.0))])
    after = make_order([Phase(0, (0.5, 0.5, 0.0)), Phase(33, (0.1, 0.2, 0.7)), Phase(60, (1, 0, 0))])
    assert [after(p) for p in range(33)] == [before(p) for p in range(33)]
    # Each source's own draws run on without a gap: compare with its draws when it is alone.
    for source in range(3):
        alone = make_order([Phase(0, tuple(float(s == source) for s in range(3)))])
        own = [after(p) for p in range(100) if after(p)[0] == source]
        assert own == [alone(i) for i in range(len(own))]
    assert after.draws(33).tolist() == [17, 16, 0]
    assert after.draws(100).sum() == 100


def test_seed_and_name_decide() -> None:
    phases = [Phase(0, (1.0, 0.0, 0.0))]
    first = [make_order(phases)(p) for p in range(50)]
    assert [make_order(phases)(p) for p in range(50)] == first
    assert [make_order(phases, seed=1)(p) for p in range(50)] != first
    renamed = Order(["x", "b", "c"], [50, 7, 20], phases, 0)
    assert [renamed(p) for p in range(50)] != first


def test_max_epochs() -> None:
    order = make_order([Phase(0, (0.5, 0.5, 0.0))], max_epochs=[None, 2, 1])
    order.check(28)
    for p in range(28):
        order(p)
    with pytest.raises(ValueError, match=r"source 'b': 40 samples .* 2\.857 times, but max_epochs is 2"):
        order.check(40)
    with pytest.raises(ValueError, match="source 'b': sample .* more often than max_epochs = 2"):
        [order(p) for p in range(40)]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="must differ"):
        Order(["a", "a"], [1, 1], [Phase(0, (1, 1))], 0)
    for starts in ([5], [0, 5, 5], [0, 9, 3], []):
        with pytest.raises(ValueError, match="phases must start at 0"):
            make_order([Phase(start, (1, 1, 1)) for start in starts])
    with pytest.raises(ValueError, match="2 weights for 3 sources"):
        make_order([Phase(0, (1, 1))])
    with pytest.raises(ValueError, match="source 'b': has a weight of 1 but no sequence"):
        Order(["a", "b"], [5, 0], [Phase(0, (1, 1))], 0)
    with pytest.raises(ValueError, match="negative"):
        make_order([Phase(0, (1, 1, 1))])(-1)
