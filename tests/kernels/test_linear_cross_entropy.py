import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from steep.kernels import linear_cross_entropy
from tests.kernels.conftest import use_triton
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, kernel_module


def loss_of_logits(z, labels, scale=None, smoothing=0.0, z_loss=0.0):
    """torch's cross-entropy, PaLM's z-loss and a weight per token, spelled out."""
    loss = cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    loss = loss + z_loss * torch.where(labels >= 0, z.logsumexp(1).square(), 0.0)
    return (loss if scale is None else loss * scale).sum()


def formula(labels, scale, **options):
    return lambda x, w: loss_of_logits((x @ w.T).double(), labels, scale, **options)


def eager(labels, scale, **options):
    """As transformers computes it: logits in the dtype of the model, cross-entropy in fp32."""
    return lambda x, w: loss_of_logits((x @ w.T).float(), labels, scale, **options)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(40, 16, 50), (1, 3, 2), (13, 24, 9001), (33, 33, 257)])
@pytest.mark.parametrize("scale", [None, 0.037])
def test_matches_float64(path, dtype, tokens, hidden, vocab, scale):
    labels = torch.randint(0, vocab, (tokens,))
    labels[1::5] = -100
    inputs = torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 0.5
    tensor = None if scale is None else torch.tensor(scale)

    def ours(x, w):
        # One chunk in bf16: the CPU rounds dW once per chunk, the eager comparison once.
        chunk = 16 if dtype == torch.float32 else None
        return linear_cross_entropy(x, w, labels, scale=tensor, chunk_tokens=chunk)[0]

    check(ours, formula(labels, scale), eager(labels, scale), inputs, dtype)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 1e-2), (0.3, 1e-3), (1.0, 0.0)])
@pytest.mark.parametrize("vocab", [48, 301])
def test_smoothing_z_loss_and_token_weights_match_float64(path, dtype, smoothing, z_loss, vocab):
    labels = torch.randint(0, vocab, (11,))
    labels[[0, 5, 10]] = -100
    inputs, scale = (torch.randn(11, 24), torch.randn(vocab, 24) * 0.5), torch.rand(11)
    scale[3] = 0.0

    def ours(x, w):
        return linear_cross_entropy(x, w, labels, scale=scale, label_smoothing=smoothing, z_loss=z_loss)[0]

    options = {"smoothing": smoothing, "z_loss": z_loss}
    check(ours, formula(labels, scale, **options), eager(labels, scale, **options), inputs, dtype)


def test_fp32_logits_of_bf16_operands(path):
    """Logits in fp32, dz rounded once: an order better than the bf16 logits of the unfused model in loss and nll."""
    labels = torch.randint(0, 301, (15,))
    labels[4] = -100
    x, w = torch.randn(15, 24).bfloat16(), (torch.randn(301, 24) * 0.5).bfloat16()
    nll = cross_entropy(x.double() @ w.double().T, labels, reduction="none")

    def ours(x, w):
        return linear_cross_entropy(x, w, labels, logits_dtype=torch.float32)[0]

    check(ours, formula(labels, None), eager(labels, None), (x, w), torch.bfloat16)
    loss, got = linear_cross_entropy(x, w, labels, logits_dtype=torch.float32)
    assert max(errors([got, loss], [nll, nll.sum()])) < FP32_BOUND


def test_loss_error_is_a_fraction_of_that_of_torch():
    """torch sums the loss in bf16: here its error against float64 is some hundred times ours."""
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        pytest.skip("this torch has no linear_cross_entropy")
    x, w = torch.randn(256, 64).bfloat16(), (torch.randn(2048, 64) * 0.06).bfloat16()
    labels = torch.randint(0, 2048, (256,))
    true = cross_entropy(x.double() @ w.double().T, labels)
    chunked = torch.nn.LinearCrossEntropyOptions()
    theirs = [fused(x.clone().requires_grad_(), w, labels, options=options) for options in (None, chunked)]
    ours, _ = linear_cross_entropy(x, w, labels, scale=torch.tensor(1 / 256))
    assert (ours - true).abs() <= 0.1 * min((loss.double() - true).abs() for loss in theirs)


def test_nll_per_token(path):
    x, w, labels = torch.randn(9, 8), torch.randn(20, 8), torch.randint(0, 20, (9,))
    labels[3] = 7
    loss, nll = linear_cross_entropy(x.requires_grad_(), w, labels, ignore_index=7)
    want = cross_entropy(x.double() @ w.double().T, labels, reduction="none", ignore_index=7)
    assert max(errors([nll, loss], [want, want.sum()])) < FP32_BOUND
    assert nll.dtype == loss.dtype == torch.float32
    assert nll[3] == 0
    assert not nll.requires_grad


def test_improbable_labels_have_finite_losses(path):
    """The label's own probability underflows to zero; its loss must not overflow to infinity."""
    x, w = torch.tensor([[100.0]], requires_grad=True), torch.tensor([[9.0], [-9.0]], requires_grad=True)
    loss, _ = linear_cross_entropy(x, w, torch.tensor([1]))
    loss.backward()
    assert loss == 1800.0
    assert x.grad.item() == 18.0


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_the_label_gradient_of_a_confident_row_is_rounded_once(path, logits_dtype):
    """p - 1 of a p near 1, rounded after the subtraction: the bf16 p alone would be 1 and the gradient 0."""
    x, w = torch.tensor([[1.0]]).bfloat16().requires_grad_(), torch.tensor([[8.0], [0.0], [0.0]]).bfloat16()
    linear_cross_entropy(x, w, torch.tensor([0]), logits_dtype=logits_dtype)[0].backward()
    others = 2 / (torch.tensor(8.0, dtype=torch.float64).exp() + 2)
    assert abs(x.grad.double().item() / (-8 * others.item()) - 1) < 2**-7


@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_a_label_outside_the_vocabulary_is_nan_on_a_gpu(label, monkeypatch):
    use_triton(monkeypatch)
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    loss, nll = linear_cross_entropy(x, w, torch.tensor([4, label, 49]))
    loss.backward()
    assert loss.isnan()
    assert nll.isnan().tolist() == x.grad[:, 0].isnan().tolist() == [False, True, False]


def test_a_label_outside_the_vocabulary_is_an_error_on_a_cpu():
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(50, 8), torch.tensor([4, 50, 49]))


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn_from(path, tokens):
    x, w = torch.randn(tokens, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss, nll = linear_cross_entropy(x, w, torch.full((tokens,), -100), scale=torch.tensor(0.5))
    loss.backward()
    assert loss == 0
    assert nll.shape == (tokens,)
    assert x.grad.shape == x.shape
    assert x.grad.abs().sum() == w.grad.abs().sum() == 0


@pytest.mark.parametrize("requires", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_asked_for(path, requires, monkeypatch):
    x, w = (torch.randn(n, 8, requires_grad=r) for n, r in zip((10, 30), requires))
    labels = torch.randint(0, 30, (10,))
    loss, _ = linear_cross_entropy(x, w, labels)
    assert loss.requires_grad == any(requires)
    if any(requires):
        loss.backward()
    full = [t.detach().requires_grad_() for t in (x, w)]
    linear_cross_entropy(*full, labels)[0].backward()
    for tensor, reference, required in zip((x, w), full, requires):
        assert (tensor.grad is not None) == required
        assert not required or torch.equal(tensor.grad, reference.grad)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_under_no_grad_only_the_loss_is_computed(path, smoothing, monkeypatch):
    module = kernel_module("linear_cross_entropy")
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    labels, buffer = torch.arange(10), torch.ones(30, 8)
    options = {"label_smoothing": smoothing, "z_loss": smoothing}
    want = linear_cross_entropy(x, w, labels, **options)
    for gradient in ("_weight_gradient", "_input_gradient"):
        monkeypatch.setattr(module, gradient, None)
    with torch.no_grad():
        got = linear_cross_entropy(x, w, labels, main_grad=buffer, **options)
    assert max(errors(got, want)) < FP32_BOUND
    assert torch.equal(buffer, torch.ones(30, 8))


def test_upstream_gradient_and_retained_graph(path, dtype):
    x, w = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (10, 30))
    loss, _ = linear_cross_entropy(x, w, torch.randint(0, 30, (10,)))
    single = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for _ in range(3):  # accumulating into .grad must not reach the gradients that the graph keeps
        (2 * loss).backward(retain_graph=True)
    for tensor, gradient in zip((x, w), single):
        assert max(errors([tensor.grad], [6 * gradient.double()])) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert all(torch.equal(a, b) for a, b in zip(single, torch.autograd.grad(loss, (x, w))))


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 12), st.booleans(), st.booleans())
@settings(max_examples=8, deadline=None)
def test_computing_labelled_rows_only_changes_nothing(valid, chunk, per_token, fp32_logits):
    labels = torch.where(torch.tensor(valid), torch.arange(len(valid)), -100)
    generator = torch.Generator().manual_seed(len(valid))
    x, w, weights = (torch.randn(*shape, generator=generator) for shape in ((len(valid), 8), (45, 8), (len(valid),)))
    scale = weights if per_token else weights[0].clone()
    options = {"scale": scale, "chunk_tokens": chunk, "z_loss": 1e-3}
    dtype = torch.float32
    if fp32_logits:
        dtype, options["logits_dtype"] = torch.bfloat16, torch.float32
    results = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_triton(monkeypatch)
        for num_valid in (None, sum(valid)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
            loss, nll = linear_cross_entropy(*leaves, labels, num_valid=num_valid, **options)
            results.append((loss.detach(), nll, *torch.autograd.grad(loss, leaves)))
    bound = FP32_BOUND if dtype == torch.float32 else 1e-2
    assert max(errors(results[1], results[0])) < bound
    assert torch.equal(results[1][1] == 0, labels == -100)


@pytest.mark.parametrize("num_valid", [0, 1, 6, 10, 11, 12])
def test_a_wrong_number_of_labels_never_drops_a_row_silently(num_valid, monkeypatch):
    x, w = torch.randn(12, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    labels = torch.arange(12)
    labels[::2] = -100  # six remain
    if num_valid != 6:
        with pytest.raises(ValueError, match=f"num_valid is {num_valid}, but 6"):
            linear_cross_entropy(x, w, labels, num_valid=num_valid)
    use_triton(monkeypatch)
    loss, _ = linear_cross_entropy(x, w, labels, num_valid=num_valid)
    loss.backward()
    assert loss.isnan() == x.grad.isnan().any() == (num_valid != 6)


def test_main_grad_takes_the_gradient_of_the_weight(path, dtype):
    x, w = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (20, 30))
    labels, before = torch.randint(0, 30, (20,)), torch.randn(30, 8)
    linear_cross_entropy(x, w, labels, chunk_tokens=8)[0].backward()
    want_dx, want_dw, x.grad, w.grad = x.grad, w.grad, None, None
    buffer = before.clone()
    for _ in range(2):  # two micro batches
        linear_cross_entropy(x, w, labels, chunk_tokens=8, main_grad=buffer)[0].backward()
    assert w.grad is None
    assert torch.equal(x.grad, 2 * want_dx)
    assert max(errors([buffer], [before + 2 * want_dw.double()])) < (FP32_BOUND if dtype == torch.float32 else 4e-3)


def test_main_grad_allows_no_other_upstream_gradient_than_one(path):
    x, w, buffer = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True), torch.zeros(30, 8)
    loss, _ = linear_cross_entropy(x, w, torch.arange(5), main_grad=buffer)
    (0.5 * loss).backward(retain_graph=True)
    assert x.grad.isnan().all()
    with pytest.raises(RuntimeError, match="backpropagated once"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_main_grad_refuses_to_be_recomputed(path, reentrant):
    x, w, buffer = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True), torch.zeros(30, 8)

    def head(x):
        return linear_cross_entropy(x.sin(), w, torch.arange(5), main_grad=buffer)[0]

    loss = checkpoint(head, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="backward pass"):
        loss.backward()


def test_checkpointing_without_main_grad(path):
    x, w = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)

    def head(x):
        return linear_cross_entropy(x.sin(), w, torch.arange(5), z_loss=1e-3)[0]

    want = torch.autograd.grad(head(x), (x, w))
    got = torch.autograd.grad(checkpoint(head, x, use_reentrant=False), (x, w))
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_compiles_as_one_graph_with_all_options():
    labels, scale = torch.arange(9), torch.rand(9)
    labels[3] = -100
    leaves = [torch.randn(n, 8, requires_grad=True) for n in (9, 30)]

    def head(x, w, buffer):
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "num_valid": 8, "chunk_tokens": 4}
        return linear_cross_entropy(x, w, labels, scale=scale, main_grad=buffer, **options)[0]

    results = []
    for run in (head, torch.compile(head, fullgraph=True, backend="aot_eager")):
        for buffer in (None, torch.ones(30, 8)):
            loss = run(*leaves, buffer)
            gradients = torch.autograd.grad(loss, leaves[: 2 if buffer is None else 1])
            results.append([loss.detach(), *gradients, *([] if buffer is None else [buffer])])
    assert all(torch.equal(a, b) for a, b in zip(sum(results[:2], []), sum(results[2:], [])))


def test_two_runs_are_equal(path, dtype):
    x, w, labels = torch.randn(20, 8).to(dtype), torch.randn(30, 8).to(dtype), torch.randint(0, 30, (20,))
    runs = []
    for _ in range(2):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss, nll = linear_cross_entropy(a, b, labels, chunk_tokens=8)
        loss.backward()
        runs.append((loss, nll, a.grad, b.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_chunks_are_balanced():
    size = kernel_module("linear_cross_entropy")._chunk_size
    assert size(8200, 4096, 128) == 2816  # three nearly equal chunks, not 4096 + 4096 + 8
    assert size(8192, 4096, 128) == 4096
    assert size(5, 4096, 128) == 128
    assert size(513, 512, 1) == 257


CARD = 85_000_000_000  # what torch reports of an 80 GB card
MODELS = {32768: 4096, 131072: 5120, 152064: 3584}


@pytest.mark.parametrize(("vocab", "hidden"), MODELS.items())
@pytest.mark.parametrize("tokens", [16384, 131072])
@pytest.mark.parametrize("logits_bytes", [2, 4])
@pytest.mark.parametrize("gathered", [False, True])
def test_chunks_fit_in_three_percent_of_the_card(vocab, hidden, tokens, logits_bytes, gathered):
    row_bytes = vocab * logits_bytes + (2 * hidden if gathered else 0)
    chunk, size = kernel_module("linear_cross_entropy").chunk_plan(tokens, row_bytes, CARD)
    assert size == chunk * row_bytes <= 2_600_000_000
    assert chunk % 128 == 0
    assert chunk >= 4096
    if (vocab, tokens, logits_bytes, gathered) == (152064, 16384, 2, False):
        assert (chunk, size) == (8192, 2_491_416_576)


def test_chunks_at_the_shape_of_the_target_on_larger_cards():
    """16384 x 3584 x 152064 in 2.6 GB, on an H200 too."""
    plan = kernel_module("linear_cross_entropy").chunk_plan
    assert plan(16384, 2 * 152064, 150_000_000_000) == plan(16384, 2 * 152064, CARD) == (8192, 2_491_416_576)


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operators made, now and at the most; no bytes are behind meta tensors."""

    def __init__(self):
        super().__init__()
        self.tensors: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and (storage._cdata in self.tensors or storage._cdata not in given):
                if self.tensors.setdefault(storage._cdata, 0) == 0:
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                self.tensors[storage._cdata] += 1
                weakref.finalize(t, self._release, storage._cdata, storage.nbytes())
        return result

    def _release(self, key, size):
        self.tensors[key] -= 1
        if not self.tensors[key]:
            del self.tensors[key]
            self.now -= size


@pytest.mark.parametrize(("vocab", "hidden"), MODELS.items())
@pytest.mark.parametrize("num_valid", [None, 12000])
def test_with_main_grad_the_chunk_is_all_that_is_allocated(vocab, hidden, num_valid, monkeypatch):
    """The GPU path at real size on meta tensors: beside x's gradient and the losses, one buffer of logits."""
    module = kernel_module("linear_cross_entropy")
    monkeypatch.setattr(module, "_device_memory", lambda device: CARD)
    monkeypatch.setattr(module, "_input_gradient", lambda dz, weight, out: torch.mm(dz, weight, out=out))
    monkeypatch.setattr(module, "_weight_gradient", lambda dz, x, dw, add: None)
    monkeypatch.setattr(kernel_module("cross_entropy"), "launch", lambda *args, **kwargs: None)
    x, w, buffer, labels = (
        torch.empty(*shape, dtype=dtype, device="meta")
        for shape, dtype in (
            ((16384, hidden), torch.bfloat16),
            ((vocab, hidden), torch.bfloat16),
            ((vocab, hidden), torch.float32),
            ((16384,), torch.int64),
        )
    )
    for gradients in (True, False):
        with Allocated() as allocated:
            options = (None, -100, 0.0, 0.0, torch.bfloat16, None, num_valid)
            module._lce_triton(x, w, labels, *options, buffer if gradients else None, gradients, gradients)
        small = 2 * 2**20  # losses, labels, row numbers
        row_bytes = 2 * vocab + (0 if num_valid is None else 2 * hidden)
        _, planned = module.chunk_plan(num_valid or 16384, row_bytes, CARD)
        extra = allocated.peak - (x.nbytes if gradients else 0)
        assert planned <= extra + 2 * hidden * 8192
        assert extra <= min(planned + small, 2_600_000_000)


def test_rows_beyond_2_to_the_31(tmp_path):
    """8192 x 152064 logits are 1.2e9 elements, and the bf16 view of such fp32 logits passes 2^31: here three rows of a
    sparse file, the last 2^31 elements behind the first. A 32-bit offset would wrap to memory in front of them."""
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32 + 64, dtype=torch.bfloat16)
    z = memory.as_strided((3, 50), (2**30, 1), 2**31)
    logits, labels, nll = torch.randn(3, 50).bfloat16(), torch.tensor([1, 2, 3]), torch.empty(2, 3)
    z.copy_(logits)
    kernel_module("cross_entropy").cross_entropy_triton(z, z, labels, torch.ones(()), *nll, -100, 0.0, 0.0)
    want = logits.double().requires_grad_()
    loss = cross_entropy(want, labels, reduction="none")
    loss.sum().backward()
    assert max(errors(nll, [loss, loss])) < FP32_BOUND
    assert errors([z], [want.grad])[0] < 4e-3


def test_wrong_inputs_are_named():
    x, w, labels = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(5, 3\)"):
        linear_cross_entropy(x, w[:, :3], labels)
    with pytest.raises(ValueError, match="bfloat16"):
        linear_cross_entropy(x, w.bfloat16(), labels)
    for name, value in (
        ("labels", labels.int()),
        ("scale", torch.ones(2)),
        ("scale", torch.ones((), dtype=torch.bfloat16)),
        ("scale", torch.ones((), requires_grad=True)),
        ("label_smoothing", 1.5),
        ("z_loss", -1.0),
        ("z_loss", float("nan")),
        ("chunk_tokens", 0),
        ("num_valid", 4),
        ("logits_dtype", torch.bfloat16),
        ("main_grad", torch.ones(5, 3)),
        ("main_grad", torch.ones(4, 5).T),
        ("main_grad", w.bfloat16()),
    ):
        arguments = {"labels": labels, name: value}
        with pytest.raises(ValueError, match=f"linear_cross_entropy: {name}"):
            linear_cross_entropy(x, w, **arguments)
    with pytest.raises(ValueError, match="an x that requires a gradient"):
        linear_cross_entropy(x, w.requires_grad_(), labels, main_grad=torch.ones(5, 4))
