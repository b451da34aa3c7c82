"""What the train_*.py examples run on where no model is given: a tiny random llama, and documents that it can learn.

`pack` is also what to copy for data of your own: documents of token ids in, the arrays that the engine takes out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from steep.data import IGNORE, PackedBatch
from steep.engine import Decoder, ModelConfig, SafetensorsWriter
from steep.engine.weights import hf_tensors

VOCABULARY = 97


def make_model(folder: Path) -> Path:
    """A Hugging Face folder with config.json and random weights."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    decoder = Decoder(ModelConfig.from_dict(config))
    decoder.init_weights(seed=0)
    parameters, places = dict(decoder.named_parameters()), hf_tensors(decoder)
    with SafetensorsWriter(folder, [(name, torch.float32, place.shape) for name, place in places.items()]) as writer:
        for name, place in places.items():
            writer.write_range(name, 0, parameters[place.parameter].detach().view(-1)[place.offset :][: place.numel])
    return folder


def progressions(count: int, seed: int) -> list[np.ndarray]:
    """Documents of 2 to 40 tokens that count up in steps of 1, 2 or 3: the loss falls within a few steps."""
    generator = np.random.default_rng(seed)
    starts, steps, lengths = (generator.integers(low, high, count) for low, high in ((0, VOCABULARY), (1, 4), (2, 41)))
    return [(start + step * np.arange(n)) % VOCABULARY for start, step, n in zip(starts, steps, lengths)]


def pack(documents: Sequence[np.ndarray]) -> PackedBatch:
    """Documents of token ids end to end, without padding; every token but a document's first is a target."""
    lengths = [len(each) for each in documents]
    return PackedBatch(
        tokens=np.concatenate(documents).astype(np.int64),
        labels=np.concatenate([np.append(each[1:], IGNORE) for each in documents]).astype(np.int64),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        max_seqlen=max(lengths),
        source_ids=np.zeros(len(documents), np.int32),
        num_valid=sum(lengths) - len(documents),
    )
