import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from steep.kernels import add_rms_norm, linear, rms_norm, rms_norm_linear, swiglu, swiglu_linear
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import gradients, kernel_module

T, H, N, EPS = 7, 40, 24, 1e-5


def fused_norm(x, norm_weight, weight, bias, *, exact_hf=False):
    return rms_norm_linear(x, norm_weight, weight, bias, eps=EPS, exact_hf=exact_hf)


def unfused_norm(x, norm_weight, weight, bias, *, exact_hf=False):
    return linear(rms_norm(x, norm_weight, EPS, exact_hf=exact_hf), weight, bias)


def fused_residual(x, residual, norm_weight, weight, *, exact_hf=False):
    return rms_norm_linear(x, norm_weight, weight, eps=EPS, residual=residual, exact_hf=exact_hf)


def fused_sum(x, residual, norm_weight, weight, *, exact_hf=False):
    return rms_norm_linear(x + residual, norm_weight, weight, eps=EPS, exact_hf=exact_hf, return_sum=True)


def unfused_residual(x, residual, norm_weight, weight, *, exact_hf=False):
    y, s = add_rms_norm(x, residual, norm_weight, EPS, exact_hf=exact_hf)
    return linear(y, weight), s


def unfused_swiglu(gate_up, weight, bias, *, exact_hf=False):
    return linear(swiglu(gate_up, exact_hf=exact_hf), weight, bias)


# name: (fused, the same from its parts, shapes of the arguments)
LAYERS = {
    "norm": (fused_norm, unfused_norm, ((T, H), (H,), (N, H), (N,))),
    "residual": (fused_residual, unfused_residual, ((T, H), (T, H), (H,), (N, H))),
    "sum": (fused_sum, unfused_residual, ((T, H), (T, H), (H,), (N, H))),
    "swiglu": (swiglu_linear, unfused_swiglu, ((T, 2 * H), (N, H), (N,))),
}
# What a layer makes for the product and does not keep.
NOT_SAVED = {
    "norm": lambda x, norm_weight, *_: rms_norm(x, norm_weight, EPS),
    "residual": lambda x, residual, norm_weight, _: add_rms_norm(x, residual, norm_weight, EPS)[0],
    "sum": lambda x, residual, norm_weight, _: add_rms_norm(x, residual, norm_weight, EPS)[0],
    "swiglu": lambda gate_up, *_: swiglu(gate_up),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


def random(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("exact_hf", [False, True])
def test_equals_its_parts_bit_for_bit(path, dtype, layer, exact_hf):
    fused, unfused, shapes = layer
    inputs = random(shapes)
    got = gradients(lambda *args: fused(*args, exact_hf=exact_hf), inputs, dtype)
    want = gradients(lambda *args: unfused(*args, exact_hf=exact_hf), inputs, dtype)
    assert len(got) == len(want)
    assert all(g.dtype == w.dtype and torch.equal(g, w) for g, w in zip(got, want))


@pytest.mark.parametrize("shape", [(0, 8), (9, 40), (4, 2100)])
def test_what_backward_writes_again_is_what_forward_wrote(path, dtype, shape):
    """The premise of this file, over tiles with tails and rows of several pieces."""
    x, residual, gate_up = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.randn(shape[1]).to(dtype)
    norm, activation = kernel_module("rms_norm"), kernel_module("swiglu")
    for exact_hf in (False, True):
        for r in (None, residual):
            y, s, rstd = norm.norm_forward(x, r, weight, EPS, exact_hf)
            dy = torch.randn(shape).to(dtype)
            plain = norm.norm_backward(dy, r, s, weight, rstd, exact_hf, recompute=False)
            recomputing = norm.norm_backward(dy, r, s, weight, rstd, exact_hf, recompute=True)
            assert torch.equal(dy, y)
            assert all(torch.equal(a, b) for a, b in zip(plain, recomputing))
        h = activation.swiglu_forward(gate_up, exact_hf)
        dh = torch.randn(h.shape).to(dtype)
        plain = activation.swiglu_backward(dh, gate_up, exact_hf, recompute=False)
        recomputing = activation.swiglu_backward(dh, gate_up, exact_hf, recompute=True)
        assert torch.equal(dh, h)
        assert torch.equal(plain, recomputing)


@pytest.mark.parametrize("name", LAYERS)
def test_the_input_of_the_product_is_not_saved(path, name):
    fused, unfused, shapes = LAYERS[name]
    inputs = random(shapes)
    hidden = NOT_SAVED[name](*inputs).detach()

    def saved(function):
        tensors = []
        with saved_tensors_hooks(lambda t: tensors.append(t.detach()) or t, lambda t: t):
            function(*inputs)
        return tensors

    def holds(tensors):
        return any(t.shape == hidden.shape and torch.equal(t, hidden) for t in tensors)

    assert holds(saved(unfused))
    tensors = saved(fused)
    assert not holds(tensors)
    # Of the size of the rows only one is kept: the sum, the input or gate_up.
    assert sum(t.shape[0] == T and t.numel() > T for t in tensors if t.ndim) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_every_subset_of_gradients(path, name):
    fused, unfused, shapes = LAYERS[name]
    for wanted in range(1, 2 ** len(shapes)):
        results = []
        for function in (fused, unfused):
            inputs = random(shapes)
            for index, x in enumerate(inputs):
                x.requires_grad_(bool(wanted >> index & 1))
            out = function(*inputs)
            sum((o.float() ** 2).sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
            results.append([x.grad for x in inputs])
        for got, want in zip(*results):
            assert (got is None) == (want is None)
            assert got is None or torch.equal(got, want)


@pytest.mark.parametrize(
    ("name", "frozen", "operator"), [("residual", 3, "rms_norm_backward"), ("swiglu", 1, "swiglu_backward")]
)
def test_nothing_is_recomputed_for_a_frozen_matrix(monkeypatch, name, frozen, operator):
    fused, _, shapes = LAYERS[name]
    module = kernel_module("rms_norm" if name == "residual" else "swiglu")
    monkeypatch.setattr(module, f"_{operator}_recompute_op", None)
    inputs = random(shapes)
    inputs[frozen].requires_grad_(False)
    out = fused(*inputs)
    (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert inputs[0].grad is not None
    trained = random(shapes)
    out = fused(*trained)
    with pytest.raises(TypeError):
        (out[0] if isinstance(out, tuple) else out).sum().backward()


def test_gradient_of_one_result_alone(path):
    for index in (0, 1):
        inputs, others = random(LAYERS["residual"][2]), random(LAYERS["residual"][2])
        fused_residual(*inputs)[index].sum().backward()
        unfused_residual(*others)[index].sum().backward()
        for got, want in zip(inputs, others):
            assert torch.equal(
                torch.zeros_like(got) if got.grad is None else got.grad,
                torch.zeros_like(want) if want.grad is None else want.grad,
            )


def test_expanded_gradient_strided_rows_and_retained_graph(path, dtype, layer):
    fused, unfused, shapes = layer
    wide = torch.randn(T, 2 * shapes[0][1] + 3).to(dtype).requires_grad_()
    rest = random(shapes[1:], dtype)
    results = []
    for function in (fused, unfused):
        out = function(wide[:, 3 : 3 + shapes[0][1]], *rest)
        out = out[0] if isinstance(out, tuple) else out
        cotangent = torch.ones((), dtype=dtype).expand(out.shape)
        first = torch.autograd.grad(out, (wide, *rest), cotangent, retain_graph=True)
        second = torch.autograd.grad(out, (wide, *rest), cotangent)
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        results.append(first)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_checkpointing_gives_the_same_gradients(dtype, layer):
    fused, _, shapes = layer
    want = gradients(fused, random(shapes), dtype)
    got = gradients(lambda *args: checkpoint(fused, *args, use_reentrant=False), random(shapes), dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_compiles_as_one_graph_with_the_same_gradients(layer):
    fused, _, shapes = layer
    want = gradients(fused, random(shapes), torch.float32)
    got = gradients(torch.compile(fused, fullgraph=True, backend="aot_eager"), random(shapes), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("trained", [True, False])
def test_autocast_changes_nothing(layer, precision, trained):
    """The product is one of the operands given; autocast would compute it in another dtype than its backward."""
    fused, _, shapes = layer
    results = []
    for enabled in (False, True):
        inputs = random(shapes, precision)
        for x in inputs[:-2]:
            x.requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = fused(*inputs)
            out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs if x.requires_grad)])
    assert all(a.dtype == b.dtype == precision and torch.equal(a, b) for a, b in zip(*results))


def test_no_tokens(path, layer):
    fused, _, shapes = layer
    inputs = random([(0, *shape[1:]) if shape[0] == T else shape for shape in shapes])
    out, *grads = gradients(fused, inputs, torch.float32)
    assert out.shape == (0, N)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads[-len(inputs) :], inputs))


def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 8), torch.ones(3, 8)
    for match, call in {
        "rms_norm_linear: x has": lambda: rms_norm_linear(x[None], x[0], weight, eps=EPS),
        "rms_norm_linear: norm_weight has": lambda: rms_norm_linear(x, x[0, :3], weight, eps=EPS),
        r"rms_norm_linear: weight has .*\(\*, 8\)": lambda: rms_norm_linear(x, x[0], weight.t(), eps=EPS),
        "rms_norm_linear: weight is torch.bfloat16": lambda: rms_norm_linear(x, x[0], weight.bfloat16(), eps=EPS),
        "rms_norm_linear: bias has": lambda: rms_norm_linear(x, x[0], weight, x[0], eps=EPS),
        "rms_norm_linear: residual is": lambda: rms_norm_linear(x, x[0], weight, eps=EPS, residual=x.bfloat16()),
        "swiglu_linear: gate_up has": lambda: swiglu_linear(x[:, :7], weight),
        r"swiglu_linear: weight has .*\(\*, 4\)": lambda: swiglu_linear(x, weight),
        "swiglu_linear: weight is on meta": lambda: swiglu_linear(x, torch.ones(3, 4, device="meta")),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


def test_interpreted_operators_are_the_ones_that_the_layers_call(monkeypatch):
    """`path` would test nothing here if this file held operators of its own."""
    use_triton(monkeypatch)
    calls = []
    module = kernel_module("swiglu")
    monkeypatch.setattr(module, "launch", lambda fn, *args, **_: calls.append(fn.fn.__name__))
    swiglu_linear(torch.ones(2, 8), torch.ones(3, 4))
    assert calls == ["_forward_kernel"]
