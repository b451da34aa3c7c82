"""Recomputation and float8 in the decoder: the same gradients to the bit, and no more kept than the formula says."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from steep.engine.config import ModelConfig
from steep.engine.memory import recomputed_bytes_per_token, saved_bytes_per_token
from steep.engine.model import Decoder
from steep.kernels import NeftuneNoise, document_lengths
from tests.engine.parity import (
    decoder_like,
    documents,
    labels_of,
    our_results,
    packed,
    relative_error,
    tiny_transformers,
)

MODES = ["none", "selective", "full"]
# bias and tied head; norms of q and k; experts; a window
CASES = ["qwen2_tied", "qwen3", "mixtral", "mistral_window"]


def forward(decoder, docs):
    """Loss of a pass with noise on the embeddings and, for mixtures, something that the routers learn from."""
    tokens, positions, cu_seqlens, max_seqlen = packed(docs)
    noise = NeftuneNoise(5.0, document_lengths(cu_seqlens, len(tokens)), seed=1, step=2)
    routing = []
    hidden = decoder(tokens, positions, cu_seqlens, max_seqlen, noise=noise, routing=routing)
    loss, _ = decoder.loss(hidden, labels_of(docs), scale=torch.tensor(1 / len(tokens)))
    return loss + sum(logits.float().square().mean() for logits, _ in routing)


@pytest.mark.parametrize(
    ("dtype", "float8"), [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "blockwise")]
)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_to_the_bit(case, dtype, float8):
    decoder = decoder_like(tiny_transformers(case).to(dtype))
    decoder.float8 = float8
    docs = documents([11, 1, 30, 4, 17], 97)
    results = []
    for decoder.recompute in MODES:
        decoder.zero_grad()
        loss = forward(decoder, docs)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in decoder.parameters())])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize(("dtype", "float8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_saved_bytes_are_what_the_formula_says(case, mode, dtype, float8):
    decoder = decoder_like(tiny_transformers(case).to(dtype))
    decoder.recompute, decoder.float8 = mode, "blockwise" if float8 else None
    docs = documents([64, 64] if float8 else [50, 7], 97)
    tokens, positions, cu_seqlens, max_seqlen = packed(docs)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.loss(decoder(tokens, positions, cu_seqlens, max_seqlen), labels_of(docs))
    tables = decoder.rope_tables.get(max_seqlen, tokens.device)
    for constant in (*decoder.parameters(), *tables, tokens, positions, cu_seqlens):
        kept.pop(constant.untyped_storage().data_ptr(), None)
    saved = sum(size for size, tensor in kept.values() if tensor.shape != decoder.head_weight.shape)
    expected = saved_bytes_per_token(decoder.config, mode, dtype, float8=float8) * len(tokens)
    experts = decoder.config.num_local_experts or 0
    assert saved - expected in (0, 4 * experts * len(decoder.layers))  # where each expert's rows end


@pytest.mark.parametrize("case", CASES)
def test_less_is_kept_the_more_is_recomputed(case):
    config = decoder_like(tiny_transformers(case)).config
    kept = [saved_bytes_per_token(config, mode) for mode in MODES]
    again = [recomputed_bytes_per_token(config, mode) for mode in MODES]
    assert kept[0] > kept[1] > kept[2]
    assert again[0] == 0 < again[1] < again[2]


def test_a_checkpointed_layer_is_not_computed_to_its_end():
    """The last product of a layer is of no use to backward: in bf16, where it is torch's own, it is not computed."""

    class Count(TorchDispatchMode):
        shapes: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                self.shapes.append(tuple(args[-1].shape))
            return func(*args, **(kwargs or {}))

    decoder = decoder_like(tiny_transformers("llama").bfloat16())
    width, hidden = decoder.config.intermediate_size, decoder.config.hidden_size
    counts = {}
    for decoder.recompute in ("none", "full"):
        loss = forward(decoder, documents([9, 14], 97))
        Count.shapes = []
        with Count():
            loss.backward()
        counts[decoder.recompute] = {
            name: Count.shapes.count(shape)
            for name, shape in {"gate_up": (hidden, 2 * width), "down": (width, hidden)}.items()
        }
    layers = decoder.config.num_hidden_layers
    assert counts["full"]["gate_up"] == counts["none"]["gate_up"] + layers
    assert counts["full"]["down"] == counts["none"]["down"]


def test_float8_is_near_and_learns_through_the_weights():
    hf = tiny_transformers("llama")
    decoder = decoder_like(hf)
    docs = documents([40, 24], 97)
    exact, _, exact_gradients = our_results(decoder, docs)
    decoder.float8 = "rowwise"
    ours, _, gradients = our_results(decoder, docs)
    assert 1e-3 < relative_error(ours, exact) < 0.2
    for name, gradient in gradients.items():
        assert relative_error(gradient, exact_gradients[name]) < 0.5, name
    decoder.float8 = None
    assert torch.equal(our_results(decoder, docs)[0], exact)


@pytest.mark.parametrize("tokens", [128, 100])
def test_float8_at_sizes_that_need_no_padding(tokens):
    """Nothing is copied there, and the projection is rotated in place all the same."""
    config = ModelConfig.from_dict(
        {
            "model_type": "mistral",
            "vocab_size": 97,
            "hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        }
    )
    decoder = Decoder(config).bfloat16()
    decoder.init_weights(0)
    losses = {}
    for decoder.float8 in (None, "rowwise", "blockwise"):
        loss = forward(decoder, documents([tokens], 97))
        loss.backward()
        losses[decoder.float8] = loss.item()
    assert losses["rowwise"] == pytest.approx(losses[None], rel=1e-2)
    assert losses["blockwise"] == pytest.approx(losses[None], rel=1e-2)


def test_wrong_values_are_refused():
    decoder = decoder_like(tiny_transformers("llama"))
    with pytest.raises(ValueError, match="recompute is 'some'; allowed: none, selective, full"):
        decoder.recompute = "some"
    with pytest.raises(ValueError, match="recipe is 'tensorwise'; allowed: blockwise, rowwise"):
        decoder.float8 = "tensorwise"
    assert (decoder.recompute, decoder.float8) == ("none", None)
