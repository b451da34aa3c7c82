"""SmolLM2-135M-Instruct from its GGUF file, imported, loaded and run, against transformers' own reading of the file."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from steep.data import load_tokenizer
from steep.engine.config import ModelConfig
from steep.engine.generate import generate
from steep.engine.model import Decoder
from steep.engine.verify import verify
from steep.engine.weights import hf_tensors, load_weights
from steep.kernels import linear_cross_entropy
from tests.engine.parity import IGNORE_INDEX, labels_of, packed, relative_error

TEXTS = [
    "Seizures are abnormal, uncontrolled electrical activity in the brain.",
    "Die Überweisung ans Universitätsklinikum: 12,5 mg/kg – täglich, ab 3.11.2023.",
    "L'été à Besançon, c'est « déjà » vu; n'est-ce pas ?",
    "  two  spaces\n\n\tand a tab\r\n ",
    "emoji 🧬🩺 👩🏽‍⚕️, 日本語のテキスト",
    "def f(x):\n    return x**2  # ok\n",
    "",
]
QUESTION = [{"role": "user", "content": "What is a cell?"}]


@pytest.fixture(scope="module")
def hf(smollm2_gguf: Path):
    from transformers import AutoModelForCausalLM

    folder, file = smollm2_gguf.parent, smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hf_tokenizer(smollm2_gguf: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def decoder(smollm2: Path) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_folder(smollm2))
    load_weights(decoder, smollm2, torch.float32)
    return decoder


def test_weights_are_bit_equal(decoder: Decoder, hf) -> None:
    theirs = dict(hf.named_parameters())
    placements = hf_tensors(decoder)
    assert placements.keys() == theirs.keys()
    for name, placement in placements.items():
        flat = decoder.get_parameter(placement.parameter).view(-1)
        values = flat[placement.offset : placement.offset + placement.numel].view(placement.shape)
        assert torch.equal(values, theirs[name]), name


def test_token_ids_and_chat_are_equal(smollm2: Path, hf_tokenizer) -> None:
    ours = load_tokenizer(smollm2)
    for text in TEXTS:
        assert ours.encode(text) == hf_tokenizer(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
    rendered = ours.render_chat(QUESTION)
    assert rendered == hf_tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert ours.encode_with_special(rendered) == hf_tokenizer(rendered)["input_ids"]


def test_digits_are_cut_off_before_anything_else(smollm2: Path, hf_tokenizer) -> None:
    """SmolLM2's own tokenizer.json and llama.cpp cut off digits first; transformers' reading of a GGUF file forgets to,
    which shows where spaces, or the bytes of an unusual digit, stand before it."""
    ours = load_tokenizer(smollm2)
    for text, tokens in {"a   5": ["a", "ĠĠĠ", "5"], "a ½": ["a", "Ġ", "Â½"]}.items():
        assert [ours.token(id) for id in ours.encode(text)] == tokens
        assert hf_tokenizer.convert_ids_to_tokens(hf_tokenizer(text)["input_ids"]) != tokens


def test_logits_and_loss(smollm2: Path, decoder: Decoder, hf) -> None:
    tokenizer = load_tokenizer(smollm2)
    docs = [torch.tensor(tokenizer.encode(text)) for text in TEXTS if text]
    labels = labels_of(docs)
    with torch.no_grad():
        hidden_TD = decoder(*packed(docs))
        scale = 1 / (labels != IGNORE_INDEX).sum().float()
        loss, _ = linear_cross_entropy(hidden_TD, decoder.head_weight, labels, scale=scale)
        hf_logits = torch.cat([hf(doc[None]).logits[0] for doc in docs])
    assert relative_error(decoder.logits(hidden_TD), hf_logits) < 1e-5
    assert relative_error(loss, F.cross_entropy(hf_logits, labels, ignore_index=IGNORE_INDEX)) < 1e-5


def test_greedy_text(smollm2: Path, decoder: Decoder, hf) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompt = tokenizer.encode_with_special(tokenizer.render_chat(QUESTION))
    (ours,) = generate(decoder, [prompt], max_new_tokens=24, stop_ids=[tokenizer.eos_id])
    theirs = hf.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
    assert ours.tokens == theirs
    assert "cell" in tokenizer.decode(ours.tokens)


def test_verify(smollm2: Path) -> None:
    (artefact,) = verify(smollm2)["artefacts"]
    assert (artefact["kind"], artefact["tensors"], artefact["tokenizer"]) == ("model", 272, "49152 ids")
