"""AdamW: equal to torch's, bf16 equal to an fp32 master bit for bit, skip by selection, clipping."""

import pytest
import torch
from torch import Tensor

from steep.engine import optimizer as optimizer_module
from steep.engine.optimizer import AdamW, AdamWConfig, join_master, split_master


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


def test_bf16_with_remainder_is_fp32_adamw_bit_for_bit(monkeypatch):
    monkeypatch.setitem(optimizer_module._PIECE_ELEMENTS, "cpu", 100)  # several pieces, the last one ragged
    split = parameters(torch.bfloat16)
    masters = {name: torch.nn.Parameter(p.detach().float()) for name, p in split.items()}
    config = AdamWConfig(weight_decay=0.1, max_grad_norm=0.5)
    ours, reference = AdamW(split.items(), config), AdamW(masters.items(), config)
    for step in range(20):
        give_gradients(split, step)
        for name, parameter in masters.items():
            parameter.grad = split[name].grad.float()
        ours.step(1e-4)  # far below the spacing of bf16 numbers near 1
        reference.step(1e-4)
        for name, master in masters.items():
            assert torch.equal(join_master(split[name], ours.remainder[name]), master)
    for name in split:
        assert torch.equal(ours.exp_avg[name], reference.exp_avg[name])
        error = (split[name].float() - masters[name]).abs()
        nearest = (masters[name].to(torch.bfloat16).float() - masters[name]).abs()
        assert torch.equal(error, nearest)


def test_master_split_is_exact_at_the_edges():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=generator, dtype=torch.int64).to(torch.int32)
    edges = [0, -(2**31), 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x3F7FFFFF, 0x3F808000, 0x7F7FFFFF, 0x00800000, 0x007FFFFF]
    bits = torch.cat([bits, torch.tensor(edges, dtype=torch.int32)])
    master = bits.view(torch.float32)
    master = master[torch.isfinite(master)]
    weight = torch.empty(master.shape, dtype=torch.bfloat16)
    remainder = torch.empty(master.shape, dtype=torch.int16)
    split_master(master, weight, remainder)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))


def test_fp32_gradients_of_bf16_parameters():
    params = parameters(torch.bfloat16)
    for parameter in params.values():
        parameter.grad_dtype = torch.float32
    for weight in (2.5, 1.0 / 512):  # the second vanishes beside the first in bf16
        sum((parameter * weight).sum() for parameter in params.values()).backward()
    assert params["norm"].grad.dtype == torch.float32
    assert params["norm"].grad[0].item() == 2.5 + 1.0 / 512
    AdamW(params.items(), AdamWConfig()).step(1e-3)


def test_mixed_dtypes_are_refused():
    params = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
    with pytest.raises(ValueError, match=r"all float32 or all bfloat16, found .*bfloat16.*float32"):
        AdamW(params.items(), AdamWConfig())
    with pytest.raises(ValueError, match="float16"):
        AdamW([("a", torch.nn.Parameter(torch.zeros(2, dtype=torch.float16)))], AdamWConfig())
