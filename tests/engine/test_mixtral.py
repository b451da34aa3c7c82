"""Mixtral under training: balancing loss and gradients beside transformers, load of the experts, accumulation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from steep.data import IGNORE, PackedBatch
from steep.engine import AdamWConfig, Engine
from steep.engine.generate import generate
from tests.engine.parity import decoder_like, documents, hf_parts, labels_of, packed, relative_error, tiny_transformers

COEFFICIENT = 0.3  # so large that the load-balancing loss is a good part of the router's gradient


def mixtral(**overrides):
    return tiny_transformers("mixtral", output_router_logits=True, router_aux_loss_coef=COEFFICIENT, **overrides)


def make_batch(docs: list[torch.Tensor], padding: int = 5) -> PackedBatch:
    """Documents and a piece of padding, which must count nowhere."""
    tokens, positions, cu_seqlens, longest = packed([*docs, torch.full((padding,), 3)])
    labels = torch.cat([labels_of(docs), torch.full((padding,), IGNORE)])
    sources = np.array([0] * len(docs) + [-1], np.int32)
    arrays = (tensor.numpy() for tensor in (tokens, labels, positions, cu_seqlens))
    return PackedBatch(*arrays, longest, sources, int((labels != IGNORE).sum()))


def hf_loss(hf, docs: list[torch.Tensor]):
    """transformers on the documents one per row, padded on the right: its outputs and the loss over all labels."""
    length = max(map(len, docs))
    rows = torch.stack([F.pad(doc, (0, length - len(doc))) for doc in docs])
    mask = torch.stack([F.pad(torch.ones_like(doc), (0, length - len(doc))) for doc in docs])
    output = hf(rows, attention_mask=mask, labels=rows.masked_fill(mask == 0, IGNORE), use_cache=False)
    return output, mask


def gradients(engine: Engine) -> dict[str, torch.Tensor]:
    return {
        name: part
        for ours, parameter in engine.decoder.named_parameters()
        for name, part in hf_parts(ours, parameter.grad, engine.config)
    }


@pytest.mark.parametrize("lengths", [[40], [17, 30, 8]])
def test_loss_and_gradients_are_those_of_transformers(lengths):
    hf = mixtral()
    docs = documents(lengths, 97)
    output, mask = hf_loss(hf, docs)
    output.loss.backward()

    engine = Engine(decoder_like(hf))
    assert engine.router_aux_loss_coef == COEFFICIENT
    batch = make_batch(docs)
    loss, sums = engine._forward(batch, 1, batch.num_valid)
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    assert output.aux_loss.item() * COEFFICIENT > 0.1 * (sums.nll / sums.tokens).item()
    assert (sums.nll / sums.tokens).item() == pytest.approx(
        (output.loss - COEFFICIENT * output.aux_loss).item(), rel=1e-5
    )
    ours = gradients(engine)
    for name, parameter in hf.named_parameters():
        assert relative_error(ours[name], parameter.grad) < 1e-5, name

    # tokens per expert, counted from transformers' own logits
    assert sums.expert_load.dtype == torch.int64
    for load_E, logits in zip(sums.expert_load, output.router_logits, strict=True):
        chosen = logits[mask.flatten() == 1].topk(2).indices
        assert load_E.tolist() == torch.bincount(chosen.flatten(), minlength=4).tolist()
    assert torch.equal(engine.eval_nll(batch).expert_load, sums.expert_load)


def test_the_released_configuration_asks_for_no_balancing():
    docs = documents([40], 97)
    engine = Engine(decoder_like(tiny_transformers("mixtral", router_aux_loss_coef=COEFFICIENT)))
    assert engine.router_aux_loss_coef == 0
    batch = make_batch(docs)
    loss, sums = engine._forward(batch, 1, batch.num_valid)
    assert loss.item() == pytest.approx((sums.nll / sums.tokens).item(), rel=1e-6)


def test_dense_models_have_no_load():
    batch = make_batch(documents([9], 97))
    assert Engine(decoder_like(tiny_transformers("llama"))).eval_nll(batch).expert_load is None


def test_accumulation_weights_the_balancing_loss_by_targets():
    """Micro batches of very different size: the router's gradient is the mean over targets of what each would give."""
    engine = Engine(decoder_like(mixtral()))
    parts = [
        make_batch(documents([40], 97)),
        make_batch(documents([3, 5], 97, seed=1)),
        make_batch([torch.tensor([7])]),
    ]
    total = sum(part.num_valid for part in parts)
    expected = {}
    for part in parts[:2]:
        engine.decoder.zero_grad()
        engine.forward_backward(part, part.num_valid)
        for name, gradient in gradients(engine).items():
            expected[name] = expected.get(name, 0) + gradient * (part.num_valid / total)
    engine.decoder.zero_grad()
    for part in parts:  # the last has no target at all
        engine.forward_backward(part, total)
    for name, gradient in gradients(engine).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


def test_experts_without_tokens_get_a_zero_gradient():
    docs = documents([20, 7], 97)
    engine = Engine(decoder_like(mixtral()), AdamWConfig(weight_decay=0.0))
    engine.router_aux_loss_coef = 0.0
    with torch.no_grad():  # all logits equal: the first two experts are chosen, by all tokens
        for layer in engine.decoder.layers:
            layer.router.weight.zero_()
    batch = make_batch(docs)
    load = engine.forward_backward(batch, batch.num_valid).expert_load
    assert load.tolist() == [[27, 27, 0, 0]] * 3
    for layer in engine.decoder.layers:
        for parameter in (layer.experts.gate_up, layer.experts.down):
            gradient_E = parameter.grad.unflatten(0, (4, -1))
            assert gradient_E[0].any()
            assert not gradient_E[2:].any()
            assert gradient_E.isfinite().all()
    before = {name: p.detach().clone() for name, p in engine.decoder.named_parameters()}
    _, skipped = engine.step(1e-3)
    assert skipped == 0
    after = engine.decoder.layers[0].experts.down.unflatten(0, (4, -1))
    unchanged = before["layers.0.experts.down"].unflatten(0, (4, -1))
    assert torch.equal(after[2:], unchanged[2:])
    assert not torch.equal(after[0], unchanged[0])


def test_bf16_is_as_close_to_fp32_as_transformers_in_bf16():
    docs = documents([40], 97)
    exact = hf_loss(mixtral(), docs)[0].logits
    hf = mixtral().bfloat16()
    decoder = decoder_like(hf)
    with torch.no_grad():
        ours = decoder.logits(decoder(*packed(docs)))
        theirs = hf_loss(hf, docs)[0].logits
    assert relative_error(ours, exact[0]) < 1.1 * relative_error(theirs, exact)


@pytest.mark.filterwarnings("ignore:.*were trained in bfloat16")
def test_a_trained_model_is_exported_and_generates_the_same(tmp_path):
    mixtral().save_pretrained(tmp_path / "model")
    engine = Engine.load(tmp_path / "model", dtype="bfloat16")
    batch = make_batch(documents([40, 20], 97))
    for _ in range(3):
        engine.forward_backward(batch, batch.num_valid)
        engine.step(1e-2)
    engine.export(tmp_path / "out")
    prompts = [doc.tolist() for doc in documents([5, 9], 97)]
    again = Engine.load(tmp_path / "out", dtype="bfloat16")
    assert generate(again.decoder, prompts, 8) == generate(engine.decoder, prompts, 8)
    assert torch.equal(again.eval_nll(batch).nll, engine.eval_nll(batch).nll)
