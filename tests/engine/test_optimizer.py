"""AdamW: equal to torch's, bf16 equal to an fp32 master bit for bit, skip by selection, clipping."""

import pytest
import torch
from torch import Tensor

from steep.engine import optimizer as optimizer_module
from steep.engine.optimizer import AdamW, AdamWConfig
from tests.kernels.master_weights import join_master


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"matrix": (33, 17), "other": (64, 8), "norm": (17,)}
    values = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {name: torch.nn.Parameter(value) for name, value in values.items()}


def give_gradients(params: dict[str, Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params.values():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype)


def test_equals_torch_adamw_with_clipping():
    ours, theirs = parameters(), parameters()
    config = AdamWConfig(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)
    optimizer = AdamW(ours.items(), config)
    groups = [
        {"params": [theirs["matrix"], theirs["other"]], "weight_decay": 0.1},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    for step in range(6):
        lr = 1e-2 * (step + 1)
        scale = 1.0 if step % 2 else 1e-3  # beyond and within the limit
        give_gradients(ours, step, scale)
        give_gradients(theirs, step, scale)
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.step()
        grad_norm, skipped = optimizer.step(lr)
        torch.testing.assert_close(grad_norm, norm)
        assert skipped.item() == 0
        assert all(p.grad is None for p in ours.values())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_decay_vectors_is_opt_in():
    for decay_vectors in (False, True):
        params = parameters()
        before = params["norm"].detach().clone()
        optimizer = AdamW(params.items(), AdamWConfig(weight_decay=0.5, decay_vectors=decay_vectors))
        for parameter in params.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step(0.1)
        torch.testing.assert_close(params["norm"].detach(), before * (0.95 if decay_vectors else 1.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nonfinite_gradient_changes_no_bit(dtype, bad):
    params = parameters(dtype)
    optimizer = AdamW(params.items(), AdamWConfig())
    give_gradients(params, 0)
    optimizer.step(1e-2)
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    weights = {name: tensor.detach().clone() for name, tensor in params.items()}

    give_gradients(params, 1)
    params["other"].grad[3, 3] = bad
    grad_norm, skipped = optimizer.step(1e-2)
    assert skipped.item() == 1
    assert not torch.isfinite(grad_norm)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state_dict().items())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in params.items())
    assert all(p.grad is None for p in params.values())

    # and the next step is what it would have been without the bad one
    give_gradients(params, 2)
    optimizer.step(1e-2)
    clean = parameters(dtype)
    reference = AdamW(clean.items(), AdamWConfig())
    for step in (0, 2):
        give_gradients(clean, step)
        reference.step(1e-2)
    assert all(torch.equal(params[name], clean[name]) for name in params)
    assert optimizer.step_count.item() == 2


def test_bf16_with_remainder_is_fp32_adamw_bit_for_bit():
    split = parameters(torch.bfloat16)
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in split.items()}
    config = AdamWConfig(weight_decay=0.1, max_grad_norm=0.5, moments="float32")
    ours, reference = AdamW(split.items(), config), AdamW(masters.items(), config)
    for step in range(20):
        give_gradients(split, step)
        for name, parameter in masters.items():
            parameter.grad = split[name].grad.float()
        ours.step(1e-4)  # far below the spacing of bf16 numbers near 1
        reference.step(1e-4)
        for name, master in masters.items():
            assert torch.equal(join_master(split[name], ours.states[name].tensors["remainder"]), master)
    for name in split:
        assert torch.equal(ours.state_dict()[f"exp_avg.{name}"], reference.state_dict()[f"exp_avg.{name}"])
        error = (split[name].float() - masters[name]).abs()
        nearest = (masters[name].to(torch.bfloat16).float() - masters[name]).abs()
        assert torch.equal(error, nearest)


def test_fp32_gradients_of_bf16_parameters():
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params.items(), AdamWConfig(), accumulate_in_fp32=True)
    for weight in (2.5, 1.0 / 512):  # the second vanishes beside the first in bf16
        sum((parameter * weight).sum() for parameter in params.values()).backward()
    assert params["norm"].grad.dtype == torch.float32
    assert params["norm"].grad[0].item() == 2.5 + 1.0 / 512
    optimizer.step(1e-3)


def test_mixed_dtypes_are_refused():
    params = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
    with pytest.raises(ValueError, match=r"all float32 or all bfloat16, found .*bfloat16.*float32"):
        AdamW(params.items(), AdamWConfig())
    with pytest.raises(ValueError, match="float16"):
        AdamW([("a", torch.nn.Parameter(torch.zeros(2, dtype=torch.float16)))], AdamWConfig())


WIDE = {"embedding": (5, 256), "down": (3, 512), "odd": (7, 33), "norm": (256,)}


def wide_parameters() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for name, shape in WIDE.items()
    }


def test_storage_is_what_the_configuration_says():
    optimizer = AdamW(wide_parameters().items(), AdamWConfig(moments="8bit"))
    assert {name: each.tensors["exp_avg"].dtype for name, each in optimizer.states.items()} == {
        "embedding": torch.uint8, "down": torch.uint8, "odd": torch.bfloat16, "norm": torch.bfloat16,
    }  # fmt: skip
    for options in ({}, {"moments": "float32"}, {"moments": "8bit"}, {"master": "none", "moments": "8bit"}):
        config = AdamWConfig(**options)
        for name, each in AdamW(wide_parameters().items(), config).states.items():
            stored = sum(tensor.nbytes for tensor in each.tensors.values())
            assert stored == config.state_bytes(torch.bfloat16, WIDE[name]) * each.parameter.numel(), (name, config)
    assert AdamWConfig().state_bytes(torch.bfloat16, (4, 256)) == 6  # and 2 each for weight and gradient: 10
    assert AdamWConfig(moments="8bit").state_bytes(torch.bfloat16, (4, 256)) == pytest.approx(4.03, abs=0.01)


@pytest.mark.parametrize("moments", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("master", ["remainder", "none"])
def test_compact_storage_follows_fp32(master, moments):
    """A hundred steps towards a target: what is stored in fewer bits arrives where fp32 does."""
    config = AdamWConfig(master=master, moments=moments, weight_decay=0.0)
    compact, exact = wide_parameters(), {name: torch.nn.Parameter(p.float()) for name, p in wide_parameters().items()}
    optimizers = [AdamW(compact.items(), config), AdamW(exact.items(), AdamWConfig(weight_decay=0.0))]
    for _ in range(100):
        for params, optimizer in zip((compact, exact), optimizers):
            for parameter in params.values():
                parameter.grad = parameter.detach() - 1.0
            optimizer.step(1e-2)
    for name in compact:
        start = (wide_parameters()[name].float() - 1.0).abs().mean()
        assert (compact[name].float() - exact[name]).abs().mean() < 0.03 * start


def test_buckets_of_offloaded_state_change_nothing(monkeypatch):
    monkeypatch.setattr(optimizer_module, "BUCKET_BYTES", 4000)
    plain, offloaded = wide_parameters(), wide_parameters()
    optimizers = [AdamW(plain.items(), AdamWConfig()), AdamW(offloaded.items(), AdamWConfig(offload=True))]
    assert len(list(optimizers[1]._buckets(list(WIDE)))) > 2
    for step in range(3):
        for params, optimizer in zip((plain, offloaded), optimizers):
            give_gradients(params, step)
            optimizer.step(1e-2)
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)


def test_updates_in_backward_are_those_of_a_step():
    plain, eager = wide_parameters(), wide_parameters()
    config = AdamWConfig(max_grad_norm=None)
    after, during = AdamW(plain.items(), config), AdamW(eager.items(), config.model_copy(update={"in_backward": True}))
    for step in range(3):
        norms = []
        for params, optimizer in ((plain, after), (eager, during)):
            optimizer.begin(1e-2)
            sum((parameter.float() ** 2).sum() * (step + 1) for parameter in params.values()).backward()
            held = [name for name, parameter in params.items() if parameter.grad is not None]
            assert held == ([] if optimizer is during else list(params))
            norms.append(optimizer.step(1e-2))
        torch.testing.assert_close(norms[0], norms[1])
    assert all(torch.equal(plain[name], eager[name]) for name in plain)


def test_a_bad_gradient_in_backward_skips_its_parameter():
    params = wide_parameters()
    before = {name: parameter.detach().clone() for name, parameter in params.items()}
    optimizer = AdamW(params.items(), AdamWConfig(max_grad_norm=None, in_backward=True))
    optimizer.begin(1e-2)
    factors = {"odd": float("nan")}
    sum(parameter.sum() * factors.get(name, 1.0) for name, parameter in params.items()).backward()
    grad_norm, skipped = optimizer.step(1e-2)
    assert skipped.item() == 1
    assert not torch.isfinite(grad_norm)
    assert [name for name in params if torch.equal(params[name], before[name])] == ["odd"]


def test_in_backward_forbids_what_it_cannot_do():
    with pytest.raises(ValueError, match="in_backward updates before the global norm is known: max_grad_norm is 1"):
        AdamWConfig(in_backward=True)
    config = AdamWConfig(in_backward=True, max_grad_norm=None)
    with pytest.raises(ValueError, match="in_backward: works with one micro batch per step only"):
        AdamW(parameters().items(), config, accumulate_in_fp32=True)
