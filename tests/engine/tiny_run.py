"""A tiny model folder, token stores and a recipe, for the tests of recipe, trainer and checkpoints. No transformers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from steep.data import tokenize_files
from steep.engine import Decoder, ModelConfig, SafetensorsWriter
from steep.engine.weights import hf_tensors

WORDS = ["heart", "lung", "fever", "cough", "dose", "patient", "acute", "renal", "blood", "test"]


def make_model(folder: Path, vocab_size: int = 300) -> Path:
    """A llama of two layers with random weights and a byte-level tokenizer of 257 ids (bytes and `</s>`)."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_weights(folder, config)

    vocabulary = {symbol: id for id, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def _write_weights(folder: Path, config: dict[str, Any]) -> None:
    """Random weights of the shapes that the config says."""
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_dict(config))
    specs = [(name, torch.float32, placement.shape) for name, placement in hf_tensors(decoder).items()]
    generator = torch.Generator().manual_seed(0)
    with SafetensorsWriter(folder, specs) as writer:
        for name, dtype, shape in specs:
            matrix = len(shape) == 2
            tensor = torch.randn(shape, generator=generator) * 0.1 if matrix else torch.ones(shape, dtype=dtype)
            writer.write(name, tensor)


def make_store(out: Path, model: Path, seed: int, documents: int = 60) -> Path:
    """A token store of short random sentences; another seed, other sentences."""
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=generator.randint(1, 25))) for _ in range(documents)]
    file = out.with_suffix(".jsonl")
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenize_files([file], model, out, workers=1)
    return out


def make_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    """Model and stores below `root` (made if not there), and the values of a recipe that trains 12 steps on them."""
    model = root / "base"
    if not model.exists():
        make_model(model)
        for name, seed in (("domain", 1), ("general", 2), ("held_out", 3)):
            make_store(root / name, model, seed)
    return {
        "model": str(model),
        "out": str(root / "out"),
        "data": {
            "seq_len": 64,
            "seed": 7,
            "sources": [
                {"name": "domain", "store": str(root / "domain"), "weight": 3},
                {"name": "general", "store": str(root / "general"), "weight": 1},
            ],
            "validation": [{"name": "held_out", "store": str(root / "held_out")}],
        },
        "schedule": {"kind": "cosine", "lr": 3e-3, "end_lr": 3e-4, "warmup_steps": 3},
        "batch": {"sequences": 2, "micro_batches": 2},
        "steps": 12,
        "precision": "float32",
        "device": "cpu",
        "validation": {"every": 6, "sequences": 8},
        "checkpoint": {"every": 4, "keep": 2},
        "log": {"every": 1},
        **changes,
    }


def write_recipe(root: Path, **changes: Any) -> Path:
    """`make_recipe` as a file."""
    values = make_recipe(root, **changes)
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def make_mixtral(folder: Path, tokenizer: Path) -> Path:
    """A mixture of four experts of which two are active, with the tokenizer of another folder."""
    folder.mkdir(parents=True)
    config = json.loads((tokenizer / "config.json").read_text()) | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "output_router_logits": True,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_weights(folder, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder
