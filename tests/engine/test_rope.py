"""Rotary tables: equal to transformers' to the last bit, for every kind of scaling; growth, limit, dtype."""

import json

import pytest
import torch

from steep.engine.config import ModelConfig
from steep.engine.rope import RopeTables, inverse_frequencies
from tests.engine.parity import decoder_like, documents, our_results, packed, tiny_transformers

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "llama3_default_context": {"rope_type": "llama3", "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4},
    "yarn": YARN,
    "yarn_default_context": {"rope_type": "yarn", "factor": 4.0},
    "yarn_no_truncate": YARN | {"truncate": False},
    "yarn_betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
    "yarn_attention_factor": YARN | {"attention_factor": 1.25},
    "yarn_mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn_mscale_alone": YARN | {"mscale": 1.0},
    "yarn_factor_1": YARN | {"factor": 1.0},
    "yarn_ramp_of_no_width": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
}


def both(kind: str, theta: float, head_dim: int):
    from transformers import LlamaConfig

    hf = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=10000,
        rope_parameters={"rope_theta": theta, **KINDS[kind]},
    )
    return hf, ModelConfig.from_dict(json.loads(hf.to_json_string()))


@pytest.mark.parametrize("head_dim", [64, 128, 80])
@pytest.mark.parametrize("theta", [10000.0, 1000000.0, 500000])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_equal_transformers_to_the_bit(kind, theta, head_dim):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf, config = both(kind, theta, head_dim)
    inv_freq, attention_factor = inverse_frequencies(config)
    if kind != "default":
        hf_inv_freq, hf_attention_factor = ROPE_INIT_FUNCTIONS[hf.rope_parameters["rope_type"]](hf)
        assert torch.equal(inv_freq, hf_inv_freq)
        assert attention_factor == hf_attention_factor
    hf_cos, hf_sin = LlamaRotaryEmbedding(hf)(torch.zeros(1), torch.arange(10000)[None])
    cos, sin = RopeTables(config).get(10000, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos, hf_cos[0, :, : head_dim // 2])
    assert torch.equal(sin, hf_sin[0, :, : head_dim // 2])


def test_growing_keeps_the_rows_and_stops_at_the_limit():
    tables = RopeTables(both("yarn", 10000.0, 64)[1])
    cpu = torch.device("cpu")
    small, _ = tables.get(5, cpu)
    assert len(small) == 8
    assert tables.get(8, cpu)[0] is small
    large, _ = tables.get(9000, cpu)
    assert len(large) == 10000
    assert torch.equal(large[:8], small)
    with pytest.raises(ValueError, match="10001 tokens: max_position_embeddings of this model is 10000"):
        tables.get(10001, cpu)
    assert tables.get(4, torch.device("meta"))[1].is_meta
    assert torch.equal(tables.get(8, cpu)[0][:8], small)


def test_casting_the_model_leaves_the_tables_in_fp32():
    decoder = decoder_like(tiny_transformers("llama"))
    docs = documents([9], 97)
    decoder(*packed(docs))
    decoder.bfloat16()
    our_results(decoder, docs)
    assert decoder.rope_tables.cos.dtype == torch.float32


def test_tables_made_in_inference_serve_training():
    decoder = decoder_like(tiny_transformers("llama"))
    docs = documents([9], 97)
    with torch.inference_mode():
        decoder(*packed(docs))
    our_results(decoder, docs)
