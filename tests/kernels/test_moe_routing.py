import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from steep.kernels import expert_load, load_balancing_loss, route, sort_by_expert
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients


def distinct(tokens, experts):
    """Logits without ties, exact in bf16."""
    order = [torch.randperm(experts) for _ in range(tokens)]
    return torch.stack(order).float() / 8 - 2 if tokens else torch.empty(0, experts)


def formula(logits, top_k, renormalize):
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1)
    weights = torch.topk(p, top_k, 1).values
    return weights / weights.sum(1, keepdim=True) if renormalize else weights


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 8, 2), (5, 7, 7), (3, 1, 1), (0, 8, 2), (130, 60, 4)])
def test_weights_match_float64(path, dtype, tokens, experts, top_k, renormalize):
    plain = lambda z: formula(z, top_k, renormalize)  # noqa: E731
    check(lambda z: route(z, top_k, renormalize=renormalize)[0], plain, plain, [distinct(tokens, experts)], dtype)


def test_experts_are_transformers_choice(path):
    logits = distinct(40, 60)
    weights, experts = route(logits, 4)
    assert torch.equal(experts, torch.topk(torch.softmax(logits, 1), 4, 1).indices.to(torch.int32))
    assert weights.dtype == torch.float32
    assert not experts.requires_grad


def test_of_equal_logits_the_lowest_index_comes_first(path):
    logits = torch.tensor([[0.0, 2.0, 2.0, -0.0, 2.0], [-500.0, -500.0, -400.0, 0.0, -500.0]])
    assert route(logits, 4)[1].tolist() == [[1, 2, 4, 0], [3, 2, 0, 1]]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_valid_experts(path, bad):
    logits = torch.randn(3, 6)
    logits[1] = bad
    weights, experts = route(logits, 3)
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()
    assert all(len({*row}) == 3 and min(row) >= 0 and max(row) < 6 for row in experts.tolist())


def test_minus_infinity_is_chosen_last(path):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]])
    weights, experts = route(logits, 3)
    assert experts.tolist() == [[1, 3, 0]]
    assert weights[0, 2] == 0


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 6), experts=st.integers(1, 20), data=st.data())
def test_any_routing(tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    logits = torch.randint(-6, 6, (tokens, experts)).bfloat16()
    results = []
    for triton in (False, True):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if triton:
                use_triton(monkeypatch)
            results.append(route(logits, top_k))
    (weights, chosen), (weights_triton, chosen_triton) = results
    assert torch.equal(chosen, chosen_triton)
    assert torch.allclose(weights, weights_triton, rtol=1e-6)
    assert torch.allclose(weights.sum(1), torch.ones(tokens), atol=1e-6)
    for row, picked in zip(logits.tolist(), chosen.tolist()):
        assert picked == sorted(range(experts), key=lambda e, row=row: (-row[e], e))[:top_k]


def test_strided_logits_and_gradient(path):
    logits = torch.randn(6, 5).t()[:, 1:].requires_grad_()
    weights, _ = route(logits, 2, renormalize=False)
    (got,) = torch.autograd.grad(weights, logits, torch.tensor([1.0, 3.0]).expand(5, 2))
    double = logits.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(formula(double, 2, False) @ torch.tensor([1.0, 3.0]).double(), double, torch.ones(5))
    assert errors([got], [want])[0] < FP32_BOUND


def check_order(ids, num_experts, order):
    offsets, gather, inverse = order
    flat = ids.flatten().tolist()
    key = [i if 0 <= i < num_experts else num_experts for i in flat]
    want = sorted(range(len(flat)), key=lambda s: key[s])  # Python's sort is stable
    assert gather.tolist() == want
    assert inverse.shape == ids.shape
    assert inverse.flatten()[gather.long()].tolist() == list(range(len(flat)))
    assert offsets.tolist() == [sum(k <= e for k in key) for e in range(num_experts)]
    assert {t.dtype for t in order} == {torch.int32}


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(-1, 7), max_size=40), num_experts=st.integers(1, 6))
def test_any_order_is_stable(ids, num_experts):
    check_order(
        torch.tensor(ids, dtype=torch.int64), num_experts, sort_by_expert(torch.tensor(ids).long(), num_experts)
    )


@settings(max_examples=6, deadline=None)
@given(slots=st.integers(0, 600), num_experts=st.sampled_from([1, 8, 40, 256]), seed=st.integers(0, 99))
def test_any_order_is_stable_across_blocks(slots, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts + 1, (slots,), generator=generator, dtype=torch.int32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_triton(monkeypatch)
        check_order(ids, num_experts, sort_by_expert(ids, num_experts))


@pytest.mark.parametrize("shape", [(0, 2), (7, 3), (1, 1)])
def test_order_and_load_of_tokens(path, shape):
    experts = torch.randint(0, 4, shape).t().contiguous().t()
    order = sort_by_expert(experts, 5)
    check_order(experts, 5, order)
    load = expert_load(experts, 5)
    assert load.tolist() == [(experts == e).sum().item() for e in range(5)]
    assert torch.equal(load.cumsum(0), order[0])


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balancing_loss_is_transformers(path, top_k, masked):
    layers = [torch.randn(24, 5, requires_grad=True) for _ in range(3)]
    mask = torch.randint(0, 2, (24,)) if masked else None
    want = load_balancing_loss_func(tuple(layers), 5, top_k, None if mask is None else mask.view(2, 12))
    got = load_balancing_loss(layers, top_k, mask=mask)
    assert errors([got], [want])[0] < FP32_BOUND
    gradient = torch.autograd.grad(got, layers), torch.autograd.grad(want, layers)
    assert max(errors(*gradient)) < FP32_BOUND


@pytest.mark.parametrize("tokens", [0, 3])
def test_load_balancing_loss_of_no_tokens_is_zero(path, tokens):
    logits = torch.randn(tokens, 5, requires_grad=True)
    loss = load_balancing_loss(logits, 2, mask=torch.zeros(tokens))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_load_balancing_loss_of_one_layer_in_bf16(path):
    logits = distinct(24, 6)
    loss = lambda z: load_balancing_loss(z, 2)  # noqa: E731
    plain = lambda z: load_balancing_loss_func((z,), 6, 2)  # noqa: E731
    got, want = gradients(loss, [logits], torch.bfloat16), gradients(plain, [logits], torch.float64)
    assert errors(got, want)[0] < FP32_BOUND
    assert load_balancing_loss(torch.eye(4).repeat(3, 1) * 50, 1).item() == pytest.approx(1.0)
    assert load_balancing_loss(torch.eye(4)[:1].repeat(3, 1) * 50, 1).item() == pytest.approx(4.0)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"route: router_logits.*\(4,\)"):
        route(torch.ones(4), 1)
    with pytest.raises(ValueError, match="route: router_logits.*int64"):
        route(torch.ones(4, 2, dtype=torch.int64), 1)
    for top_k in (0, 3):
        with pytest.raises(ValueError, match=f"top_k is {top_k}"):
            route(torch.ones(4, 2), top_k)
    with pytest.raises(ValueError, match="sort_by_expert: experts.*float32"):
        sort_by_expert(torch.ones(4), 2)
    with pytest.raises(ValueError, match="expert_load: 0 experts"):
        expert_load(torch.ones(4, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="load_balancing_loss: router_logits is empty"):
        load_balancing_loss([], 2)
    with pytest.raises(ValueError, match="load_balancing_loss: mask is on meta"):
        load_balancing_loss(torch.ones(4, 2), 1, mask=torch.ones(4, device="meta"))
    with pytest.raises(ValueError, match=r"load_balancing_loss: mask.*\(3,\)"):
        load_balancing_loss(torch.ones(4, 2), 1, mask=torch.ones(3))
