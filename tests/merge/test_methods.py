"""The methods as functions on tensors: against plain formulas in float64, brute force, and their exact promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.merge import linear, slerp, task_arithmetic, ties, trim
from steep.merge.methods import ROW, partial_sums
from steep.merge.sparsify import LargestK, kept
from tests.merge.models import bits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_linear_is_the_weighted_mean() -> None:
    x = torch.randn(3, 50, 7)
    expected = (0.2 * x[0].double() - 0.1 * x[1].double() + 0.5 * x[2].double()) / 0.6
    torch.testing.assert_close(linear([*x], [0.2, -0.1, 0.5]), expected.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(linear([*x], [0.2, -0.1, 0.5], normalize=False), (0.6 * expected).float())


def test_one_model_of_weight_one_comes_back_bit_for_bit() -> None:
    x = torch.tensor([-0.0, 0.0, 1e-40, -3.5, 1e30])
    assert bits(linear([x], [1.0])) == bits(x)
    assert bits(linear([torch.randn(5), x], [0.0, 1.0])) == bits(x)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.2])
def test_slerp_follows_the_arc(t: float) -> None:
    a, b = torch.randn(2, 90, 60)
    x, y = a.double().flatten(), b.double().flatten()
    theta = torch.acos(x @ y / (x.norm() * y.norm()))
    expected = (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)
    torch.testing.assert_close(slerp(a, b, t).flatten(), expected.float(), rtol=1e-6, atol=1e-6)


def test_slerp_keeps_the_norm_of_unit_vectors_and_turns_by_equal_angles() -> None:
    a, b = (x / x.norm() for x in torch.randn(2, 10_000).double().float())
    path = [slerp(a, b, t).double() for t in (0, 0.25, 0.5, 0.75, 1)]
    assert [float(x.norm()) for x in path] == pytest.approx([1] * 5, abs=1e-6)
    angles = [math.acos(float(x @ y)) for x, y in zip(path, path[1:])]
    assert angles == pytest.approx([angles[0]] * 4, rel=1e-5)


def test_slerp_ends_are_the_inputs_bit_for_bit() -> None:
    a, b = torch.randn(2, 1000)
    a[0], b[1] = -0.0, -0.0
    assert bits(slerp(a, b, 0)) == bits(a)
    assert bits(slerp(a, b, 1)) == bits(b)


def test_slerp_of_nearly_parallel_or_opposite_tensors_is_a_line() -> None:
    a = torch.randn(1000)
    b = a + 1e-3 * torch.randn(1000)
    assert torch.equal(slerp(a, b, 0.25), a * 0.75 + b * 0.25)
    torch.testing.assert_close(slerp(a, -a, 0.25), 0.5 * a)
    assert torch.equal(slerp(torch.zeros(5), torch.zeros(5), 0.3), torch.zeros(5))


def test_task_arithmetic() -> None:
    base, a, b = torch.randn(3, 40)
    deltas = [a - base, b - base]
    expected = base.double() + 0.8 * (0.7 * (a.double() - base.double()) + 0.3 * (b.double() - base.double()))
    torch.testing.assert_close(task_arithmetic(base, deltas, [0.7, 0.3], scale=0.8), expected.float())
    both = task_arithmetic(base, deltas, [2.0, 2.0], normalize=True)
    torch.testing.assert_close(both, (a + b) / 2)
    assert torch.equal(
        task_arithmetic(base, deltas, [1.0, -1.0], normalize=True), task_arithmetic(base, deltas, [1.0, -1.0])
    )


def test_scale_zero_is_the_base_bit_for_bit() -> None:
    base, delta = torch.tensor([-0.0, 1.0, -2.0]), torch.tensor([1.0, -1.0, 0.0])
    assert bits(task_arithmetic(base, [delta], [0.5], scale=0.0)) == bits(base)
    assert bits(task_arithmetic(base, [delta], [0.0])) == bits(base)
    assert bits(ties(base, [delta], [0.5], [1.0], scale=0.0)) == bits(base)


def test_task_arithmetic_does_not_care_for_the_order_of_models() -> None:
    base, *deltas = torch.randn(5, 4000)
    weights = [0.3, 0.9, -0.4, 0.2]
    order = [2, 0, 3, 1]
    permuted = task_arithmetic(base, [deltas[i] for i in order], [weights[i] for i in order])
    torch.testing.assert_close(task_arithmetic(base, deltas, weights), permuted, rtol=1e-6, atol=1e-6)


def brute_force_trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    k = max(1, int(density * delta.numel())) if density > 0 else 0
    order = sorted(range(delta.numel()), key=lambda index: (-abs(float(delta[index])), index))
    kept = torch.zeros_like(delta)
    for index in order[:k]:
        kept[index] = delta[index]
    return kept


def brute_force_ties(
    base: list[float], taus: list[list[float]], weights: list[float], normalize: bool, scale: float
) -> list[float]:
    merged = []
    for position, b in enumerate(base):
        d = [weight * tau[position] for weight, tau in zip(weights, taus)]
        sign = 1 if sum(d) >= 0 else -1
        agreeing = [index for index, value in enumerate(d) if value * sign > 0]
        total, divisor = sum(d[index] for index in agreeing), sum(weights[index] for index in agreeing)
        merged.append(b + scale * (total / divisor if normalize and divisor else total))
    return merged


# Few distinct magnitudes, so that elements equal to the k-th largest are the rule.
few_values = st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-3, 2.0**-130, 3.0, math.nextafter(1, 2)])
any_value = st.floats(-(2.0**100), 2.0**100, width=32)


@given(values=st.lists(few_values | any_value, min_size=1, max_size=60), density=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_trim_keeps_exactly_k_and_the_lowest_index_among_equals(values: list[float], density: float) -> None:
    delta = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(trim(delta, density), brute_force_trim(delta, density))


@given(
    deltas=st.lists(st.tuples(few_values, few_values, few_values), min_size=1, max_size=40),
    weights=st.tuples(*[st.sampled_from([0.5, 1.0, -0.25, 0.0, 2.0])] * 3),
    densities=st.tuples(*[st.sampled_from([0.0, 0.2, 0.5, 1.0])] * 3),
    normalize=st.booleans(),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
)
@settings(max_examples=150, deadline=None)
def test_ties_against_brute_force(deltas, weights, densities, normalize, scale) -> None:
    columns = [torch.tensor(column, dtype=torch.float32) for column in zip(*deltas)]
    base = torch.arange(len(deltas), dtype=torch.float32) / 8
    merged = ties(base, columns, weights, densities, normalize, scale)
    taus = [brute_force_trim(delta, density).double().tolist() for delta, density in zip(columns, densities)]
    expected = brute_force_ties(base.double().tolist(), taus, list(weights), normalize, scale)
    torch.testing.assert_close(merged.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.0, 1e-6, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("kind", ["normal", "bf16", "constant", "zero"])
def test_largest_k_of_chunks_is_the_largest_k_of_the_whole(density: float, kind: str) -> None:
    x = {
        "normal": torch.randn(5 * ROW + 77),
        "bf16": torch.randn(5 * ROW + 77).bfloat16().float(),
        "constant": torch.full((5 * ROW + 77,), -0.25),
        "zero": torch.zeros(5 * ROW + 77),
    }[kind]
    largest = LargestK(x.numel(), [kept(x.numel(), density)])
    for _ in range(largest.passes):
        for chunk in reversed(x.split(ROW)):
            largest.count(chunk)
        largest.end_pass()
    expected = torch.zeros_like(x)
    order = torch.sort(x.abs(), descending=True, stable=True).indices[: largest.ks[0]]
    expected[order] = x[order]
    for _ in range(2):
        assert torch.equal(torch.cat([largest.keep(chunk)[0] for chunk in x.split(ROW)]), expected)
    assert torch.equal(trim(x, density), expected)


def test_partial_sums_do_not_depend_on_chunks_and_add_up() -> None:
    x, y = torch.randn(2, 7 * ROW + 5)
    whole = partial_sums(x, y)
    parts = torch.cat([partial_sums(a, b) for a, b in zip(x.split(2 * ROW), y.split(2 * ROW))])
    assert torch.equal(whole, parts)
    assert math.fsum(whole.tolist()) == pytest.approx(float(x.double() @ y.double()), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)])
def test_empty_and_scalar_tensors(shape: tuple[int, ...]) -> None:
    base, delta = torch.randn(2, *shape)
    assert linear([base, delta], [1.0, 1.0]).shape == shape
    assert slerp(base, delta, 0.5).shape == shape
    assert task_arithmetic(base, [delta], [1.0]).shape == shape
    assert ties(base, [delta], [1.0], [0.5]).shape == shape
