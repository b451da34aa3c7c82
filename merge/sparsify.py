"""Thinning task vectors: what TIES, Breadcrumbs, DARE and DELLA keep of delta_i, exactly, also from pieces.

Each rule is a pure function on a whole task vector and a `Sparsifier`, which sees it in pieces. Order by magnitude is
everywhere the same total order: of two elements with equal magnitudes the one with the lower flat index counts as the
larger. Touches no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .methods import as_rows, run_sums
from .noise import WORDS, Noise, threshold
from .tensor_merge import ROW, Subject, whole_rows

Rescale = Literal["none", "l1", "inv_density", "elementwise"]
SMALL_L1 = 1e-7


def trim(delta: Tensor, density: float) -> Tensor:
    """The k = max(1, int(density n)) elements of largest magnitude, zeros elsewhere; nothing is kept at density 0.

    Exactly k: among elements of equal magnitude the lowest flat index goes first (TIES, arXiv:2306.01708).
    """
    return largest(delta, kept(delta.numel(), density))


def trim_rows(delta: Tensor, density: float) -> Tensor:
    """`trim` of every row (last dimension) by itself; a vector is one row."""
    columns = delta.shape[-1] if delta.ndim else 1
    return _largest_of_rows(delta.reshape(-1), columns, density).reshape(delta.shape)


def trim_outliers(delta: Tensor, density: float, gamma: float) -> Tensor:
    """Model Breadcrumbs (arXiv:2312.06795): k = int(density n) elements, next in magnitude to the int(gamma n) largest.

    So many outliers are left out only as long as k others remain; everything is kept at density 1.
    """
    outer, inner = _band(delta.numel(), density, gamma)
    return largest(delta, outer) - largest(delta, inner)


def dare(delta: Tensor, density: float, noise: Noise, rescale: Rescale = "inv_density") -> Tensor:
    """Drop and rescale (DARE, arXiv:2311.03099): every element is kept with probability `density`.

    Args:
        rescale: "inv_density": divided by density, as in the paper; "l1": scaled to the L1 norm of delta, as in
            mergekit; "none".
    """
    if density in (0, 1):
        return _all_or_none(delta, density)
    masked = delta * noise.below(0, threshold(density), delta.numel(), delta.device).view(delta.shape)
    return masked * rescale_factor(rescale, density, delta, masked)


def della(delta: Tensor, density: float, epsilon: float, noise: Noise, rescale: Rescale = "elementwise") -> Tensor:
    """MagPrune of DELLA (arXiv:2406.11617): DARE whose probability grows with an element's rank within its row.

    The element of rank r among the n of its row, 1 the smallest, is kept with probability
    p = (density - epsilon) + 2 epsilon (r - 1) / (n - 1); a row of one has p = density. At density 1 all is kept.

    Args:
        epsilon: density - epsilon and density + epsilon must lie strictly between 0 and 1 (`della_problem`).
        rescale: as for `dare`; "elementwise": divided by its own p, as in the authors' code.
    """
    if density in (0, 1):
        return _all_or_none(delta, density)
    columns = delta.shape[-1] if delta.ndim else 1
    thresholds = _rank_thresholds(delta.reshape(-1), columns, density, epsilon)
    masked = delta * noise.below(0, thresholds, delta.numel(), delta.device).view(delta.shape)
    if rescale == "elementwise":
        return masked / _probabilities(thresholds).view(delta.shape)
    return masked * rescale_factor(rescale, density, delta, masked, whole_rows(columns))


def della_problem(density: float, epsilon: float) -> str | None:
    """Why a density and epsilon do not go together, if they do not."""
    if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        return f"density {density:g} plus or minus epsilon {epsilon:g} must lie strictly between 0 and 1"
    return None


def rescale_factor(rescale: Rescale, density: float, delta: Tensor, masked: Tensor, unit: int = ROW) -> float:
    """By what a thinned task vector is multiplied; "elementwise" has been done where the elements were kept.

    Args:
        unit: length of the runs that L1 norms are made of; `whole_rows` for a rule that sees whole rows.
    """
    before, after = (math.fsum(run_sums(x.reshape(-1).abs(), unit).tolist()) for x in (delta, masked))
    return _factor(rescale, density, before, after)


def _factor(rescale: Rescale, density: float, before: float, after: float) -> float:
    """An L1 norm under 1e-7, before or after, rescales nothing, as in mergekit."""
    if rescale == "l1":
        return 1.0 if min(before, after) < SMALL_L1 else before / after
    return 1 / density if rescale == "inv_density" and density else 1.0


class Sparsifier:
    """One task vector seen in pieces, like a TensorMerge: `looks` readings, then `keep` once or more for all pieces.

    Usage: for each of `looks` readings: `look` at every piece, then `end_look`; then `keep` every piece, in order.
    """

    pieces: Literal["any", "rows"] = "any"
    looks = 0

    def __init__(self, subject: Subject, position: int) -> None:
        """position: of the task vector among those of the subject, for its parameters and its random bits."""
        self.columns = subject.columns
        self.density: float = subject.parameters["density"][position]

    def look(self, number: int, lo: int, delta: Tensor) -> None:
        """A piece that begins at flat element `lo`, in reading `number`."""

    def end_look(self, number: int) -> None:
        """Reading `number` is over."""

    def keep(self, lo: int, delta: Tensor) -> Tensor:
        """The piece where its elements are kept, 0 elsewhere; flat."""
        raise NotImplementedError


class Trim(Sparsifier):
    """`trim`, or `trim_rows` where the parameter `topk_scope` is "row"."""

    def __init__(self, subject: Subject, position: int) -> None:
        super().__init__(subject, position)
        self._rows = subject.parameters.get("topk_scope") == "row"
        self.pieces = "rows" if self._rows else "any"
        self._largest = LargestK(subject.numel, [kept(subject.numel, self.density)], subject.device)
        self.looks = 0 if self._rows else self._largest.passes

    def look(self, number: int, lo: int, delta: Tensor) -> None:
        self._largest.count(delta)

    def end_look(self, number: int) -> None:
        self._largest.end_pass()

    def keep(self, lo: int, delta: Tensor) -> Tensor:
        if self._rows:
            return _largest_of_rows(delta, self.columns, self.density)
        return self._largest.keep(delta)[0]


class TrimOutliers(Sparsifier):
    """`trim_outliers`."""

    def __init__(self, subject: Subject, position: int) -> None:
        super().__init__(subject, position)
        band = _band(subject.numel, self.density, subject.parameters["gamma"][position])
        self._largest = LargestK(subject.numel, band, subject.device)
        self.looks = self._largest.passes

    def look(self, number: int, lo: int, delta: Tensor) -> None:
        self._largest.count(delta)

    def end_look(self, number: int) -> None:
        self._largest.end_pass()

    def keep(self, lo: int, delta: Tensor) -> Tensor:
        outer, inner = self._largest.keep(delta)
        return outer - inner


class Dare(Sparsifier):
    """`dare` without its rescaling. A mask that is needed twice, for the L1 norm and to merge, is kept as bits."""

    def __init__(self, subject: Subject, position: int) -> None:
        super().__init__(subject, position)
        self.noise = Noise.of(subject.seed, subject.name, subject.models[position])
        self._packs = subject.parameters["rescale"] == "l1" and subject.device.type == "cpu"
        self._packed: dict[tuple[int, int], Any] = {}  # (first element, number): a mask in numpy's packed bits

    def keep(self, lo: int, delta: Tensor) -> Tensor:
        if self.density in (0, 1):
            return _all_or_none(delta, self.density)
        piece = lo, delta.numel()
        if (packed := self._packed.pop(piece, None)) is not None:
            return delta * torch.from_numpy(np.unpackbits(packed, count=delta.numel()))
        mask = self._mask(lo, delta)
        if self._packs:
            self._packed[piece] = np.packbits(mask.numpy().astype(np.bool_))
        return delta * mask

    def _mask(self, lo: int, delta: Tensor) -> Tensor:
        """1 where an element is kept, else 0."""
        return self.noise.below(lo, threshold(self.density), delta.numel(), delta.device)


class Della(Dare):
    """`della` without its rescaling by one factor."""

    pieces = "rows"

    def __init__(self, subject: Subject, position: int) -> None:
        super().__init__(subject, position)
        self._epsilon: float = subject.parameters["epsilon"][position]
        self._divides = subject.parameters["rescale"] == "elementwise" and self.density not in (0, 1)

    def keep(self, lo: int, delta: Tensor) -> Tensor:
        if not self._divides:
            return super().keep(lo, delta)
        thresholds = self._thresholds(delta)
        mask = self.noise.below(lo, thresholds, delta.numel(), delta.device)
        return delta * mask / _probabilities(thresholds)

    def _mask(self, lo: int, delta: Tensor) -> Tensor:
        return self.noise.below(lo, self._thresholds(delta), delta.numel(), delta.device)

    def _thresholds(self, delta: Tensor) -> Tensor:
        return _rank_thresholds(delta, self.columns, self.density, self._epsilon)


class Thinned:
    """All task vectors of a tensor, thinned and rescaled in pieces: what the methods built on Sparsifiers share.

    The L1 norms are gathered in one more reading, after those that the sparsifiers need.
    """

    def __init__(self, kind: type[Sparsifier], subject: Subject) -> None:
        parameters = subject.parameters
        self._rescale: Rescale = parameters["rescale"]
        self._each = [kind(subject, position) for position in range(len(parameters["density"]))]
        self.pieces: Literal["any", "rows"] = "rows" if any(s.pieces == "rows" for s in self._each) else "any"
        self._unit = subject.whole_rows if self.pieces == "rows" else ROW
        self._sparsifier_looks = max((sparsifier.looks for sparsifier in self._each), default=0)
        self.looks = self._sparsifier_looks + (self._rescale == "l1")
        self._before: list[list[float]] = [[] for _ in self._each]
        self._after: list[list[float]] = [[] for _ in self._each]
        self.factors = [_factor(self._rescale, sparsifier.density, 0.0, 0.0) for sparsifier in self._each]

    def look(self, number: int, lo: int, deltas: Sequence[Tensor]) -> None:
        assert lo % self._unit == 0, "the L1 norm would depend on the pieces"
        for position, (sparsifier, delta) in enumerate(zip(self._each, deltas, strict=True)):
            if number < sparsifier.looks:
                sparsifier.look(number, lo, delta)
            elif number == self._sparsifier_looks:
                self._before[position] += run_sums(delta.abs(), self._unit).tolist()
                self._after[position] += run_sums(sparsifier.keep(lo, delta).abs(), self._unit).tolist()

    def end_look(self, number: int) -> None:
        for position, sparsifier in enumerate(self._each):
            if number < sparsifier.looks:
                sparsifier.end_look(number)
            elif number == self._sparsifier_looks:
                before, after = math.fsum(self._before[position]), math.fsum(self._after[position])
                self.factors[position] = _factor(self._rescale, sparsifier.density, before, after)

    def keep(self, lo: int, deltas: Sequence[Tensor]) -> list[Tensor]:
        """The thinned and rescaled pieces, in the order of the tensor."""
        thinned = [sparsifier.keep(lo, delta) for sparsifier, delta in zip(self._each, deltas, strict=True)]
        return [tau if factor == 1 else tau * factor for tau, factor in zip(thinned, self.factors)]

    def figures(self) -> dict[str, Any]:
        return {"rescaled_by": self.factors} if self._rescale == "l1" else {}


def kept(numel: int, density: float) -> int:
    """k = max(1, int(density numel)); 0 at density 0 or of nothing."""
    return min(numel, max(1, int(density * numel))) if density > 0 else 0


def _band(numel: int, density: float, gamma: float) -> tuple[int, int]:
    """Breadcrumbs keeps the elements that are among the outer, but not among the inner number of largest ones."""
    if density >= 1:
        return numel, 0
    k = int(density * numel)
    inner = min(int(gamma * numel), numel - k)
    return inner + k, inner


def largest(delta: Tensor, k: int) -> Tensor:
    """The k elements of largest magnitude, zeros elsewhere."""
    selection = LargestK(delta.numel(), [k], delta.device)
    flat = delta.reshape(-1)
    for _ in range(selection.passes):
        selection.count(flat)
        selection.end_pass()
    return selection.keep(flat)[0].reshape(delta.shape)


class Places:
    """The magnitudes at given places when a tensor's are sorted downwards, exactly, from pieces, in a fixed memory.

    The bits of |x| as a 31-bit integer are in the order of the magnitudes. The first pass over all pieces counts their
    upper 16 bits, which finds the bin that holds the k-th largest; the second counts the lower 15 bits within that bin,
    which finds the k-th largest itself and how many elements equal to it belong to the k largest.

    Usage: twice: `count` every piece, in any order, then `end_pass`.
    """

    COARSE_BINS, FINE_BINS = 1 << 16, 1 << 15

    def __init__(self, ks: Sequence[int], device: torch.device | str = "cpu") -> None:
        """ks: places, the largest element has 1; they may be set until the first pass ends."""
        self.ks = list(ks)
        self._counts = torch.zeros(self.COARSE_BINS, dtype=torch.int64, device=device)
        self._bins: dict[int, tuple[int, int]] | None = None  # k: its bin, and how many elements are in higher ones
        self._fine: dict[int, Tensor] = {}  # bin: counts of the lower bits in it
        self._found: dict[int, tuple[int, int, bool]] = {}  # k: bits, how many equal ones belong to the k, if all do

    def _wanted(self) -> list[int]:
        return self.ks

    def count(self, x: Tensor) -> None:
        """One piece (float32) of the current pass."""
        bits = _magnitude_bits(x)
        if self._bins is None:
            self._counts += torch.bincount(bits >> 15, minlength=self.COARSE_BINS)
            return
        for coarse, counts in self._fine.items():  # bin 0 takes all that is smaller, the last all that is larger
            lower = (bits - ((coarse << 15) - 1)).clamp_(0, self.FINE_BINS + 1)
            counts += torch.bincount(lower, minlength=self.FINE_BINS + 2)[1:-1]

    def end_pass(self) -> None:
        """All pieces have been counted: find the bins in which the k-th largest lie."""
        if self._bins is None:
            self._bins = {k: _bin_of(self._counts, k) for k in self._wanted()}
            self._fine = {coarse: self._counts.new_zeros(self.FINE_BINS) for coarse, _ in self._bins.values()}
            return
        for k, (coarse, above) in self._bins.items():
            counts = self._fine[coarse]
            fine, above_in_bin = _bin_of(counts, k - above)
            equal = k - above - above_in_bin
            self._found[k] = (coarse << 15) + fine, equal, equal == int(counts[fine])
        self._fine = {}

    def value(self, k: int) -> float:
        """The k-th largest magnitude, after the second pass."""
        return float(torch.tensor(self._found[k][0], dtype=torch.int32).view(torch.float32))


class LargestK(Places):
    """Selects the k largest magnitudes of a tensor seen in pieces, for one or more k.

    Usage: for each of `passes` passes: `count` every piece, then `end_pass`; then `keep` every piece, as often as
    wanted, in the order of the tensor, because the lowest flat index wins among equals.
    """

    def __init__(self, numel: int, ks: Sequence[int], device: torch.device | str = "cpu") -> None:
        """numel: elements of the whole tensor. ks: each in [0, numel]; to keep none or all needs no passes."""
        super().__init__(ks, device)
        self.numel = numel
        self._seen = 0
        self._equal_left: dict[int, int] = {}

    @property
    def passes(self) -> int:
        return 2 if self._wanted() else 0

    def _wanted(self) -> list[int]:
        return [k for k in self.ks if 0 < k < self.numel]

    def keep(self, x: Tensor) -> list[Tensor]:
        """For every k: x where it is one of the k largest, 0 elsewhere. Pieces must come in the order of the tensor."""
        if not self._seen:
            self._equal_left = {k: 0 if all_equal else equal for k, (_, equal, all_equal) in self._found.items()}
        self._seen = (self._seen + x.numel()) % self.numel if self.numel else 0
        bits = _magnitude_bits(x)
        return [self._keep(x, bits, k) if 0 < k < self.numel else x if k else torch.zeros_like(x) for k in self.ks]

    def _keep(self, x: Tensor, bits: Tensor, k: int) -> Tensor:
        threshold, _, all_equal = self._found[k]
        smallest = threshold if all_equal else threshold + 1
        kept = (x.contiguous().view(torch.int32) & ~((bits - smallest) >> 31)).view(torch.float32)
        if left := self._equal_left[k]:
            equal = bits == threshold
            found = int(equal.sum())
            if found > left:
                equal &= equal.cumsum(0) <= left
            self._equal_left[k] -= min(found, left)
            kept = torch.where(equal, x, kept) if found else kept
        return kept


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th element from above, and how many lie in higher bins."""
    at_least = counts.flip(0).cumsum(0).flip(0)  # elements in this bin or a higher one; never grows with the bin
    found = int((at_least >= k).sum()) - 1
    return found, int(at_least[found] - counts[found])


def _magnitude_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32) & 0x7FFFFFFF


def _sorted_rows(rows: Tensor) -> Tensor:
    """Each row's elements in ascending order as int64: magnitude bits above, columns counted from the end below.

    No two are equal, so any sort gives the same. On a CPU numpy's is an order of magnitude faster than torch's.
    """
    keys = _row_keys(rows)
    return torch.from_numpy(_sort_in_place(keys.numpy())) if keys.device.type == "cpu" else keys.sort(-1).values


def _row_keys(rows: Tensor) -> Tensor:
    from_the_end = torch.arange(rows.shape[1] - 1, -1, -1, device=rows.device)
    return (_magnitude_bits(rows).to(torch.int64) << 32) | from_the_end


def _sort_in_place(keys: Any) -> Any:
    keys.sort(axis=-1)
    return keys


def _largest_of_rows(flat: Tensor, columns: int, density: float) -> Tensor:
    k = kept(columns, density)
    if k in (0, columns):
        return flat if k else torch.zeros_like(flat)
    rows = as_rows(flat, columns)
    smallest = _sorted_rows(rows)[:, columns - k :][:, :1]
    return flat * torch.ge(_row_keys(rows), smallest, out=torch.empty_like(rows)).view(-1)


def _all_or_none(delta: Tensor, density: float) -> Tensor:
    return delta if density else torch.zeros_like(delta)


def _rank_thresholds(flat: Tensor, columns: int, density: float, epsilon: float) -> Tensor:
    """For every element of whole rows 2^32 times its probability under `della`; int64."""
    if not flat.numel():
        return torch.zeros_like(flat, dtype=torch.int64)
    rows = as_rows(flat, columns)
    columns_by_rank = (columns - 1) - (_sorted_rows(rows) & (WORDS - 1))
    step = 2 * epsilon / (columns - 1) if columns > 1 else 0.0
    lowest = density - epsilon if columns > 1 else density
    probabilities = lowest + step * torch.arange(columns, dtype=torch.float64, device=flat.device)
    by_rank = (probabilities * WORDS).round().to(torch.int64).expand(rows.shape)
    return torch.empty_like(by_rank).scatter_(1, columns_by_rank, by_rank).view(-1)


def _probabilities(thresholds: Tensor) -> Tensor:
    return (thresholds.double() / WORDS).float()
