"""GGUF import: small files written here, compared with what they were made from and with transformers' reading."""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from steep.data import load_tokenizer
from steep.engine.config import ModelConfig
from steep.engine.gguf import import_gguf
from steep.engine.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from tests.engine.parity import tiny_transformers

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CORPUS = 3 * ["def f(x):\n    return x**2  # ok\n", "Die Überweisung ans Klinikum: 12,5 mg/kg täglich.", "it's 2023"]
TEXTS = [
    "Hello world, it's WE'LL 12345 and 1/2",
    "Die Überweisung ans Universitätsklinikum: 12,5 mg/kg – täglich.",
    "L'été à Besançon, c'est « déjà » vu.",
    "  two  spaces\n\n\tand tabs   5 x  \r\n\r\n end ",
    "emoji 🧬🩺 👩🏽‍⚕️, 日本語 ½ ² Ⅷ",
    "def f(x):\n    return x**2  # ok\n",
    "literal <|end|> and <s> in text",
    "",
]


def byte_level_vocabulary(pre_tokenizer: Any, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    """A small byte-level BPE tokenizer, trained here."""
    tokenizer = tokenizers.Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>", "<|start|>"]
    tokenizer.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def bpe_metadata(tokenizer: tokenizers.Tokenizer, pre: str, padded_to: int = 0) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    padding = [f"[PAD{id}]" for id in range(len(tokens), padded_to)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(tokens) - 3) + [5] * len(padding),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}",
    }


SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


def write_gguf(
    file: Path,
    case: str,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    edit: Callable[[dict[str, Any], dict[str, np.ndarray]], None] = lambda metadata, tensors: None,
    **overrides: Any,
):
    """A tiny transformers model as llama.cpp's converter would write it; returns the model."""
    hf = tiny_transformers(case, **{"vocab_size": 330, "hidden_size": 64, "intermediate_size": 96, **overrides})
    config = hf.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    metadata: dict[str, Any] = {
        "general.name": "Tiny Mistral" if config.model_type == "mistral" else "Tiny",
        "general.license": "apache-2.0",
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        **bpe_metadata(byte_level_vocabulary(SMOLLM), "smollm", padded_to=330),
    }
    tensors = {}
    for name, parameter in hf.named_parameters():
        stem, kind = name.rsplit(".", 1)
        array = parameter.detach().numpy()
        if stem.startswith("model.layers."):
            _, _, layer, module = stem.split(".", 3)
            if architecture == "llama" and module in ("self_attn.q_proj", "self_attn.k_proj"):
                array = array.reshape(-1, 2, head_dim // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
            tensors[f"blk.{layer}.{GGUF_NAMES[module]}.{kind}"] = array
        else:
            tensors[f"{GGUF_NAMES[stem]}.{kind}"] = array
    edit(metadata, tensors)

    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture", architecture))
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(key if key.startswith(("general.", "tokenizer.")) else f"{architecture}.{key}", value)
    for name, array in tensors.items():
        exact = array.ndim == 1 or quantization == gguf.GGMLQuantizationType.F32
        stored = np.ascontiguousarray(array) if exact else gguf.quantize(np.ascontiguousarray(array), quantization)
        writer.add_tensor(name, stored, raw_dtype=None if exact else quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


@pytest.mark.parametrize("case", ["llama", "llama_tied_mha", "mistral_full", "qwen2_tied", "qwen2_untied", "qwen3"])
def test_weights_and_config_of_every_family(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    hf = write_gguf(tmp_path / "tiny.gguf", case)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(theirs) is type(hf)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in hf.state_dict().items())

    ours = ModelConfig.from_folder(tmp_path / "out")
    expected = ModelConfig.from_dict(json.loads(hf.config.to_json_string()))
    different = {key for key, value in vars(ours).items() if value != getattr(expected, key)}
    assert different <= {"bos_token_id", "eos_token_ids", "torch_dtype"}
    assert (ours.bos_token_id, ours.eos_token_ids, ours.torch_dtype) == (2, (0,), torch.float32)


@pytest.mark.parametrize("case", ["llama", "qwen2_tied"])
def test_weights_equal_transformers_reading_of_the_same_file(case: str, tmp_path: Path) -> None:
    """Quantised, so that rows are permuted as blocks."""
    from transformers import AutoModelForCausalLM

    write_gguf(tmp_path / "tiny.gguf", case, gguf.GGMLQuantizationType.Q8_0)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if case == "qwen2_tied" else set())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())


def test_narrower_dtype(tmp_path: Path) -> None:
    hf = write_gguf(tmp_path / "tiny.gguf", "qwen2_untied")
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out", dtype=torch.bfloat16)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor.bfloat16(), ours[name]) for name, tensor in hf.state_dict().items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_llama3_frequencies(tmp_path: Path) -> None:
    """Llama 3.1's scaling is a table of divisors in GGUF; here by the formula of llama.cpp's converter."""

    def table(wrong: float) -> Callable[[dict, dict], None]:
        def edit(metadata: dict, tensors: dict) -> None:
            divisors = []
            for pair in range(8):
                wavelength = 2 * math.pi * 500000.0 ** (2 * pair / 16)
                smooth = (8192 / wavelength - 1) / (4 - 1)
                between = 1 / ((1 - smooth) / 8 + smooth)
                divisors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else between)
            assert len(set(divisors)) > 2
            divisors[3] += wrong
            tensors["rope_freqs.weight"] = np.array(divisors, np.float32)
            metadata["context_length"] = 131072

        return edit

    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
    write_gguf(tmp_path / "a.gguf", "llama", edit=table(0), **rope)
    import_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert ModelConfig.from_folder(tmp_path / "out").rope_scaling == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    write_gguf(tmp_path / "b.gguf", "llama", edit=table(0.5), **rope)
    with pytest.raises(ValueError, match="tensor rope_freqs.weight is not the frequency scaling of Llama 3.1"):
        import_gguf(tmp_path / "b.gguf", tmp_path / "other")


def test_rope_scaling_keys(tmp_path: Path) -> None:
    def yarn(metadata: dict, tensors: dict) -> None:
        metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.finetuned": True}
        metadata["rope.scaling.original_context_length"] = 32

    write_gguf(tmp_path / "tiny.gguf", "qwen2_tied", edit=yarn)
    import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "falcon"}, "general.architecture is 'falcon'; supported: llama, qwen2, qwen3"),
        ({"expert_count": 8}, "expert_count: mixtures of experts"),
        ({"attention.sliding_window": 7}, r"not supported: llama.attention.sliding_window = 7"),
        ({"attention.value_length": 8}, "heads with keys, values and rotation of different sizes"),
        ({"rope.scaling.type": "longrope"}, "llama.rope.scaling.type is 'longrope' with factor None"),
        ({"attention.head_count": [4, 4, 4]}, r"llama.attention.head_count is \[4, 4, 4\]; expected one int"),
        ({"context_length": None}, "llama.context_length is missing"),
        ({"tokenizer.ggml.pre": "my-own"}, "tokenizer.ggml.pre is 'my-own'; supported: gpt-2, smollm"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is 'rwkv'; supported: gpt2"),
        ({"tokenizer.ggml.eos_token_id": 999}, "tokenizer.ggml.eos_token_id is 999, which is no token"),
        ({"tokenizer.ggml.merges": ["Q zz"]}, "tokenizer.ggml.merges do not fit the tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "330 tokens, 330 of them different, 2 types"),
        ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
        ({"block_count": 2}, "0 missing .*, 9 unexpected .'blk.2.attn_q.weight'"),
        ({"block_count": 4}, "9 missing .'model.layers.3.input_layernorm.weight'.*, 0 unexpected"),
        ({"feed_forward_length": 97}, r"blk.0.ffn_gate.weight has shape \[96, 64\], expected \[97, 64\]"),
    ],
)
def test_metadata_that_is_not_supported(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    def edit(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for key, value in change.items():
            metadata[key] = value
            if value is None:
                del metadata[key]

    write_gguf(tmp_path / "tiny.gguf", "llama", edit=edit)
    with pytest.raises(ValueError, match=message) as error:
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert str(tmp_path / "tiny.gguf") in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.gguf"]


def test_values_that_are_not_finite_publish_nothing(tmp_path: Path) -> None:
    def edit(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.ffn_up.weight"] = np.where(np.eye(96, 64) > 0, np.inf, 0).astype(np.float32)

    write_gguf(tmp_path / "tiny.gguf", "llama", edit=edit)
    with pytest.raises(ValueError, match="blk.1.ffn_up.weight holds NaN or Inf"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.gguf"]


def test_files_that_are_no_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    with pytest.raises(FileNotFoundError, match="tiny.gguf: no such file"):
        import_gguf(file, tmp_path / "out")
    write_gguf(file, "llama")
    content = file.read_bytes()
    for size in (30, 2000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="tiny.gguf: truncated or damaged GGUF file"):
            import_gguf(file, tmp_path / "out")
    file.write_bytes(b"PK" + content)
    with pytest.raises(ValueError, match="tiny.gguf: not a GGUF file"):
        import_gguf(file, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(FileExistsError, match="out: already exists"):
        import_gguf(file, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install steep\[gguf\]"):
        import_gguf(file, tmp_path / "other")


def rebuilt(metadata: dict[str, Any], folder: Path):
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer_files(metadata, "test").items():
        (folder / name).write_text(content, encoding="utf-8")
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("pre", "pre_tokenizer"),
    [("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False)), ("smollm", SMOLLM)]
    + [
        (
            pre,
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZERS[pre].split or ""), "isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        )
        for pre in ("llama-bpe", "qwen2", "tekken")
    ],
)
def test_byte_level_ids_equal_those_of_the_original(pre: str, pre_tokenizer: Any, tmp_path: Path) -> None:
    original = byte_level_vocabulary(pre_tokenizer, ignore_merges=PRE_TOKENIZERS[pre].ignore_merges)
    ours = rebuilt(bpe_metadata(original, pre, padded_to=512), tmp_path / "tokenizer")
    original.encode_special_tokens = True
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode_with_special("<|user|>hi<|end|>") == [1, *ours.encode("hi"), 0]
    assert ours.special_ids == {0, 1, 2}
    assert ours.vocab_size == original.get_vocab_size()  # rows that pad the embedding are no tokens
    assert ours.render_chat([{"role": "user", "content": "x"}], False) == "<|user|>x<|end|>"


def test_split_patterns_are_the_models_own() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    with_pattern = {name: rule.split for name, rule in PRE_TOKENIZERS.items() if rule.split is not None}
    assert with_pattern == {name: GGUF_PRE_TOKENIZER_SPLITS[name] for name in with_pattern}


def test_unicode_is_normalised_for_qwen_only(tmp_path: Path) -> None:
    decomposed, composed = "u\u0308", "\u00fc"
    metadata = bpe_metadata(byte_level_vocabulary(SMOLLM), "qwen2")
    qwen, smollm = (rebuilt(metadata | {"tokenizer.ggml.pre": pre}, tmp_path / pre) for pre in ("qwen2", "smollm"))
    assert qwen.encode(decomposed) == qwen.encode(composed)
    assert smollm.encode(decomposed) != smollm.encode(composed)


def test_bos_and_eos_are_added_where_the_file_says(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    metadata = bpe_metadata(byte_level_vocabulary(SMOLLM), "llama-bpe")
    assert not rebuilt(metadata, tmp_path / "no").adds_bos
    both = metadata | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert rebuilt(both, tmp_path / "both").adds_bos
    ids = AutoTokenizer.from_pretrained(tmp_path / "both")("x")["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (2, 0, 3)
    del metadata["tokenizer.ggml.add_bos_token"]  # llama.cpp's own default for this vocabulary
    assert rebuilt(metadata, tmp_path / "default").adds_bos


def test_user_defined_tokens_and_named_templates(tmp_path: Path) -> None:
    metadata = bpe_metadata(byte_level_vocabulary(SMOLLM), "smollm")
    metadata["tokenizer.ggml.tokens"] += ["<think>"]
    metadata["tokenizer.ggml.token_type"] += [4]
    metadata["tokenizer.chat_template.tool_use"] = "tools"
    ours = rebuilt(metadata, tmp_path / "tokenizer")
    id = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert ours.encode_with_special("a<think>b") == [*ours.encode("a"), id, *ours.encode("b")]
    assert id not in ours.special_ids
    templates = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())["chat_template"]
    assert [template["name"] for template in templates] == ["default", "tool_use"]
    assert ours.render_chat([], False) == ""


@pytest.fixture(scope="module")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3 + TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(model: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(model.vocab_size())
    types = [
        3 if model.is_control(id) else 2 if model.is_unknown(id) else 6 if model.is_byte(id) else 1 for id in ids
    ]
    assert types.count(6) == 256
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(id) for id in ids],
        "tokenizer.ggml.scores": [model.get_score(id) for id in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece_ids_equal_those_of_sentencepiece(
    sentencepiece_model: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    ours = rebuilt(sentencepiece_metadata(sentencepiece_model), tmp_path / "tokenizer")
    assert any(sentencepiece_model.is_byte(id) for text in TEXTS for id in sentencepiece_model.encode(text))
    for text in [*CORPUS, *TEXTS, " lead", "▁x", "   ", "a" * 40]:
        assert ours.encode(text) == sentencepiece_model.encode(text)
        assert ours.decode(ours.encode(text)) == sentencepiece_model.decode(sentencepiece_model.encode(text))
    assert ours.adds_bos
    assert (ours.bos_id, ours.eos_id, ours.special_ids) == (1, 2, {1, 2})


def test_sentencepiece_that_normalises_is_refused(
    sentencepiece_model: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    metadata = sentencepiece_metadata(sentencepiece_model)
    with pytest.raises(ValueError, match="tokenizer.ggml.remove_extra_whitespaces is set"):
        tokenizer_files(metadata | {"tokenizer.ggml.remove_extra_whitespaces": True}, "test")
    with pytest.raises(ValueError, match="tokenizer.ggml.scores has 1 entries for 420 tokens"):
        tokenizer_files(metadata | {"tokenizer.ggml.scores": [0.0]}, "test")
