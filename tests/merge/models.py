"""Tiny llama folders for the merge tests: written with the safetensors library, not with steep's own writer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

LAYERS, HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS = 3, 64, 96, 320, 4, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def shapes(*, tied: bool = False, layers: int = LAYERS, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    kv = HIDDEN // HEADS * KV_HEADS
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.v_proj.weight": (kv, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    found["model.norm.weight"] = (HIDDEN,)
    return found if tied else found | {"lm_head.weight": (vocab, HIDDEN)}


def random_tensors(seed: int, **kind: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.02 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in shapes(**kind).items()
    }


def sibling(tensors: Mapping[str, torch.Tensor], seed: int, size: float = 2e-3) -> dict[str, torch.Tensor]:
    """The tensors with a task vector added that is zero in 30 % of the elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: x + size * torch.randn(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < 0.7)
        for name, x in tensors.items()
    }


def write_model(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    **config: Any,
) -> Path:
    """A Hugging Face folder with config.json and 1 or more safetensors files."""
    folder.mkdir(parents=True)
    stored = {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}
    written = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")} | config
    (folder / "config.json").write_text(json.dumps(written))
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(stored), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: stored[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_model(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_yaml(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return path


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().numpy().tobytes() if x.dtype != torch.bfloat16 else bits(x.view(torch.int16))
