import pytest
import torch

from steep.kernels import clip_coefficient, grad_norm, squared_norm

SHAPES = [(700, 300), (16384,), (33,), (5, 7, 9), (0,), ()]


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(1e-3 * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]


def true_norm(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([grad.double().flatten() for grad in grads]).norm()


def test_against_float64(path, dtype):
    grads = gradients(dtype)
    assert torch.allclose(squared_norm(grads).sqrt(), true_norm(grads), rtol=2e-6, atol=0)
    assert grad_norm(grads).dtype == torch.float32
    assert grad_norm(grads).shape == ()


def test_ten_million_elements(dtype):
    grad = torch.randn(10**7, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.allclose(squared_norm([grad]).sqrt(), true_norm([grad]), rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
def test_roundings_of_equal_gradients_do_not_add_up(dtype, value):
    """Where all elements are equal every rounding goes the same way: the worst case for a long fp32 sum."""
    grad = torch.full((2_000_003,), value).to(dtype)
    assert torch.allclose(squared_norm([grad]), grad.double().square().sum(), rtol=2.4e-6, atol=0)


def test_mixed_dtypes_unaligned_views_and_the_same_bits_twice(path):
    grads = [*gradients(torch.float32), *gradients(torch.bfloat16), torch.ones(100)[3:90]]
    norm = squared_norm(grads)
    assert torch.allclose(norm.sqrt(), true_norm(grads), rtol=2e-6, atol=0)
    assert torch.equal(norm, squared_norm(grads))


def test_parts_of_ranks_add_up(path):
    grads = gradients(torch.bfloat16)
    parts = squared_norm(grads[:2]) + squared_norm(grads[2:])
    assert torch.allclose(parts.sqrt(), true_norm(grads), rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 2e19])
def test_what_is_not_finite_is_skipped(path, value):
    grads = gradients(torch.float32)
    grads[0][3, 4] = value
    norm = grad_norm(grads)
    assert not norm.isfinite()
    assert clip_coefficient(norm, 1.0)[1] == 1


@pytest.mark.parametrize(("norm", "scale"), [(0.0, 1.0), (0.7, 1.0), (2.0, 1.0), (8.0, 0.25)])
def test_clip_coefficient(norm, scale):
    assert [x.item() for x in clip_coefficient(torch.tensor(norm), 2.0)] == [scale, 0.0]
    assert [x.item() for x in clip_coefficient(torch.tensor(norm), None)] == [1.0, 0.0]


def test_nothing_but_empty_gradients(path):
    assert grad_norm([torch.zeros(0), torch.zeros(0, 3, dtype=torch.bfloat16)]) == 0


def test_wrong_gradients_are_refused():
    good = torch.zeros(4)
    for grads, message in (
        ([], "grads is empty"),
        ([good, good.half()], "grad is torch.float16"),
        ([good, torch.zeros(4, device="meta")], "grad is on meta"),
        ([torch.zeros(4, 4).T], "grad has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            squared_norm(grads)
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_coefficient(good.sum(), 0)
