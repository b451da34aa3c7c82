"""Methods against their papers' formulas, written once more in float64 and without regard for memory or pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from steep.merge import (
    arcee_fusion,
    chat_vector,
    consensus_ta,
    iso_c,
    karcher,
    lines,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    ramplus_tl,
    sce,
    tall_mask,
    ties_consensus,
    trim_outliers,
    trim_rows,
    tsv_m,
)
from tests.merge.models import bits

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = Sequence[torch.Tensor]


def inputs(count: int, size: float = 0.1, shape: tuple[int, ...] = (40, 30)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and task vectors of which a third of the elements are 0."""
    base = torch.randn(shape)
    return base, [size * torch.randn(shape) * (torch.rand(shape) < 0.67) for _ in range(count)]


def close(found: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(found, expected.float(), **({"rtol": 2e-6, "atol": 5e-7} | tolerance))


def arc(x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
    theta = torch.acos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    return (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)


def test_nuslerp() -> None:
    base, (a, b) = inputs(2)
    x, y, t = a.double(), b.double(), 0.3 / 0.8
    weights = [0.5, 0.3]
    close(nuslerp(a, b, weights), arc(x.flatten(), y.flatten(), t).view(a.shape))
    close(nuslerp(base + a, base + b, weights, base), base + arc(x.flatten(), y.flatten(), t).view(a.shape), atol=2e-6)
    close(nuslerp(a, b, weights, nuslerp_flatten=False), torch.stack([arc(p, q, t) for p, q in zip(x, y)]))
    columns = nuslerp(a, b, weights, nuslerp_flatten=False, nuslerp_row_wise=True)
    close(columns, torch.stack([arc(p, q, t) for p, q in zip(x.T, y.T)]).T)
    close(nuslerp(a, b, [0.5, -0.5]), arc(x.flatten(), y.flatten(), 0.5).view(a.shape))
    assert bits(nuslerp(a, b, [1.0, 0.0])) == bits(a)
    assert torch.equal(nuslerp(a, 2 * a, [0.5, 0.5]), a * 0.5 + 2 * a * 0.5)


def test_nuslerp_of_siblings_is_an_arc_where_bf16_has_no_angle() -> None:
    """The case in which mergekit's angle in bf16 is 0 or 0.088."""
    a = torch.randn(3000).bfloat16().float()
    b = (a + 0.02 * torch.randn(3000)).bfloat16().float()
    close(nuslerp(a, b, [0.5, 0.5]), arc(a.double(), b.double(), 0.5), rtol=1e-6, atol=1e-6)


def test_multislerp() -> None:
    base, deltas = inputs(3)
    weights = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64) / 1.2
    x = torch.stack([delta.double().flatten() for delta in deltas])
    units = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    mean = weights @ units
    mean /= mean.norm()
    tangent = weights @ (units - (units @ mean).outer(mean))
    assert tangent.norm() < 1e-12  # so that mergekit's exponential map leads nowhere
    expected = (mean * (weights @ x.norm(dim=1))).view(base.shape)
    close(multislerp(deltas, [0.5, 0.3, 0.4]), expected)
    close(multislerp([base + delta for delta in deltas], [0.5, 0.3, 0.4], base), base + expected, atol=2e-6)
    close(multislerp(deltas, [0.5, 0.3, 0.4], normalize_weights=False), 1.2 * expected)
    close(multislerp([base, -base], [0.7, 0.3]), base.double())  # the direction of what is left
    assert torch.equal(multislerp([base, -base], [0.5, 0.5]), torch.zeros_like(base))
    assert torch.equal(multislerp([base], [0.2]), base)
    with pytest.raises(ValueError, match="balance out"):
        multislerp([base, -base, torch.zeros_like(base)], [0.5, 0.5, 0.5])


def test_karcher_is_where_the_logarithms_sum_to_zero() -> None:
    _, tensors = inputs(4)
    tensors[3] = tensors[0] + 0.3 * tensors[3]
    x = torch.stack([tensor.double().flatten() for tensor in tensors])
    units = x / x.norm(dim=1, keepdim=True)
    mean = units.mean(0) / units.mean(0).norm()
    for _ in range(200):
        theta = torch.acos(units @ mean)
        tangent = ((theta / theta.sin())[:, None] * (units - (units @ mean).outer(mean))).mean(0)
        if tangent.norm() < 1e-14:
            break
        mean = tangent.norm().cos() * mean + tangent.norm().sin() * tangent / tangent.norm()
    expected = (mean * x.norm(dim=1).mean()).view(tensors[0].shape)
    close(karcher(tensors, max_iter=100, tol=1e-9), expected)
    same = torch.randn(50)
    close(karcher([same, same, same]), same.double())
    assert torch.equal(karcher([same]), same)
    zero = torch.zeros(50)
    close(karcher([same, zero]), same.double() / 2)
    assert torch.equal(karcher([zero, zero]), zero)


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock(count: int) -> None:
    base, deltas = inputs(count)
    shared = 0.1 * torch.randn(base.shape)
    deltas = [delta + shared for delta in deltas]

    def expected(b: torch.Tensor, ds: Tensors) -> torch.Tensor:
        cosines = [x @ y / (x.norm() * y.norm()) for i, x in enumerate(ds) for y in ds[i + 1 :]]
        c = sum(cosines) / len(cosines)
        t = count * c / (1 + (count - 1) * c)
        return t * sum(b + d for d in ds) / count + (1 - t) * b

    b, ds = base.double(), [delta.double() for delta in deltas]
    flat = expected(b.flatten(), [d.flatten() for d in ds]).view(base.shape)
    close(model_stock(base, deltas), flat)
    rows = torch.stack([expected(row, [d[i] for d in ds]) for i, row in enumerate(b)])
    close(model_stock(base, deltas, filter_wise=True), rows)
    assert bits(model_stock(base, [torch.zeros_like(base)] * count)) == bits(base)


def test_trim_outliers_drops_the_largest_and_keeps_the_next() -> None:
    _, (delta,) = inputs(1)
    n, k, outliers = 1200, int(0.4 * 1200), int(0.1 * 1200)
    order = sorted(range(n), key=lambda i: (-abs(float(delta.flatten()[i])), i))
    expected = torch.zeros(n)
    for i in order[outliers : outliers + k]:
        expected[i] = delta.flatten()[i]
    assert torch.equal(trim_outliers(delta, 0.4, 0.1).flatten(), expected)
    # no room for all outliers: the smallest are kept
    kept = trim_outliers(delta, 0.95, 0.3).flatten()
    assert set(kept.nonzero().flatten().tolist()) <= set(order[n - int(0.95 * n) :])
    assert bits(trim_outliers(delta, 1.0, 0.3)) == bits(delta)


def test_trim_rows() -> None:
    _, (delta,) = inputs(1)
    delta[0] = 1.0
    kept = trim_rows(delta, 0.25)
    for row, found in zip(delta, kept):
        order = sorted(range(30), key=lambda i: (-abs(float(row[i])), i))
        expected = torch.zeros(30)
        expected[order[:7]] = row[order[:7]]
        assert torch.equal(found, expected)


def test_unweighted_election_is_the_papers() -> None:
    base, taus = inputs(3)
    weights = [0.2, 1.5, 0.4]
    x, w = torch.stack(taus).double(), torch.tensor(weights, dtype=torch.float64)[:, None, None]
    elected = torch.where(x.sum(0) >= 0, 1.0, -1.0)
    agreeing = (x.sign() == elected) * w
    divisor = agreeing.sum(0)
    expected = base + (agreeing * x).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    close(ties_consensus(base, taus, weights, sign="unweighted"), expected)


@pytest.mark.parametrize("topk", [1.0, 0.3])
def test_sce(topk: float) -> None:
    base, deltas = inputs(3)
    x = torch.stack(deltas).double()
    if topk < 1:
        variance = x.var(0, correction=0).flatten()
        keep = torch.zeros(len(variance), dtype=torch.float64)
        keep[variance.topk(int(topk * int((variance > 0).sum()))).indices] = 1
        x = x * keep.view(base.shape)
    weights = x.square().mean((1, 2))
    weights = (weights / weights.sum())[:, None, None]
    elected = torch.where(x.sum(0) >= 0, 1.0, -1.0)
    agreeing = (x.sign() == elected) * weights
    divisor = agreeing.sum(0)
    expected = base + (agreeing * x).sum(0) / torch.where(divisor == 0, 1.0, divisor)
    close(sce(base, deltas, topk), expected)
    tiny = [1e-4 * delta for delta in deltas]  # where mergekit would weigh all models alike
    close((sce(torch.zeros_like(base), tiny, topk)), 1e-4 * (expected - base), rtol=1e-5, atol=1e-10)


def test_ram() -> None:
    base, deltas = inputs(3)
    x = torch.stack(deltas).double()
    active = x.abs() > 1e-5
    count = active.sum(0)
    close(ram(base, deltas), base + (x * active).sum(0) / count.clamp(min=1))
    shared, unique = (active & (count > 1)).sum((1, 2)), (active & (count == 1)).sum((1, 2))
    factor = (1 + 0.3 * (shared / unique).clamp(max=2.5))[:, None, None]
    expected = base + (x * active * torch.where(count == 1, factor, 1.0)).sum(0) / count.clamp(min=1)
    close(ramplus_tl(base, deltas, r=0.3, alpha=2.5), expected)


def test_nearswap() -> None:
    base, (delta,) = inputs(1)
    other = base + delta
    b, m = base.double(), other.double()
    weight = (0.05 / (m - b).abs().clamp(min=1e-6)).clamp(max=1)
    close(nearswap(base, other, 0.05), weight * m + (1 - weight) * b)
    assert bits(nearswap(base, other, 0.0)) == bits(base)
    near = (other - base).abs() < 0.05
    assert torch.equal(nearswap(base, other, 0.05)[near], other[near])


def test_arcee_fusion() -> None:
    base, (delta,) = inputs(1, shape=(50, 80))
    other = base + delta
    p, q = torch.softmax(other.double(), -1) + 1e-8, torch.softmax(base.double(), -1) + 1e-8
    scores = (other - base).double().abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = scores.flatten().sort().values
    low, median, high = (ordered[int(3999 * quarters / 4)] for quarters in (1, 2, 3))
    chosen = scores >= median + 1.5 * (high - low)
    assert 0.01 < chosen.double().mean() < 0.2
    assert torch.equal(arcee_fusion(base, other), torch.where(chosen, base + (other - base), base))


def test_consensus_ta() -> None:
    base, deltas = inputs(3)
    weights, lambdas = [0.5, 0.6, 0.7], [0.4, 0.3, 0.5]
    x = torch.stack(deltas).double()
    tau = (torch.tensor(weights, dtype=torch.float64)[:, None, None] * x).sum(0)
    masks = torch.stack([d.abs() > a * (tau - d).abs() for d, a in zip(x, lambdas)])
    needed = masks.sum(0) >= 2
    assert 0.2 < needed.double().mean() < 0.9
    close(consensus_ta(base, deltas, weights, lambdas, 2, 0.8), base + 0.8 * tau * needed)
    alone = consensus_ta(base, deltas, weights, lambdas, consensus_k=1)
    close(alone, base + tau * (masks.sum(0) >= 1))
    assert bits(consensus_ta(base, deltas, weights, lambdas, scale=0)) == bits(base)
    # theta_0 - theta_t and theta_mt - theta_t of the paper
    assert torch.equal(tall_mask(deltas[0], tau.float(), 0.4).bool(), masks[0])


def test_chat_vector() -> None:
    base, (c, i) = inputs(2)
    cpt, instruct = base + c, base + i
    expected = cpt.double() + 0.7 * (instruct.double() - base.double())
    close(chat_vector(base, cpt, instruct, 0.7), expected)
    assert bits(chat_vector(base, cpt, instruct, 0)) == bits(cpt)
    assert bits(chat_vector(base, cpt, base, 1)) == bits(cpt)
    assert torch.equal(chat_vector(base, base, instruct)[i == 0], base[i == 0])
    assert torch.equal(passthrough(base, 0.5), base * 0.5)


def test_lines_rises_from_alpha_to_alpha_plus_beta() -> None:
    assert [lines(layer, 5, 0.2, 0.8) for layer in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lines(0, 1, 0.2, 0.8) == pytest.approx(1.0)


def orthogonalised(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_tsv_m(shape: tuple[int, int], count: int) -> None:
    base, deltas = inputs(count, shape=shape)
    rank = min(shape) // count
    lefts, values, rights = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta.double())
        lefts += [u[:, i] for i in range(rank)]
        values += [s[i] for i in range(rank)]
        rights += [vh[i] for i in range(rank)]
    left, right = orthogonalised(torch.stack(lefts, 1)), orthogonalised(torch.stack(rights))
    expected = left @ torch.diag(torch.stack(values)) @ right
    close(tsv_m(base, deltas, 0.9), base + 0.9 * expected)
    if count == 1:
        close(tsv_m(base, deltas), base + deltas[0].double())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_iso_c(shape: tuple[int, int]) -> None:
    base, deltas = inputs(3, shape=shape)
    total = sum(delta.double() for delta in deltas)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    close(iso_c(base, deltas, 0.9), base + 0.9 * u @ torch.diag(s.mean().expand(len(s))) @ vh)
    merged = torch.linalg.svdvals((iso_c(torch.zeros(shape), deltas)).double())
    torch.testing.assert_close(merged, s.mean().expand(len(s)), rtol=1e-5, atol=1e-6)


def test_spectral_methods_of_equal_and_of_orthogonal_task_vectors() -> None:
    """Tasks that share nothing keep all they have; what they share, orthogonalising does not count twice."""
    zero = torch.zeros(20, 20)
    a, b = zero.clone(), zero.clone()
    a[:10, :10], b[10:, 10:] = torch.randn(10, 10), torch.randn(10, 10)
    close(tsv_m(zero, [a, b]), (a + b).double(), atol=1e-6)
    one = torch.randn(20, 20)
    u, s, vh = torch.linalg.svd(one.double())
    both = tsv_m(zero, [one, one])
    # U = [u u], nearest orthonormal columns [u u] / sqrt 2: the singular values halve twice and add up once
    close(both, u[:, :10] @ torch.diag(s[:10]) @ vh[:10], atol=1e-5)


@pytest.mark.parametrize("method", [tsv_m, iso_c])
def test_spectral_methods_of_vectors_zeros_and_nothing(method) -> None:
    base = torch.randn(30)
    deltas = [torch.randn(30) for _ in range(3)]
    close(method(base, deltas, 0.5), base + 0.5 * sum(delta.double() for delta in deltas) / 3)
    matrix, zero = torch.randn(6, 5), torch.zeros(6, 5)
    assert bits(method(matrix, [zero, zero])) == bits(matrix)
    assert bits(method(matrix, [torch.randn(6, 5)], 0.0)) == bits(matrix)
    assert method(torch.zeros(0, 5), [torch.zeros(0, 5)]).shape == (0, 5)
    low = torch.outer(torch.tensor([1.0, 2, 0, -1, 3, 1]), torch.tensor([2.0, 1, 1, -3, 0]))  # of rank 1, exactly
    found = method(torch.zeros(6, 5), [low])
    assert torch.linalg.matrix_rank(found.double(), rtol=1e-5) == 1
    assert math.isfinite(float(found.sum()))
