"""FusedLMHead: the same numbers as the function, the names of nn.Linear, and the weight gathered by FSDP2."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from steep.kernels import FusedLMHead, linear_cross_entropy
from tests.kernels.kernel_checks import errors
from tests.processes import run_ranks

T, H, V = 24, 16, 50


class Model(nn.Module):
    """Embedding, one layer, head: what fully_shard wraps."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.lm_head = FusedLMHead.of(self.embedding.weight) if tied else FusedLMHead(H, V)

    def forward(self, tokens, labels):
        return self.lm_head(self.layer(self.embedding(tokens)).tanh(), labels, scale=torch.tensor(1 / T))[0]


def batch():
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, V, (T,), generator=generator)
    labels[::7] = -100
    return torch.randint(0, V, (T,), generator=generator), labels


def step(tied):
    """Loss and gradients of the whole batch in one process."""
    model = Model(tied)
    loss = model(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def fsdp_rank(rank, folder):
    """One of two ranks: its half of the batch; rank 0 writes down the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for tied in (False, True):
        model = Model(tied)
        if not tied:
            fully_shard(model.lm_head)
            register_fsdp_forward_method(model.lm_head, "logits")
        fully_shard(model)
        loss = model(*(t.chunk(2)[rank] for t in batch()))
        loss.backward()
        dist.all_reduce(total := loss.detach().clone())
        # FSDP averages over the ranks; the loss is a sum over the batch.
        gradients = {name: 2 * p.grad.full_tensor() for name, p in model.named_parameters()}
        results[tied] = total, gradients
        if not tied:
            results["logits"] = model.lm_head.logits(torch.ones(2, 3, H)).detach()
            model.lm_head.reshard()
            try:
                linear_cross_entropy(torch.ones(T, H), model.lm_head.weight, batch()[1])
            except ValueError as error:
                results["outside"] = str(error)
    for cast in (True, False):
        head = FusedLMHead(H, V)
        fully_shard(head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=cast))
        try:
            loss, _ = head(torch.ones(T, H).bfloat16(), batch()[1], scale=torch.tensor(1 / T))
            results["cast", cast] = loss.dtype
        except ValueError as error:
            results["cast", cast] = str(error)
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.destroy_process_group()


def test_fsdp2_on_two_ranks_equals_one_process(tmp_path):
    run_ranks(fsdp_rank, 2, str(tmp_path))
    results = torch.load(tmp_path / "results")
    for tied in (False, True):
        loss, gradients = step(tied)
        got_loss, got = results[tied]
        assert got.keys() == gradients.keys()
        assert max(errors([got_loss, *got.values()], [loss, *gradients.values()])) < 1e-6
    torch.testing.assert_close(results["logits"], Model(False).lm_head.logits(torch.ones(2, 3, H)))
    assert "FusedLMHead" in results["outside"]
    assert "scale is torch.bfloat16" in results["cast", True]
    assert results["cast", False] == torch.float32


def test_is_the_function(path):
    head, labels = FusedLMHead(H, V), batch()[1]
    x = torch.randn(T, H, requires_grad=True)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    got = torch.autograd.grad(head(x, labels, **options)[0], (x, head.weight))
    want = torch.autograd.grad(linear_cross_entropy(x, head.weight, labels, **options)[0], (x, head.weight))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("shape", [(5, H), (2, 3, H), (H,), (0, H)])
def test_logits_are_those_of_the_linear_layer_it_replaces(shape, dtype):
    linear = nn.Linear(H, V, bias=False, dtype=dtype)
    head = FusedLMHead(H, V, dtype=dtype)
    head.load_state_dict(linear.state_dict())
    x = torch.randn(shape).to(dtype)
    torch.testing.assert_close(head.logits(x), linear(x))
    assert head.state_dict().keys() == {"weight"}


def test_initialised_as_a_linear_layer():
    torch.manual_seed(3)
    linear = nn.Linear(H, V, bias=False)
    torch.manual_seed(3)
    assert torch.allclose(FusedLMHead(H, V).weight, linear.weight)
    head = FusedLMHead(H, V, device="meta").to_empty(device="cpu")
    head.reset_parameters()
    assert 0 < head.weight.abs().max() <= H**-0.5


def test_tied_weight_is_shared_and_gets_both_gradients():
    model = Model(tied=True)
    assert model.lm_head.weight is model.embedding.weight
    loss = model(*batch())
    loss.backward()
    embedded = Model(tied=False)
    with torch.no_grad():
        embedded.lm_head.weight.copy_(embedded.embedding.weight)
    embedded(*batch()).backward()
    want = embedded.embedding.weight.grad + embedded.lm_head.weight.grad
    assert errors([model.embedding.weight.grad], [want])[0] < 1e-6


def test_only_a_parameter_can_be_shared():
    with pytest.raises(ValueError, match="Tensor; expected an nn.Parameter"):
        FusedLMHead.of(torch.ones(V, H))
    with pytest.raises(ValueError, match="expected an nn.Parameter"):
        FusedLMHead.of(nn.Parameter(torch.ones(V)))
