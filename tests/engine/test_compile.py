"""torch.compile is not needed, and may be put around a decoder: the same loss and gradients."""

import pytest
import torch

from steep.engine import LoraConfig
from steep.engine.lora import add_adapters
from tests.engine.parity import decoder_like, documents, labels_of, packed, relative_error, tiny_transformers


def results(decoder, forward, docs) -> list[torch.Tensor]:
    decoder.zero_grad()
    labels = labels_of(docs)
    loss, nll = decoder.loss(forward(*packed(docs)), labels, scale=torch.tensor(1 / len(labels)))
    loss.backward()
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    return [loss.detach(), nll, *(parameter.grad.clone() for parameter in trained)]


@pytest.mark.parametrize(
    ("case", "layers", "adapters"), [("qwen2_tied", 2, False), ("qwen3", 1, True), ("mixtral", 1, False)]
)
def test_a_compiled_decoder_is_the_same(case, layers, adapters):
    torch.compiler.reset()
    decoder = decoder_like(tiny_transformers(case, num_hidden_layers=layers))
    if adapters:
        add_adapters(decoder, LoraConfig(rank=4))
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if name.endswith("adapter.b"):
                    parameter.normal_(0, 0.1)
    docs = documents([9, 1, 14], decoder.config.vocab_size)
    expected = results(decoder, decoder, docs)
    compiled = torch.compile(decoder, backend="aot_eager", fullgraph=True)
    found = results(decoder, compiled, docs)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    other = documents([5, 8], decoder.config.vocab_size, seed=1)
    assert relative_error(results(decoder, compiled, other)[0], results(decoder, decoder, other)[0]) < 1e-6
