"""The experts, and the whole block beside transformers' MixtralSparseMoeBlock."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.functional import silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from steep.kernels import (
    grouped_mm,
    grouped_weight_grad,
    moe_experts,
    moe_mlp,
    permute,
    route,
    sort_by_expert,
    unpermute,
)
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, gradients, kernel_module
from tests.kernels.offset_checks import narrow_products

T, E, H, I = 7, 4, 32, 24  # noqa: E741
ORDER = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(i)) for i in range(T)])


def configuration(top_k=2, implementation="eager"):
    config = MixtralConfig(
        hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=top_k, hidden_act="silu"
    )
    config._experts_implementation = implementation
    return config


def inputs(tokens=T, used=E):
    """x, logits (without ties; experts from `used` on never chosen), gate_up, down."""
    logits = torch.stack([ORDER[t % T] for t in range(tokens)]) * 0.75 if tokens else torch.empty(0, E)
    logits = logits + torch.where(torch.arange(E) < used, 0.0, -16.0)
    return torch.randn(tokens, H), logits, torch.randn(E, 2 * I, H) / 4, torch.randn(E, H, I) / 4


def formula(x, logits, gate_up, down, top_k=2, renormalize=True):
    """Every expert computes every token; the weights of those that were not chosen are 0."""
    p = torch.softmax(logits, 1)
    weights = p * torch.zeros_like(p).scatter(1, torch.topk(logits, top_k, 1).indices, 1.0)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, 2)
    return torch.einsum("tei,ehi,te->th", gate * torch.sigmoid(gate) * up, down, weights)


def eager(x, logits, gate_up, down, top_k=2, renormalize=True):
    """transformers' own experts behind its router's arithmetic."""
    weights, experts = torch.topk(torch.softmax(logits.float(), 1), top_k, 1)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    module = MixtralExperts(configuration(top_k))
    return functional_call(module, {"gate_up_proj": gate_up, "down_proj": down}, (x, experts, weights))


CHOICES = pytest.mark.parametrize(("top_k", "renormalize"), [(1, False), (2, True), (2, False), (E, True)])


def functions(**options):
    return (lambda *args, f=f: f(*args, **options) for f in (moe_mlp, formula, eager))


@CHOICES
def test_matches_float64(path, top_k, renormalize):
    check(*functions(top_k=top_k, renormalize=renormalize), inputs(), torch.float32)


@CHOICES
def test_bf16_is_nearer_to_float64_than_transformers(top_k, renormalize):
    """300 tokens: with a few, the router's gradient has no average error."""
    check(*functions(top_k=top_k, renormalize=renormalize), inputs(300), torch.bfloat16)


@pytest.mark.parametrize("top_k", [1, 3])
def test_bf16_is_rounded_where_the_reference_rounds(monkeypatch, top_k):
    args = inputs()
    want = gradients(lambda *a: moe_mlp(*a, top_k), args, torch.bfloat16)
    use_triton(monkeypatch)
    got = gradients(lambda *a: moe_mlp(*a, top_k), args, torch.bfloat16)
    assert max(errors(got, want)) < 1e-4  # one flipped rounding in a thousand


@pytest.mark.parametrize(("tokens", "used"), [(T, 2), (T, 1), (0, E), (1, E)])
def test_experts_without_tokens_and_no_tokens_at_all(path, tokens, used):
    top_k = min(used, 2)
    args = inputs(tokens, used)
    got = gradients(lambda *a: moe_mlp(*a, top_k), args, torch.float32)
    want = gradients(lambda *a: formula(*a, top_k), args, torch.float64)
    assert max(errors(got, want)) < FP32_BOUND
    assert not got[3][used:].any()
    assert not got[4][used:].any()


def test_matches_transformers_block(path):
    block = MixtralSparseMoeBlock(configuration())
    gate, gate_up, down = block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj
    for parameter in (gate, gate_up, down):
        torch.nn.init.normal_(parameter, std=0.3)
    leaves = [torch.randn(1, 9, H, requires_grad=True), gate, gate_up, down]
    dout = torch.randn(1, 9, H)
    theirs = block(leaves[0])
    rows = leaves[0].view(-1, H)
    ours = moe_mlp(rows, rows @ gate.T, gate_up, down, 2).view_as(theirs)
    want = [theirs, *torch.autograd.grad(theirs, leaves, dout)]
    got = [ours, *torch.autograd.grad(ours, leaves, dout)]
    assert max(errors(got, want)) < 1e-5


def test_serves_as_transformers_experts(path):
    """`moe_experts` on what transformers' router hands to its experts: int64 ids, its grouped_mm path the peer."""
    x, logits, gate_up, down = inputs()
    weights, experts = torch.topk(torch.softmax(logits, 1), 2, 1)
    module = MixtralExperts(configuration(implementation="grouped_mm"))
    want = functional_call(module, {"gate_up_proj": gate_up, "down_proj": down}, (x, experts, weights))
    assert errors([moe_experts(x, weights, experts, gate_up, down)], [want])[0] < FP32_BOUND


def test_experts_of_another_rank_contribute_nothing(path):
    x, _, gate_up, down = inputs()
    experts = ORDER[:, :3] - 1  # -1 is nobody, and so is E + 7
    experts = torch.where(experts == E - 2, E + 7, experts)
    mine = (experts >= 0) & (experts < E)

    def plain(x, weights, gate_up, down):
        gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, 2)
        y = torch.einsum("tei,ehi->teh", silu(gate) * up, down)
        chosen = experts.clamp(0, E - 1).unsqueeze(2).expand(-1, -1, H)
        return (y.gather(1, chosen) * (weights * mine).unsqueeze(2)).sum(1)

    args = x, torch.rand(T, 3), gate_up, down
    got = gradients(lambda x, w, g, d: moe_experts(x, w, experts, g, d), args, torch.float32)
    want = gradients(plain, args, torch.float64)
    assert max(errors(got, want)) < FP32_BOUND
    assert not got[2][~mine].any()


def test_two_runs_are_equal_and_the_graph_can_be_walked_twice(path, dtype):
    args = inputs(tokens=3)
    runs = [gradients(lambda *a: moe_mlp(*a, 2), args, dtype) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    leaves = [t.to(dtype).requires_grad_() for t in args]
    out = moe_mlp(*leaves, 2)
    expanded = torch.ones((), dtype=dtype).expand(out.shape)
    once = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
    again = torch.autograd.grad(out, leaves, expanded.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(once, again))


def test_recomputation_saves_no_gate_and_up_and_changes_no_bit(path, dtype):
    x, logits, gate_up, down = inputs()
    args = x, torch.rand(T, 2), gate_up, down

    def run(recompute):
        shapes = []
        with saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            results = gradients(
                lambda x, weights, *w: moe_experts(x, weights, ORDER[:, :2], *w, recompute=recompute), args, dtype
            )
        return results, shapes.count((2 * T, 2 * I))

    (plain, kept), (recomputing, kept_recomputing) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputing))
    assert (kept, kept_recomputing) == (1, 0)


@pytest.mark.parametrize("index", range(4))
def test_only_the_gradient_that_is_needed(path, index):
    args = inputs(tokens=3)
    want = gradients(lambda *a: moe_mlp(*a, 2), args, torch.float32)[1 + index]
    leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate(args)]
    out = moe_mlp(*leaves, 2)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().float())
    assert torch.equal(leaves[index].grad, want)
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != index)


def test_checkpointed_and_strided(path):
    args = list(inputs())
    args[0] = torch.randn(T, 2 * H)[:, ::2]
    args[2] = torch.randn(E, H, 2 * I).transpose(1, 2)
    for leaf in args:
        leaf.requires_grad_()
    plain = moe_mlp(*args, 2)
    again = torch.utils.checkpoint.checkpoint(moe_mlp, *args, 2, use_reentrant=False)
    assert torch.equal(plain, again)
    for a, b in zip(torch.autograd.grad(plain.sum(), args), torch.autograd.grad(again.sum(), args)):
        assert torch.equal(a, b)


def test_permute_and_unpermute_match_float64(path, dtype):
    inverse = sort_by_expert(ORDER[:, :3], E)[2]
    rows = torch.empty(3 * T, dtype=torch.long)
    rows[inverse.long().flatten()] = torch.arange(3 * T) // 3

    def there_and_back(x, y, weights):
        return permute(x, inverse), unpermute(y, weights.to(torch.promote_types(y.dtype, torch.float32)), inverse)

    def plain(x, y, weights):
        weights = weights.to(torch.promote_types(y.dtype, torch.float32))
        return x[rows], torch.einsum("tkh,tk->th", y[inverse.long()].to(weights.dtype), weights).to(y.dtype)

    args = torch.randn(T, 1030), torch.randn(3 * T, 1030), torch.rand(T, 3)
    check(there_and_back, plain, plain, args, dtype)


def test_no_offset_wraps_around():
    module = kernel_module("moe")
    x, y, gate_up = (torch.empty(sizes, device="meta") for sizes in ((9, H), (18, H), (18, 2 * H)))
    inverse, weights = torch.empty(9, 2, dtype=torch.int32, device="meta"), torch.empty(9, 2, device="meta")
    for call in (
        (module._permute_triton, x, inverse),
        (module._unpermute_triton, y, weights, inverse),
        (module._unpermute_backward_triton, x, y, weights, inverse),
        (module._weighted_swiglu_backward_triton, y, gate_up, weights, inverse.view(-1)),
    ):
        assert narrow_products("moe", *call) == []


def test_rows_far_apart_are_addressed_in_int64():
    """Three rows 2^30 elements apart; of the 2 GiB in between no page is touched."""
    x = torch.empty(2**31 + 4, dtype=torch.int8).as_strided((3, 4), (2**30, 1))
    x.copy_(torch.arange(12).view(3, 4))
    got = kernel_module("moe")._permute_triton(x, torch.tensor([[1], [0], [2]], dtype=torch.int32))
    assert got.tolist() == [[4, 5, 6, 7], [0, 1, 2, 3], [8, 9, 10, 11]]


def test_compiles_as_one_graph_with_the_same_numbers():
    leaves = [t.requires_grad_() for t in inputs()]
    eager_out = moe_mlp(*leaves, 2)
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")(*leaves, 2)
    assert torch.equal(eager_out, compiled)
    for want, got in zip(torch.autograd.grad(eager_out.sum(), leaves), torch.autograd.grad(compiled.sum(), leaves)):
        assert torch.equal(want, got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4)}, r"x.*\(4,\)"),
        ({"x": torch.ones(4, 8, dtype=torch.int32)}, "x is torch.int32"),
        ({"gate_up": torch.ones(3, 7, 8)}, r"gate_up.*\(3, 7, 8\)"),
        ({"gate_up": torch.ones(3, 6, 9)}, r"gate_up.*\(3, 6, 9\)"),
        ({"down": torch.ones(3, 8, 4)}, r"down.*\(3, 8, 4\)"),
        ({"down": torch.ones(3, 8, 3).bfloat16()}, "down.*bfloat16"),
        ({"weights": torch.ones(5, 2)}, r"weights.*\(5, 2\)"),
        ({"weights": torch.ones(4, 2, dtype=torch.int32)}, "weights.*int32"),
        ({"experts": torch.ones(4, 3, dtype=torch.int32)}, r"experts.*\(4, 3\)"),
        ({"experts": torch.ones(4, 2)}, "experts.*float32"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {
        "x": torch.ones(4, 8),
        "weights": torch.ones(4, 2),
        "experts": torch.zeros(4, 2, dtype=torch.int32),
        "gate_up": torch.ones(3, 6, 8),
        "down": torch.ones(3, 8, 3),
    }
    with pytest.raises(ValueError, match="moe_experts: " + message):
        moe_experts(**good | change)


def test_fp64_is_refused_on_a_gpu():
    with FakeTensorMode():
        shapes = (4, 8), (4, 2), (3, 6, 8), (3, 8, 3)
        x, weights, gate_up, down = (torch.zeros(shape, dtype=torch.float64, device="cuda") for shape in shapes)
        shapes = (4, 2), (2, 2), (3,)
        experts, inverse, offsets = (torch.zeros(shape, dtype=torch.int32, device="cuda") for shape in shapes)
        for function, args in (
            (moe_experts, (x, weights, experts, gate_up, down)),
            (unpermute, (x, weights, inverse)),
            (route, (x, 2)),
            (grouped_mm, (x, gate_up, offsets)),
            (grouped_weight_grad, (x, x, offsets)),
        ):
            with pytest.raises(ValueError, match=f"{function.__name__}: .* is torch.float64; allowed: "):
                function(*args)


def test_wrong_logits_and_order_are_named():
    for x, gate_up in ((torch.ones(()), torch.ones(3, 6, 8)), (torch.ones(4, 8), torch.ones(()))):
        with pytest.raises(ValueError, match=r"moe_mlp: (x|gate_up) has shape \(\)"):
            moe_mlp(x, torch.ones(4, 3), gate_up, torch.ones(3, 8, 3), 1)
    with pytest.raises(ValueError, match=r"router_logits.*\(4, 2\)"):
        moe_mlp(torch.ones(4, 8), torch.ones(4, 2), torch.ones(3, 6, 8), torch.ones(3, 8, 3), 1)
    with pytest.raises(ValueError, match="inverse.*int64"):
        permute(torch.ones(4, 8), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"permute: inverse.*\(3, 2\)"):
        permute(torch.ones(4, 8), torch.zeros(3, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"unpermute: y.*\(7, 8\)"):
        unpermute(torch.ones(7, 8), torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int32))
