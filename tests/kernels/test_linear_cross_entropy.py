import pytest
import torch
from torch.nn.functional import cross_entropy

from steep.kernels import linear_cross_entropy
from tests.kernels.kernel_checks import FP32_BOUND, check, errors, kernel_module


def formula(labels, scale):
    return lambda x, w: cross_entropy((x @ w.T).double(), labels, reduction="sum") * (1.0 if scale is None else scale)


def eager(labels, scale):
    """As transformers computes it: logits in the dtype of the model, cross-entropy in fp32."""
    return lambda x, w: cross_entropy((x @ w.T).float(), labels, reduction="sum") * (1.0 if scale is None else scale)


@pytest.mark.parametrize(("tokens", "hidden", "vocab"), [(70, 16, 50), (1, 3, 2), (37, 24, 9001), (130, 33, 257)])
@pytest.mark.parametrize("scale", [None, 0.037])
def test_matches_float64(path, dtype, tokens, hidden, vocab, scale):
    labels = torch.randint(0, vocab, (tokens,))
    labels[1::5] = -100
    inputs = torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 0.5
    tensor = None if scale is None else torch.tensor(scale)

    def ours(x, w):
        # One chunk in bf16: the CPU rounds dW once per chunk, the eager comparison once.
        chunk = 32 if dtype == torch.float32 else None
        return linear_cross_entropy(x, w, labels, scale=tensor, chunk_tokens=chunk)[0]

    check(ours, formula(labels, scale), eager(labels, scale), inputs, dtype)


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


def test_under_no_grad_only_the_loss_is_computed(monkeypatch):
    module = kernel_module("linear_cross_entropy")
    monkeypatch.setattr(module, "_accumulate", None)
    x, w = torch.randn(10, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(x, w, torch.zeros(10, dtype=torch.long))
    assert loss.isfinite()


def test_upstream_gradient_and_retained_graph(path, dtype):
    x, w = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (10, 30))
    loss, _ = linear_cross_entropy(x, w, torch.randint(0, 30, (10,)))
    single = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for _ in range(3):  # accumulating into .grad must not reach the gradients that the graph keeps
        (2 * loss).backward(retain_graph=True)
    for tensor, gradient in zip((x, w), single):
        assert max(errors([tensor.grad], [6 * gradient.double()])) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert all(torch.equal(a, b) for a, b in zip(single, torch.autograd.grad(loss, (x, w))))


def test_two_runs_are_equal(path, dtype):
    x, w, labels = torch.randn(150, 8).to(dtype), torch.randn(30, 8).to(dtype), torch.randint(0, 30, (150,))
    runs = []
    for _ in range(2):
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss, nll = linear_cross_entropy(a, b, labels, chunk_tokens=64)
        loss.backward()
        runs.append((loss, nll, a.grad, b.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_chunks_are_balanced():
    size = kernel_module("linear_cross_entropy")._chunk_size
    assert size(8200, 4096, 128) == 2816  # three nearly equal chunks, not 4096 + 4096 + 8
    assert size(8192, 4096, 128) == 4096
    assert size(5, 4096, 128) == 128
    assert size(513, 512, 1) == 257


def test_wrong_inputs_are_named():
    x, w, labels = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(5, 3\)"):
        linear_cross_entropy(x, w[:, :3], labels)
    with pytest.raises(ValueError, match="bfloat16"):
        linear_cross_entropy(x, w.bfloat16(), labels)
