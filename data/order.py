"""Order: which sequence of which source is the p-th sample of a run, as a pure function of p. Touches no files.

A sample is one packed sequence. p counts samples over the whole run and all machines, so the state of the data is one
integer: any world size, any gradient accumulation and any restart see the same samples. Three parts:
- `Permutation`: a seeded bijection of 0..n-1 that needs no memory (Feistel network with cycle walking);
- `Mixture`: which source comes when, so that after any number of samples every source has its share to within one;
- `Order`: phases of mixtures, epochs of reshuffled sources.
"""

from __future__ import annotations

import hashlib
import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ROUNDS = 6
MAX_PERIOD = 1 << 16  # weights are rounded to multiples of 1/MAX_PERIOD if they do not already fit


class Permutation:
    """A bijection of 0..n-1, different for every seed: `permutation(i)`, for an integer or an array of them.

    A balanced Feistel network on the smallest even number of bits that holds n, with splitmix64 (Steele, Lea & Flood
    2014) as round function; images beyond n are mapped again until they are below it (Black & Rogaway 2002, "Ciphers
    with arbitrary finite domains"), fewer than four times on average.
    """

    def __init__(self, n: int, seed: int) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"a permutation needs 1 <= n < 2**62 elements, not {n}")
        self.n = n
        half = max(1, -(-(n - 1).bit_length() // 2))
        self._half = np.uint64(half)
        self._mask = np.uint64((1 << half) - 1)
        digest = hashlib.sha256(f"steep permutation {seed}".encode()).digest()
        with np.errstate(over="ignore"):
            self._keys = [_splitmix(np.frombuffer(digest[:8], "<u8") + np.uint64(round))[0] for round in range(ROUNDS)]

    def __call__(self, i: int | np.ndarray) -> int | np.ndarray:
        scalar = np.ndim(i) == 0
        values = np.atleast_1d(np.asarray(i, np.int64))
        if ((values < 0) | (values >= self.n)).any():
            raise IndexError(f"index outside 0..{self.n - 1}")
        result = self._encrypt(values.astype(np.uint64))
        while len(outside := np.flatnonzero(result >= self.n)):
            result[outside] = self._encrypt(result[outside])
        result = result.astype(np.int64)
        return int(result[0]) if scalar else result

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_splitmix(right ^ key) & self._mask)
        return (left << self._half) | right


def _splitmix(values: np.ndarray) -> np.ndarray:
    """splitmix64's output function on u64, modulo 2**64."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


class Mixture:
    """Which source is the n-th draw, and the how-manieth of that source: `source(n)`, `counts(n)`.

    Weights are integers with sum W (see `integer_weights`), and the pattern repeats after W draws. Within it the j-th
    draw of a source with weight w must come in slots [floor((j-1) W/w), ceil(j W/w)); serving the open window that
    closes first always succeeds (Baruah et al. 1996, "Proportionate progress", on one processor). So after any n draws
    every source has had floor(n w/W) or ceil(n w/W): never one whole draw from its share.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        if not weights or any(weight < 0 for weight in weights) or sum(weights) == 0:
            raise ValueError(f"weights must be non-negative integers with a positive sum, not {list(weights)}")
        self.weights = tuple(weights)
        self.period = sum(weights)
        self._pattern = np.array(_windows_in_turn(self.weights), np.int64)
        # counts after n draws of the pattern: i64 [period + 1, sources]
        one_hot = self._pattern[:, None] == np.arange(len(weights))
        self._counts = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(one_hot, axis=0)])

    def source(self, n: int) -> int:
        """The source of draw n (from 0)."""
        return int(self._pattern[n % self.period])

    def counts(self, n: int) -> np.ndarray:
        """i64 [sources]: draws of each source among the first n."""
        whole, part = divmod(n, self.period)
        return whole * self._counts[-1] + self._counts[part]


def _windows_in_turn(weights: Sequence[int]) -> list[int]:
    """One period of sources: earliest deadline first among open windows, ties to the source named first."""
    period = sum(weights)

    def window(source: int, nth: int) -> tuple[int, int]:
        weight = weights[source]
        return nth * period // weight, -(-(nth + 1) * period // weight)

    upcoming = [(0, source, 0) for source, weight in enumerate(weights) if weight]  # (opens, source, nth)
    opened: list[tuple[int, int, int]] = []  # (closes, source, nth)
    pattern = []
    for slot in range(period):
        while upcoming and upcoming[0][0] <= slot:
            _, source, nth = heapq.heappop(upcoming)
            heapq.heappush(opened, (window(source, nth)[1], source, nth))
        closes, source, nth = heapq.heappop(opened)
        assert slot < closes
        pattern.append(source)
        if nth + 1 < weights[source]:
            heapq.heappush(upcoming, (window(source, nth + 1)[0], source, nth + 1))
    return pattern


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of `weights`: exactly, if their sum stays within MAX_PERIOD, else rounded to that sum by
    largest remainder, where a positive weight gets at least 1.

    Raises:
        ValueError: a weight that is negative or not finite, or none that is positive.
    """
    if not weights or not all(np.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise ValueError(f"weights must be finite, not negative, and one of them positive: {list(weights)}")
    # The decimal that was written (0.1), not the binary fraction nearest to it.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = np.lcm.reduce([fraction.denominator for fraction in exact], dtype=object)
    scaled = [int(fraction * scale) for fraction in exact]
    divisor = np.gcd.reduce(scaled, dtype=object)
    reduced = [value // int(divisor) for value in scaled]
    total = sum(reduced)
    if total <= MAX_PERIOD:
        return reduced
    shares = [Fraction(value * MAX_PERIOD, total) for value in reduced]
    rounded = [max(1, int(share)) if share else 0 for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: rounded[source] - shares[source])
    missing = MAX_PERIOD - sum(rounded)
    for source in by_remainder[: max(0, missing)]:
        rounded[source] += 1
    return rounded


@dataclass(frozen=True)
class Phase:
    """From sample number `start` on, sources are mixed by `weights`, one per source (0: not used)."""

    start: int
    weights: tuple[float, ...]


class Order:
    """`order(p)` -> (source, epoch, sequence) of the p-th sample.

    A source's own draws are numbered through all phases; draw i is sequence permutation_e(i mod n) of epoch e = i // n,
    where every (seed, source name, epoch) has its own permutation. So a changed mixture is an appended phase: nothing
    before it moves, nothing is lost or repeated. Weights count sequences.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_seqs: Sequence[int],
        phases: Sequence[Phase],
        seed: int,
        max_epochs: Sequence[float | None] | None = None,
    ) -> None:
        """Args:
            names: of the sources, different from each other; part of the seed.
            num_seqs: sequences that each source has.
            phases: the first starts at 0, the others later and later.
            max_epochs: how often each source may be gone through (may be a fraction), None = without limit.

        Raises:
            ValueError: names given twice, phases that do not ascend from 0, weights that do not fit the sources,
                a source with a weight but without a sequence.
        """
        if len(set(names)) != len(names):
            raise ValueError(f"source names must differ: {list(names)}")
        starts = [phase.start for phase in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:])):
            raise ValueError(f"phases must start at 0 and then later and later, not at {starts}")
        for phase in phases:
            if len(phase.weights) != len(names):
                raise ValueError(f"phase at {phase.start}: {len(phase.weights)} weights for {len(names)} sources")
            for name, count, weight in zip(names, num_seqs, phase.weights):
                if weight > 0 and count == 0:
                    raise ValueError(f"source {name!r}: has a weight of {weight} but no sequence")
        self.names = list(names)
        self.num_seqs = list(num_seqs)
        self.phases = list(phases)
        self.seed = seed
        self.max_epochs = list(max_epochs) if max_epochs is not None else [None] * len(names)
        self.mixtures = [Mixture(integer_weights(phase.weights)) for phase in phases]
        self._starts = starts
        # Draws of every source before each phase.
        self._before = [np.zeros(len(names), np.int64)]
        for mixture, start, end in zip(self.mixtures, starts, starts[1:]):
            self._before.append(self._before[-1] + mixture.counts(end - start))
        self._permutations: dict[tuple[int, int], Permutation] = {}

    def __call__(self, p: int) -> tuple[int, int, int]:
        """(source number, epoch from 0, sequence of the source) of sample p.

        Raises:
            ValueError: the source may not be gone through that often (`max_epochs`).
        """
        phase = self._phase(p)
        mixture, n = self.mixtures[phase], p - self._starts[phase]
        source = mixture.source(n)
        draw = int(self._before[phase][source] + mixture.counts(n)[source])
        self._check_limit(source, draw, p)
        epoch, index = divmod(draw, self.num_seqs[source])
        sequence = self._permutation(source, epoch)(index)
        assert isinstance(sequence, int)
        return source, epoch, sequence

    def draws(self, p: int) -> np.ndarray:
        """i64 [sources]: samples of each source among the first p."""
        phase = self._phase(max(0, p - 1))
        return self._before[phase] + self.mixtures[phase].counts(p - self._starts[phase])

    def epochs(self, p: int) -> Mapping[str, float]:
        """How often each source was gone through after p samples."""
        return {name: int(drawn) / max(1, n) for name, n, drawn in zip(self.names, self.num_seqs, self.draws(p))}

    def check(self, num_samples: int) -> None:
        """Refuse a run of `num_samples` before it starts if a source would exceed its `max_epochs`.

        Raises:
            ValueError: naming the source, how often it would be gone through, and its limit.
        """
        for name, limit, epochs in zip(self.names, self.max_epochs, self.epochs(num_samples).values()):
            if limit is not None and epochs > limit:
                raise ValueError(
                    f"source {name!r}: {num_samples} samples would go through it {epochs:.3f} times, but max_epochs is "
                    f"{limit}; train for less, give it a smaller weight, or raise max_epochs"
                )

    def _check_limit(self, source: int, draw: int, p: int) -> None:
        limit = self.max_epochs[source]
        if limit is not None and draw >= limit * self.num_seqs[source]:
            raise ValueError(
                f"source {self.names[source]!r}: sample {p} would go through it more often than max_epochs = {limit}"
            )

    def _phase(self, p: int) -> int:
        if p < 0:
            raise ValueError(f"sample number {p} is negative")
        return bisect_right(self._starts, p) - 1

    def _permutation(self, source: int, epoch: int) -> Permutation:
        key = (source, epoch)
        if key not in self._permutations:
            digest = hashlib.sha256(f"{self.seed}/{self.names[source]}/{epoch}".encode()).digest()
            self._permutations[key] = Permutation(self.num_seqs[source], int.from_bytes(digest[:8], "little"))
        return self._permutations[key]
