"""A GGUF file (llama.cpp) -> a Hugging Face model folder: weights dequantised, config and tokenizer rebuilt.

The `gguf` package reads the file and dequantises; what is added here is the meaning: llama.cpp's names and keys against
Hugging Face's, and the order of the rows of q and k, which llama.cpp changes for its interleaved rotation. A key that
may change the mathematics and is not understood is refused by name. Reads one file, publishes one folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.files import atomic_folder, check_absent, hash_inputs
from .config import ARCHITECTURES, ModelConfig
from .gguf_tokenizer import special_ids, tokenizer_files
from .model import Decoder
from .rope import inverse_frequencies
from .safetensors_io import SafetensorsWriter, is_finite
from .weights import CHUNK_ELEMENTS, hf_tensors, write_model_manifest

MODEL_TYPES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA3_FACTORS = "rope_freqs.weight"
# Llama 3.1 and later all have these; a GGUF file holds only what they lead to.
_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LICENCE_KEYS = ("name", "organization", "license", "license.name", "license.link", "source.url", "file_type")


@torch.no_grad()
def import_gguf(file: str | Path, out: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Publish the model of a GGUF file as a Hugging Face folder that transformers, vLLM and steep open.

    Args:
        file: a GGUF file of llama, mistral, qwen2 or qwen3, in any quantisation that the `gguf` package knows.
        out: must not exist, or be empty; complete or not there.
        dtype: of the weights. fp32 holds the dequantised values exactly; a narrower one rounds them once.

    Raises:
        ImportError: the `gguf` package is not installed.
        FileNotFoundError, FileExistsError: `file` is not there, `out` is.
        ValueError: naming the key or tensor that is damaged or not supported; nothing is written.
    """
    file, out = Path(file), Path(out)
    check_absent(out)
    reader = _open(file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop(_LLAMA3_FACTORS, None)
    files = tokenizer_files(metadata, str(file))
    config = _config(metadata, tensors, None if factors is None else factors.data, str(file), dtype)
    files["config.json"] = json.dumps(config, indent=2) + "\n"
    files["generation_config.json"] = json.dumps(_generation_config(metadata, str(file)), indent=2) + "\n"

    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_dict(config, source=str(file)))
    shapes = {name: placement.shape for name, placement in hf_tensors(decoder).items()}
    sources = _match(tensors, shapes, file)
    with atomic_folder(out) as folder:
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        with SafetensorsWriter(folder, [(name, dtype, shape) for name, shape in shapes.items()]) as writer:
            for name in shapes:
                order = _row_order(name, metadata["general.architecture"], decoder.config)
                _write(writer, name, sources[name], order, dtype, file)
        stated = {key: metadata[f"general.{key}"] for key in _LICENCE_KEYS if f"general.{key}" in metadata}
        write_model_manifest(folder, "model", inputs=hash_inputs([file]), provenance={"gguf": stated})


def _open(file: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("reading GGUF files needs the gguf package: pip install steep[gguf]") from None
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file}: not a GGUF file")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # a cut file shows as an error of numpy anywhere in the reader
        raise ValueError(f"{file}: truncated or damaged GGUF file ({error})") from None


class _Keys:
    """The `ARCHITECTURE.*` keys. What nobody asks for may be mathematics that is not computed, and is refused."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, source: str) -> None:
        prefix = architecture + "."
        self.values = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self.asked: set[str] = set()
        self.prefix, self.source = prefix, source

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        self.asked.add(key)
        value = self.values.get(key, default)
        if type(value) is not kind and not (value is None and default is None and key not in self.values):
            raise ValueError(f"{self.source}: {self.prefix}{key} is {value!r}; expected one {kind.__name__}")
        return value

    def require(self, key: str, kind: type) -> Any:
        if key not in self.values:
            raise ValueError(f"{self.source}: {self.prefix}{key} is missing")
        return self.get(key, kind)

    def refuse_the_rest(self) -> None:
        rest = sorted(self.values.keys() - self.asked)
        if rest:
            stated = ", ".join(f"{self.prefix}{key} = {self.values[key]!r}" for key in rest)
            raise ValueError(f"{self.source}: not supported: {stated}")


def _config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    llama3_factors: np.ndarray | None,
    source: str,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The config.json of a GGUF file's metadata."""
    architecture = metadata.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise ValueError(f"{source}: general.architecture is {architecture!r}; supported: {', '.join(MODEL_TYPES)}")
    keys = _Keys(metadata, architecture, source)
    heads = keys.require("attention.head_count", int)
    kv_heads = keys.get("attention.head_count_kv", int, heads)
    hidden_size = keys.require("embedding_length", int)
    rotated = keys.get("rope.dimension_count", int)
    head_dim = keys.get("attention.key_length", int) or rotated or hidden_size // heads
    if (keys.get("attention.value_length", int) or head_dim) != head_dim or (rotated or head_dim) != head_dim:
        raise ValueError(f"{source}: heads with keys, values and rotation of different sizes are not supported")
    if keys.get("expert_count", int) or keys.get("expert_used_count", int):
        raise ValueError(f"{source}: {architecture}.expert_count: mixtures of experts are not supported")
    keys.get("vocab_size", int)  # the embedding says it, and says it truly
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{source}: tensor token_embd.weight is missing")

    # llama.cpp calls Mistral's models llama: they compute the same, and it knows no sliding window for them
    stated = " ".join(str(metadata.get(f"general.{key}", "")) for key in ("name", "basename"))
    model_type = "mistral" if architecture == "llama" and "mistral" in stated.lower() else architecture
    special = special_ids(metadata, source)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": hidden_size,
        "intermediate_size": keys.require("feed_forward_length", int),
        "num_hidden_layers": keys.require("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.require("context_length", int),
        "rms_norm_eps": _shortest(keys.require("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(keys.get("rope.freq_base", float, 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": special.get("bos"),
        "eos_token_id": special.get("eos"),
        "pad_token_id": special.get("pad"),
    }
    if model_type in ("llama", "qwen3"):
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if model_type == "mistral":
        config["sliding_window"] = None
    config["rope_scaling"] = _rope_scaling(keys)
    keys.refuse_the_rest()
    if llama3_factors is not None:
        config["rope_scaling"] = _llama3_scaling(config, llama3_factors, source)
    return config


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    kind = keys.get("rope.scaling.type", str, "none")
    factor = keys.get("rope.scaling.factor", float)
    context = keys.get("rope.scaling.original_context_length", int)
    keys.get("rope.scaling.finetuned", bool)  # says how the model was made, not what it computes
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or factor is None:
        raise ValueError(
            f"{keys.source}: {keys.prefix}rope.scaling.type is {kind!r} with factor {factor}; "
            "supported: none, linear or yarn with a factor"
        )
    scaling = {"rope_type": kind, "factor": _shortest(factor)}
    if kind == "yarn" and context is not None:
        scaling["original_max_position_embeddings"] = context
    return scaling


def _llama3_scaling(config: Mapping[str, Any], factors: np.ndarray, source: str) -> dict[str, Any]:
    """The scaling of Llama 3.1 behind a table of divisors for the frequencies; refused unless it gives that table."""
    scaling = {"rope_type": "llama3", "factor": _shortest(float(factors.max())), **_LLAMA3_SCALING}
    plain = ModelConfig.from_dict({**config, "rope_scaling": None}, source)
    scaled = ModelConfig.from_dict({**config, "rope_scaling": scaling}, source)
    expected = (inverse_frequencies(plain)[0] / inverse_frequencies(scaled)[0]).numpy()
    if config["rope_scaling"] or expected.shape != factors.shape or not np.allclose(factors, expected, rtol=1e-5):
        raise ValueError(f"{source}: tensor {_LLAMA3_FACTORS} is not the frequency scaling of Llama 3.1")
    return scaling


def _generation_config(metadata: Mapping[str, Any], source: str) -> dict[str, Any]:
    """BOS, padding, and every token that ends an answer: of the text, of a turn, of a message."""
    special = special_ids(metadata, source)
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(int(id) for id in ends if id is not None))
    values = {
        "bos_token_id": special.get("bos"),
        "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
        "pad_token_id": special.get("pad"),
    }
    return {key: value for key, value in values.items() if value is not None}


def _match(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    """{Hugging Face name: GGUF tensor}, strict both ways, shapes and quantisation checked."""
    import gguf

    matched, unexpected = {}, []
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        parts = stem.split(".")
        if stem in _TOP_NAMES:
            target = f"{_TOP_NAMES[stem]}.{kind}"
        elif len(parts) == 3 and parts[0] == "blk" and parts[2] in _NAMES:
            target = f"model.layers.{parts[1]}.{_NAMES[parts[2]]}.{kind}"
        else:
            target = ""
        if target not in shapes:
            unexpected.append(name)
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if shape != shapes[target]:
            raise ValueError(f"{file}: {name} has shape {list(shape)}, expected {list(shapes[target])}")
        exact = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        if tensor.tensor_type not in exact:
            try:
                gguf.dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise ValueError(f"{file}: {name} is {kind}, which the gguf package cannot dequantise") from None
        matched[target] = tensor
    missing = sorted(shapes.keys() - matched.keys())
    if missing or unexpected:
        raise ValueError(
            f"{file}: tensors do not fit the metadata: {len(missing)} missing {missing[:5]}, "
            f"{len(unexpected)} unexpected {unexpected[:5]}"
        )
    return matched


def _row_order(name: str, architecture: str, config: ModelConfig) -> np.ndarray | None:
    """Rows of the GGUF tensor in Hugging Face's order; None if the orders are the same.

    llama.cpp rotates neighbouring pairs (0 1)(2 3).. of a head of its llama models, Hugging Face pairs half a head
    apart, so its converter interleaves the two halves of the rows of q and k: row 2i is Hugging Face's row i of the
    head, row 2i+1 its row head_dim/2 + i.
    """
    if architecture != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return None
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    interleaved = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return interleaved.swapaxes(1, 2).reshape(-1)


def _write(
    writer: SafetensorsWriter, name: str, tensor: Any, order: np.ndarray | None, dtype: torch.dtype, file: Path
) -> None:
    """Dequantise and write a tensor some rows at a time. A row is a whole number of quantisation blocks."""
    import gguf

    row_elements = int(tensor.shape[0]) if len(tensor.shape) > 1 else 1
    rows = len(tensor.data)
    step = max(CHUNK_ELEMENTS // row_elements, 1)
    for lo in range(0, rows, step):
        stored = tensor.data[lo : lo + step] if order is None else tensor.data[order[lo : lo + step]]
        values = torch.from_numpy(np.array(gguf.dequantize(stored, tensor.tensor_type), np.float32)).to(dtype)
        if not is_finite(values):
            raise ValueError(f"{file}: {tensor.name} holds NaN or Inf (as {str(dtype).removeprefix('torch.')})")
        writer.write_range(name, lo * row_elements, values.reshape(-1))


def _shortest(value: float) -> float:
    """The number that an fp32 of the file was written for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
