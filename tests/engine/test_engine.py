"""Engine: a training loop equal to transformers', accumulation, sums by source, state, export."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from steep.data import IGNORE, PackedBatch
from steep.engine import AdamWConfig, Engine
from tests.engine.parity import config_of, documents, hf_parts, labels_of, packed, relative_error, tiny_transformers
from tests.engine.tiny_run import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("engine") / "model")


def make_batch(docs: list[torch.Tensor], sources: list[int], padding: int = 3) -> PackedBatch:
    """Documents and a padding piece at the end, as the loader lays them out."""
    tokens, positions, cu_seqlens, longest = packed([*docs, torch.zeros(padding, dtype=torch.long)])
    labels = torch.cat([labels_of(docs), torch.full((padding,), IGNORE)])
    return PackedBatch(
        tokens.numpy(),
        labels.numpy(),
        positions.numpy(),
        np.append(cu_seqlens.numpy(), cu_seqlens.numpy()[-1:]),
        longest,
        np.array([*sources, -1, -1], np.int32),
        int((labels != IGNORE).sum()),
    )


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in engine.decoder.named_parameters()}


def test_training_equals_a_transformers_loop(tmp_path):
    hf = tiny_transformers("qwen2_tied").train()
    hf.save_pretrained(tmp_path / "model")
    config = config_of(hf)
    engine = Engine.load(tmp_path / "model", optimizer=AdamWConfig(weight_decay=0.1, max_grad_norm=0.5))
    vectors = [parameter for parameter in hf.parameters() if parameter.dim() < 2]
    matrices = [parameter for parameter in hf.parameters() if parameter.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)

    for step in range(6):
        docs = documents([7, 1, 20, 12], config.vocab_size, seed=step)
        batch = make_batch(docs, [0, 0, 0, 0])
        sums = engine.forward_backward(batch, batch.num_valid)
        engine.step(1e-3)

        logits = torch.cat([hf(doc[None], use_cache=False).logits[0] for doc in docs])
        loss = F.cross_entropy(logits, labels_of(docs), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert sums.nll.item() / sums.tokens.item() == pytest.approx(loss.item(), rel=1e-5)

    theirs = dict(hf.named_parameters())
    for name, parameter in engine.decoder.named_parameters():
        for hf_name, rows in hf_parts(name, parameter.detach(), config):
            torch.testing.assert_close(rows, theirs[hf_name].detach(), rtol=1e-4, atol=2e-5)


def test_accumulation_is_the_mean_over_all_tokens(model):
    """Micro batches of very different numbers of targets: a mean of means would be wrong."""
    docs = documents([40, 3, 2, 9], 257)
    whole = make_batch(docs, [0, 0, 0, 0])
    parts = [make_batch(docs[:1], [0]), make_batch(docs[1:3], [0, 0]), make_batch(docs[3:], [0])]
    engine = Engine.load(model)
    engine.forward_backward(whole, whole.num_valid)
    expected = gradients(engine)
    engine.decoder.zero_grad()
    for part in parts:
        engine.forward_backward(part, whole.num_valid)
    for name, gradient in gradients(engine).items():
        assert relative_error(gradient, expected[name]) < 1e-6, name


def test_sums_by_source(model):
    docs, sources = documents([11, 5, 1, 23, 8], 257), [2, 0, 0, 2, 1]
    engine = Engine.load(model)
    batch = make_batch(docs, sources)
    sums = engine.eval_nll(batch, num_sources=4)
    assert sums.tokens.tolist() == [4, 7, 32, 0]
    trained = engine.forward_backward(batch, batch.num_valid, num_sources=4)
    torch.testing.assert_close(trained.nll, sums.nll)
    for source in range(3):
        own = [doc for doc, of in zip(docs, sources) if of == source]
        alone = engine.eval_nll(make_batch(own, [0] * len(own)))
        torch.testing.assert_close(alone.nll[0], sums.nll[source], rtol=1e-5, atol=1e-5)
    assert sums.nll[3] == 0


def test_wrong_arguments_are_refused(model):
    engine = Engine.load(model)
    batch = make_batch(documents([5, 6], 257), [0, 1])
    with pytest.raises(ValueError, match="source id 1, but num_sources is 1"):
        engine.forward_backward(batch, batch.num_valid)
    with pytest.raises(ValueError, match="at least one valid label"):
        engine.forward_backward(batch, 0, num_sources=2)
    with pytest.raises(ValueError, match="dtype: 'float16' is not one of float32, bfloat16"):
        Engine.load(model, dtype="float16")
    with pytest.raises(ValueError, match="source_folder"):
        Engine(engine.decoder).export("nowhere")


def test_bf16_accumulates_in_fp32_and_learns(model):
    batch = make_batch(documents([30, 20], 257), [0, 0])
    exact = Engine.load(model)
    losses = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine.load(model, dtype=dtype, optimizer=AdamWConfig(weight_decay=0.0))
        for _ in range(8):
            sums = engine.forward_backward(batch, batch.num_valid)
            assert all(parameter.grad.dtype == torch.float32 for parameter in engine.decoder.parameters())
            engine.step(2e-3)
        losses.append(sums.nll.item() / batch.num_valid)
    start = exact.eval_nll(batch).nll.item() / batch.num_valid
    assert losses[1] < start - 0.2
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    plain = Engine.load(model, dtype="bfloat16", accumulate_in_fp32=False)
    plain.forward_backward(batch, batch.num_valid)
    assert {parameter.grad.dtype for parameter in plain.decoder.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_round_trip_is_exact(model, dtype):
    batch = make_batch(documents([30, 20], 257), [0, 0])

    def train(engine: Engine, steps: int) -> None:
        for _ in range(steps):
            engine.forward_backward(batch, batch.num_valid)
            engine.step(1e-3)

    first, second = Engine.load(model, dtype=dtype), Engine.load(model, dtype=dtype)
    train(first, 3)
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    train(first, 2)
    second.load_state_dict(saved)
    train(second, 2)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


def test_states_that_do_not_fit_are_refused(model):
    engine = Engine.load(model)
    before = {name: tensor.clone() for name, tensor in engine.state_dict().items()}
    state = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    with pytest.raises(ValueError, match=r"1 missing entries, for example 'model.norm.weight'"):
        engine.load_state_dict({name: tensor for name, tensor in state.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"1 unexpected entries, for example 'other'"):
        engine.load_state_dict({**state, "other": torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())
    with pytest.raises(ValueError, match=r"model.norm.weight is torch.float64 \[32\], expected torch.float32 \[32\]"):
        engine.load_state_dict({**state, "model.norm.weight": torch.zeros(32, dtype=torch.float64)})


def test_export_and_load_again(model, tmp_path):
    engine = Engine.load(model)
    batch = make_batch(documents([30, 20], 257), [0, 0])
    engine.forward_backward(batch, batch.num_valid)
    engine.step(1e-2)
    engine.export(tmp_path / "out")
    again = Engine.load(tmp_path / "out")
    assert torch.equal(again.eval_nll(batch).nll, engine.eval_nll(batch).nll)
    assert not torch.equal(again.eval_nll(batch).nll, Engine.load(model).eval_nll(batch).nll)
    with pytest.raises(FileExistsError):
        engine.export(tmp_path / "out")


def test_nothing_in_the_optimizer_step_asks_the_device_for_a_value(model):
    class RefuseSynchronisation(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "is_nonzero"), func
            return func(*args, **(kwargs or {}))

    for dtype in ("float32", "bfloat16"):
        engine = Engine.load(model, dtype=dtype)
        batch = make_batch(documents([30, 20], 257), [0, 0])
        engine.forward_backward(batch, batch.num_valid)
        with RefuseSynchronisation():
            engine.step(1e-3)
            with pytest.raises(AssertionError, match="_local_scalar_dense"):
                engine.optimizer.step_count.item()
