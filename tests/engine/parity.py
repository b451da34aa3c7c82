"""Comparison with transformers, for the tests of model, cache, generation and weights: tiny models of every family with
random weights, the same weights in our decoder, and both models' logits, loss and gradients on the same documents."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from steep.engine.config import ModelConfig
from steep.engine.model import Decoder

IGNORE_INDEX = -100
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(kind: str, theta: float = 10000.0, **parameters) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


# Every path of the decoder at least once; settings are transformers', on top of _SIZES.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama_tied_mha": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_attention_bias": ("llama", {"attention_bias": True}),
    "llama_linear": ("llama", _rope("linear", factor=2.5)),
    "llama_llama3": (
        "llama",
        _rope(
            *("llama3", 500.0),
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama_yarn": ("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral_window": ("mistral", {"sliding_window": 4, "head_dim": 20}),
    "mistral_full": ("mistral", {"sliding_window": None, "head_dim": 20, **_rope("default", 1e6)}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_untied": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral_window": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 4}),
    "qwen3_bias_tied": ("qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
}


def tiny_transformers(case: str, attention: str = "eager", **overrides):
    """A transformers model of CASES in fp32 with random weights: large enough that attention is far from uniform, small
    enough that the gradients, in fp32 and transformers' own, are within 3e-6 of those in fp64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, settings = CASES[case]
    config = AutoConfig.for_model(family, **(_SIZES | settings | overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    return model.eval()


def config_of(hf) -> ModelConfig:
    """Our configuration, from the config.json that transformers would write for this model."""
    return ModelConfig.from_dict(json.loads(hf.config.to_json_string()))


def hf_parts(name: str, tensor: Tensor, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Transformers' name, in memory, and rows of every tensor that one of our parameters (or its gradient) holds."""
    if name == "lm_head.weight":
        yield name, tensor
        return
    if not name.startswith("layers."):
        yield "model." + name, tensor
        return
    _, index, module, kind = name.split(".")
    if module == "experts":
        yield f"model.layers.{index}.mlp.experts.{kind}_proj", tensor.unflatten(0, (config.num_local_experts, -1))
        return
    sizes = [n * config.head_dim for n in (config.num_attention_heads, *2 * [config.num_key_value_heads])]
    parts = {
        "qkv": list(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), sizes)),
        "gate_up": [("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size)],
        "o": [("self_attn.o_proj", len(tensor))],
        "down": [("mlp.down_proj", len(tensor))],
        "router": [("mlp.gate", len(tensor))],
        "q_norm": [("self_attn.q_norm", len(tensor))],
        "k_norm": [("self_attn.k_norm", len(tensor))],
        "input_norm": [("input_layernorm", len(tensor))],
        "post_norm": [("post_attention_layernorm", len(tensor))],
    }[module]
    for (hf_module, _), rows in zip(parts, tensor.split([size for _, size in parts])):
        yield f"model.layers.{index}.{hf_module}.{kind}", rows


def decoder_like(hf) -> Decoder:
    """Our decoder with the weights of a transformers model; every tensor of either must find its place in the other."""
    config = config_of(hf)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu").to(hf.dtype)
    theirs = dict(hf.named_parameters())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            for hf_name, rows in hf_parts(name, parameter, config):
                rows.copy_(theirs.pop(hf_name))
    assert not theirs, f"not taken over: {sorted(theirs)}"
    return decoder


def documents(lengths: list[int], vocab_size: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator) for length in lengths]


def packed(docs: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
    """(tokens, positions, cu_seqlens, max_seqlen) of documents laid end to end: the decoder's arguments."""
    lengths = torch.tensor([len(doc) for doc in docs])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return torch.cat(docs), torch.cat([torch.arange(len(doc)) for doc in docs]).int(), cu_seqlens, int(lengths.max())


def labels_of(docs: list[Tensor]) -> Tensor:
    """The next token of every token, none at the end of a document."""
    return torch.cat([F.pad(doc[1:], (0, 1), value=IGNORE_INDEX) for doc in docs])


def our_results(decoder: Decoder, docs: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits [T, V], mean loss per label, gradients under transformers' names) of the documents in one packed pass."""
    decoder.zero_grad()
    labels = labels_of(docs)
    hidden_TD = decoder(*packed(docs))
    scale = 1 / (labels != IGNORE_INDEX).sum().float()
    loss, _ = decoder.loss(hidden_TD, labels, scale=scale)
    loss.backward()
    gradients = {
        hf_name: rows
        for name, parameter in decoder.named_parameters()
        for hf_name, rows in hf_parts(name, parameter.grad, decoder.config)
    }
    return decoder.logits(hidden_TD.detach()), loss.detach(), gradients


def hf_results(hf, docs: list[Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same from transformers, one document at a time."""
    hf.zero_grad()
    logits = [hf(doc[None], use_cache=False).logits[0].float() for doc in docs]
    loss = F.cross_entropy(torch.cat(logits), labels_of(docs), ignore_index=IGNORE_INDEX)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in hf.named_parameters()}
    return torch.cat(logits).detach(), loss.detach(), gradients


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def assert_parity(hf, decoder: Decoder, docs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Logits, loss and every single gradient within a relative tolerance."""
    logits, loss, gradients = our_results(decoder, docs)
    hf_logits, hf_loss, hf_gradients = hf_results(hf, docs)
    errors = {"logits": relative_error(logits, hf_logits), "loss": relative_error(loss, hf_loss)}
    assert gradients.keys() == hf_gradients.keys()
    errors |= {name: relative_error(gradients[name], hf_gradients[name]) for name in gradients}
    too_large = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not too_large, too_large
