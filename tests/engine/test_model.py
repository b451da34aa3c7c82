"""Decoder: parity with transformers for every family, packing, windows, construction."""

import math

import pytest
import torch

from steep.engine.model import Decoder
from steep.kernels import linear_cross_entropy
from tests.engine.parity import (
    CASES,
    assert_parity,
    config_of,
    decoder_like,
    documents,
    hf_results,
    labels_of,
    our_results,
    packed,
    relative_error,
    tiny_transformers,
)

LENGTHS = [11, 1, 30, 4, 5, 17]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case, attention):
    hf = tiny_transformers(case, attention)
    assert_parity(hf, decoder_like(hf), documents(LENGTHS, hf.config.vocab_size))


@pytest.mark.parametrize("case", CASES)
def test_packed_documents_equal_single_documents(case):
    decoder = decoder_like(tiny_transformers(case))
    docs = documents(LENGTHS, decoder.config.vocab_size)
    with torch.no_grad():
        together = decoder(*packed(docs))
        alone = torch.cat([decoder(*packed([doc])) for doc in docs])
    assert relative_error(together, alone) < 1e-6


def test_gradients_of_packed_documents_are_those_of_single_documents():
    decoder = decoder_like(tiny_transformers("mistral_window"))
    docs = documents([9, 14, 6], decoder.config.vocab_size)
    _, _, together = our_results(decoder, docs)
    together = {name: gradient.clone() for name, gradient in together.items()}
    alone = {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for doc in docs:
        for name, gradient in our_results(decoder, [doc])[2].items():
            alone[name] += gradient * (len(doc) - 1) / sum(len(doc) - 1 for doc in docs)
    assert max(relative_error(together[name], alone[name]) for name in alone) < 1e-5


@pytest.mark.parametrize("case", ["mistral_window", "qwen2_window"])
def test_window_counts_the_token_itself(case):
    """A window of 4 equals transformers' 4, and differs from its 3 and its 5."""
    docs = documents([12], 97)
    ours, _, _ = our_results(decoder_like(tiny_transformers(case)), docs)
    for window in (3, 4, 5):
        theirs, _, _ = hf_results(tiny_transformers(case, sliding_window=window), docs)
        # the first tokens, which see fewer than the window, agree in any case
        assert relative_error(ours[: min(window, 4)], theirs[: min(window, 4)]) < 1e-5
        assert (relative_error(ours, theirs) < 1e-5) == (window == 4)


def test_padded_cu_seqlens_change_nothing():
    decoder = decoder_like(tiny_transformers("llama"))
    tokens, positions, cu_seqlens, max_seqlen = packed(documents([7, 9], 97))
    padded = torch.cat([cu_seqlens, cu_seqlens[-1:].expand(5)])
    with torch.no_grad():
        plain = decoder(tokens, positions, cu_seqlens, max_seqlen)
        assert torch.equal(plain, decoder(tokens, positions, padded, 32))


def test_bf16_is_as_close_to_fp32_as_transformers_in_bf16():
    docs = documents(LENGTHS, 97)
    exact, exact_loss, exact_gradients = hf_results(tiny_transformers("qwen3"), docs)
    hf = tiny_transformers("qwen3").bfloat16()
    ours, our_loss, our_gradients = our_results(decoder_like(hf), docs)
    theirs, _, their_gradients = hf_results(hf, docs)
    assert relative_error(ours, exact) < 1.1 * relative_error(theirs, exact)
    assert abs(our_loss - exact_loss) < 0.02 * exact_loss
    ratios = [
        relative_error(our_gradients[name], exact) / relative_error(their_gradients[name], exact)
        for name, exact in exact_gradients.items()
    ]
    assert math.exp(sum(map(math.log, ratios)) / len(ratios)) < 1.1


def test_too_long_a_sequence_is_refused():
    decoder = decoder_like(tiny_transformers("llama"))
    docs = documents([65], 97)
    with pytest.raises(ValueError, match="65 tokens: max_position_embeddings of this model is 64"):
        decoder(*packed(docs))


def test_construction_on_meta_and_init_weights():
    config = config_of(tiny_transformers("qwen3_bias_tied"))
    decoders = []
    for seed in (3, 3, 4):
        with torch.device("meta"):
            decoder = Decoder(config)
        assert all(parameter.is_meta for parameter in decoder.parameters())
        assert not list(decoder.buffers())
        decoder.to_empty(device="cpu").init_weights(seed=seed)
        decoders.append(decoder)
    states = [decoder.state_dict() for decoder in decoders]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["embed_tokens.weight"], states[2]["embed_tokens.weight"])
    assert states[0]["layers.0.qkv.bias"].eq(0).all()
    assert states[0]["layers.2.q_norm.weight"].eq(1).all()

    docs = documents([40, 24], config.vocab_size)
    hidden = decoders[0](*packed(docs))
    loss, _ = linear_cross_entropy(hidden, decoders[0].head_weight, labels_of(docs), scale=torch.tensor(1 / 62))
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.05)


def test_tied_head_is_the_embedding_and_gets_both_gradients():
    hf = tiny_transformers("qwen2_tied")
    decoder = decoder_like(hf)
    assert decoder.head_weight is decoder.embed_tokens.weight
    assert "lm_head.weight" not in dict(decoder.named_parameters())
    docs = documents([6], 97)
    _, _, gradients = our_results(decoder, docs)
    unused = sorted(set(range(97)) - set(docs[0].tolist()))
    assert gradients["model.embed_tokens.weight"][unused].abs().sum() > 0  # from the head
