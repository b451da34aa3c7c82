"""ModelConfig: published config.json files read as transformers reads them; everything else refused by name."""

import json

import pytest
import torch

from steep.engine.config import ModelConfig

# The config.json files of released models (transformers 4), with the keys they have.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 32000,
}
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
MISTRAL_SMALL_24B = MISTRAL_7B | {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "rope_theta": 100000000.0,
    "sliding_window": None,
    "transformers_version": "4.48.0",
    "vocab_size": 131072,
}
MIXTRAL_8X7B = MISTRAL_7B | {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "transformers_version": "4.36.0.dev0",
}
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN2_5_7B_YARN = QWEN2_5_7B | {
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "llama_1": LLAMA_1,
    "llama_3_1": LLAMA_3_1_8B,
    "smollm2": SMOLLM2_135M,
    "mistral_7b": MISTRAL_7B,
    "mistral_no_window_key": {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"},
    "mistral_small": MISTRAL_SMALL_24B,
    "mistral_null_head_dim": MISTRAL_7B | {"head_dim": None},
    "mixtral": MIXTRAL_8X7B,
    "mixtral_defaults": {
        key: value
        for key, value in MIXTRAL_8X7B.items()
        if key not in ("sliding_window", "rope_theta", "router_aux_loss_coef", "output_router_logits")
    },
    "mixtral_sliding": MIXTRAL_8X7B | {"sliding_window": 4096, "output_router_logits": True},
    "qwen2_5": QWEN2_5_7B,
    "qwen2_5_yarn": QWEN2_5_7B_YARN,
    "qwen2_5_sliding": QWEN2_5_7B | {"use_sliding_window": True, "max_window_layers": 20},
    "qwen3": QWEN3_0_6B,
    "qwen3_sliding": QWEN3_0_6B | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 3},
}


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read_as_transformers_reads_them(name, layout, tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    hf = AutoConfig.from_pretrained(tmp_path)
    if layout == "transformers 5":
        hf.save_pretrained(tmp_path)
        assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    ours = ModelConfig.from_folder(tmp_path)

    for key in (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "bos_token_id"),
    ):
        assert getattr(ours, key) == getattr(hf, key)
    assert ours.head_dim == getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    assert ours.torch_dtype == hf.dtype
    assert list(ours.eos_token_ids) == (hf.eos_token_id if isinstance(hf.eos_token_id, list) else [hf.eos_token_id])
    rope = dict(hf.rope_parameters)
    assert ours.rope_theta == rope.pop("rope_theta")
    rope.pop("type", None)
    assert (ours.rope_scaling or {"rope_type": "default"}) == rope
    window = getattr(hf, "sliding_window", None)
    all_layers = ["sliding_attention" if window else "full_attention"] * hf.num_hidden_layers
    kinds = getattr(hf, "layer_types", None) or all_layers
    assert ours.layer_windows == tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert ours.sliding_window == window
    assert (ours.attention_bias, ours.o_bias) == (hf.model_type == "qwen2", False)
    assert ours.qk_norm == (hf.model_type == "qwen3")
    for key, dense in {
        **{"num_local_experts": None, "num_experts_per_tok": None},
        **{"router_aux_loss_coef": 0.0, "output_router_logits": False},
    }.items():
        assert getattr(ours, key) == getattr(hf, key, dense)


def test_what_the_yardstick_models_are():
    mistral = ModelConfig.from_dict(MISTRAL_SMALL_24B)
    assert mistral.num_attention_heads * mistral.head_dim == 4096 != mistral.hidden_size
    assert set(mistral.layer_windows) == {None}
    assert ModelConfig.from_dict(MISTRAL_7B).layer_windows == (4096,) * 32
    assert ModelConfig.from_dict(PUBLISHED["qwen3_sliding"]).layer_windows == (None,) * 3 + (512,) * 25
    assert ModelConfig.from_dict(LLAMA_3_1_8B).eos_token_ids == (128001, 128008, 128009)
    assert ModelConfig.from_dict(LLAMA_1 | {"eos_token_id": None, "torch_dtype": None}).eos_token_ids == ()
    assert ModelConfig.from_dict(LLAMA_1).torch_dtype == torch.float16
    biased = ModelConfig.from_dict(LLAMA_1 | {"attention_bias": True})
    assert (biased.attention_bias, biased.o_bias) == (True, True)
    biased = ModelConfig.from_dict(QWEN3_0_6B | {"attention_bias": True})
    assert (biased.attention_bias, biased.o_bias) == (True, True)


def test_layer_types_are_obeyed_for_qwen():
    kinds = ["sliding_attention", "full_attention"] * 14
    values = QWEN3_0_6B | {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}
    assert ModelConfig.from_dict(values).layer_windows == (8, None) * 14
    full = LLAMA_1 | {"layer_types": ["full_attention"] * 32}
    assert set(ModelConfig.from_dict(full).layer_windows) == {None}


LLAMA3 = LLAMA_3_1_8B["rope_scaling"]
REFUSED = {
    "model_type": (LLAMA_1 | {"model_type": "gemma2"}, "model_type is 'gemma2'; allowed: llama, mistral, mixtral,"),
    "no model_type": ({"hidden_size": 8}, "model_type is missing"),
    "architecture": (
        LLAMA_1 | {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures is \['LlamaForSequenceClassification'\].*allowed: \['LlamaForCausalLM'\]",
    ),
    "activation": (QWEN3_0_6B | {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*allowed: 'silu'"),
    "mlp bias": (LLAMA_1 | {"mlp_bias": True}, "mlp_bias is True.*allowed: False"),
    "dropout": (LLAMA_1 | {"attention_dropout": 0.1}, "attention_dropout is 0.1.*allowed: 0"),
    "mistral bias": (MISTRAL_7B | {"attention_bias": True}, "attention_bias is True.*allowed: False"),
    "mixtral bias": (MIXTRAL_8X7B | {"attention_bias": True}, "attention_bias is True.*allowed: False"),
    "jitter": (MIXTRAL_8X7B | {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1.*allowed: 0"),
    "no experts": (MIXTRAL_8X7B | {"num_local_experts": None}, "num_local_experts is missing; allowed: a positive"),
    "no active experts": (MIXTRAL_8X7B | {"num_experts_per_tok": 0}, "num_experts_per_tok is 0; allowed: a positive"),
    "too many active": (
        MIXTRAL_8X7B | {"num_experts_per_tok": 9},
        "num_experts_per_tok is 9 and num_local_experts is 8; allowed: num_experts_per_tok <= num_local_experts <= 10",
    ),
    "too many experts": (MIXTRAL_8X7B | {"num_local_experts": 2000}, "num_local_experts is 2000"),
    "aux loss": (MIXTRAL_8X7B | {"router_aux_loss_coef": -1}, "router_aux_loss_coef is -1.0; allowed: a number, 0 or"),
    "router logits": (MIXTRAL_8X7B | {"output_router_logits": 1}, "output_router_logits is 1; allowed: true, false"),
    "dense experts": (MISTRAL_7B | {"num_local_experts": 8}, "num_local_experts is 8: this key is not known"),
    "qwen2 no bias": (QWEN2_5_7B | {"attention_bias": False}, "attention_bias is False.*allowed: True"),
    "partial rotary": (LLAMA_1 | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*allowed: 1"),
    "interleaved": (LLAMA_1 | {"rope_interleaved": True}, "rope_interleaved is True.*allowed: False"),
    "softcap": (LLAMA_1 | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0.*not known.*'llama'"),
    "scale": (LLAMA_1 | {"logit_scale": 0.25}, "logit_scale is 0.25: this key is not known"),
    "quantised": (LLAMA_1 | {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "unknown key": (LLAMA_1 | {"residual_multiplier": 0.2}, "residual_multiplier is 0.2.*allowed: null or no such key"),
    "llama window": (LLAMA_1 | {"sliding_window": 4096}, "sliding_window is 4096: this key is not known"),
    "key of a sister": (MISTRAL_7B | {"max_window_layers": 3}, "max_window_layers is 3: this key is not known"),
    "size": (LLAMA_1 | {"hidden_size": "4096"}, "hidden_size is '4096'; allowed: a positive integer"),
    "zero": (LLAMA_1 | {"vocab_size": 0}, "vocab_size is 0; allowed: a positive integer"),
    "bool": (LLAMA_1 | {"num_hidden_layers": True}, "num_hidden_layers is True; allowed: a positive integer"),
    "missing size": ({k: v for k, v in LLAMA_1.items() if k != "rms_norm_eps"}, "rms_norm_eps is missing"),
    "eps": (LLAMA_1 | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; allowed: a positive number"),
    "tied": (LLAMA_1 | {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; allowed: true, false"),
    "kv heads": (LLAMA_1 | {"num_key_value_heads": 5}, "heads is 32 and num_key_value_heads is 5; allowed: a divisor"),
    "no kv heads": (MISTRAL_7B | {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    "indivisible": (LLAMA_1 | {"num_attention_heads": 3}, "head_dim is missing, and hidden_size 4096"),
    "qwen3 head_dim": (QWEN3_0_6B | {"head_dim": None}, "head_dim is missing"),
    "odd head_dim": (LLAMA_1 | {"head_dim": 5}, "head_dim is 5; allowed: even"),
    "dtype": (LLAMA_1 | {"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'; allowed: float32"),
    "eos": (LLAMA_1 | {"eos_token_id": "</s>"}, "eos_token_id is '</s>'; allowed: a token id"),
    "layer_types kind": (
        QWEN3_0_6B | {"layer_types": ["linear_attention"] * 28},
        "layer_types is .*28 values from full_attention",
    ),
    "layer_types count": (QWEN3_0_6B | {"layer_types": ["full_attention"] * 27}, "layer_types is .*28 values"),
    "sliding without window": (QWEN3_0_6B | {"layer_types": ["sliding_attention"] * 28}, "layer_types is "),
    "layer_types of mistral": (MISTRAL_7B | {"layer_types": ["full_attention"] * 32}, "32 times 'sliding_attention'"),
    "rope kind": (
        LLAMA_1 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling: type is 'dynamic'; allowed: default, linear, llama3, yarn",
    ),
    "longrope": (LLAMA_1 | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type is 'longrope'"),
    "rope parameter": (
        LLAMA_1 | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 3}},
        "rope_scaling: beta_fast is 3; allowed parameters of 'linear': factor",
    ),
    "rope no factor": (LLAMA_1 | {"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    "rope factor": (LLAMA_1 | {"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor is -1.0; allowed"),
    "llama3 bounds": (LLAMA_1 | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0 and"),
    "truncate": (LLAMA_1 | {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 1}}, "truncate is 1"),
    "rope partial": (
        LLAMA_1 | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        "rope_parameters: partial_rotary_factor is 0.25; allowed: 1",
    ),
    "nested rope": (
        QWEN3_0_6B | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "rope_parameters: full_attention is {'rope_type': 'default'}",
    ),
    "rope twice": (
        LLAMA_1 | {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
        "rope_scaling and rope_parameters differ",
    ),
    "theta twice": (
        LLAMA_1 | {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_theta is 10000.0 and, in .*rope_parameters, 1000000.0",
    ),
    "type twice": (
        LLAMA_1 | {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2}},
        "type is 'linear' and rope_type is 'default'",
    ),
    "rope no object": (LLAMA_1 | {"rope_scaling": "linear"}, "rope_scaling is 'linear'; allowed: an object or null"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name):
    values, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_dict(values)
    assert str(error.value).startswith("config.json: ")


def test_null_means_absent():
    null = {"mlp_bias": None, "quantization_config": None, "final_logit_softcapping": None, "rope_parameters": None}
    assert ModelConfig.from_dict(LLAMA_1 | null) == ModelConfig.from_dict(LLAMA_1)


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=f"{path}: no such file"):
        ModelConfig.from_folder(tmp_path)
    for content, message in ((b'{"a": ', "not valid JSON"), (b"[1]", "is a JSON list"), (b'"\xff"', "not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            ModelConfig.from_folder(tmp_path)
