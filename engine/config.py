"""What a decoder computes: `ModelConfig`, read from the `config.json` of a Hugging Face model folder.

Families: llama, mistral, mixtral, qwen2 (and 2.5), qwen3, in the layouts of transformers 4 and 5. Knows nothing of
weights or modules. A key that changes the mathematics in a way that `model.py` does not compute is refused by name, and
so is every key that is not known at all: a wrong model that runs is worse than one that does not load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.files import read_json

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
MAX_EXPERTS = 1024  # of `kernels.route`
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# The parameters of each kind of rotary scaling: those it must have, those it may have. Formulas: `rope.py`.
ROPE_PARAMETERS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "beta_fast",
            "beta_slow",
            "truncate",
        },
    ),
}

# Keys read below, by family.
_READ = {
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "layer_types", "attention_bias"),
    *("torch_dtype", "dtype", "bos_token_id", "eos_token_id"),
}
_READ_BY_FAMILY: dict[str, set[str]] = {
    "llama": set(),
    "mistral": {"sliding_window"},
    "mixtral": {
        *("sliding_window", "num_local_experts", "num_experts_per_tok"),
        *("output_router_logits", "router_aux_loss_coef"),
    },
    "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers"},
    "qwen3": {"sliding_window", "use_sliding_window", "max_window_layers"},
}

# Keys that change the mathematics, with the only values under which they do not. Dropout counts: transformers applies
# it in training, and steep trains without.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "chunk_size_feed_forward": (0,),
}
_NEUTRAL_BY_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {"use_sliding_window": (False,)},
    "mistral": {"attention_bias": (False,), "use_sliding_window": (False,)},
    "mixtral": {"attention_bias": (False,), "use_sliding_window": (False,), "router_jitter_noise": (0,)},
    "qwen2": {"attention_bias": (True,)},
    "qwen3": {},
}

# Keys that say nothing about the logits: bookkeeping, initialisation, other heads, and defaults of text generation.
_HARMLESS = {
    *("transformers_version", "_name_or_path", "_model_name_or_path", "_commit_hash", "name_or_path"),
    *("is_llama_config", "tokenizer_class", "initializer_range", "use_cache", "pretraining_tp"),
    *("pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id"),
    *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss"),
    *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "prefix"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "is_decoder"),
    *("max_sequence_length", "model_max_length", "unsloth_fixed", "unsloth_version", "transformers.js_config"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty"),
    *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
    *("encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
    *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The mathematics of a decoder. Field names are those of Hugging Face where they mean the same.

    `attention_bias`: q, k and v projections have a bias; `o_bias`: the output projection too; `qk_norm`: RMSNorm over
    each head of q and k before the rotation. `layer_windows[i]`: the number of last keys, itself included, that a token
    sees in layer i (None: all). `rope_scaling`: None, or {"rope_type": "linear" | "llama3" | "yarn", its parameters}.
    `torch_dtype`: the dtype that the weights are said to have, None where the file does not say.

    `num_local_experts`, `num_experts_per_tok`: of the mixture that each MLP is; None, None for dense models.
    `router_aux_loss_coef`: what the load-balancing loss is multiplied by where `output_router_logits` asks for it (in
    transformers' training; released models do not ask for it).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    o_bias: bool
    qk_norm: bool
    sliding_window: int | None
    layer_windows: tuple[int | None, ...]
    torch_dtype: torch.dtype | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Read `folder/config.json`. FileNotFoundError if there is none, ValueError if it cannot be computed."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a Hugging Face model folder has a config.json")
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Read the content of a `config.json`, called `source` in messages. ValueError names key, value and allowed."""
        if values.get("model_type") == "mistral":  # transformers: no key is its default window, null is no window
            values = {"sliding_window": 4096} | values
        given = _Given({key: value for key, value in values.items() if value is not None}, source)  # null means absent
        family = given.one_of("model_type", tuple(ARCHITECTURES))
        _refuse_unsupported(given, family)

        heads, hidden_size = given.positive_int("num_attention_heads"), given.positive_int("hidden_size")
        # transformers has a default per family for these two; only llama's says something about the model at hand
        kv_heads = given.positive_int("num_key_value_heads", default=heads if family == "llama" else None)
        if "head_dim" not in given.values and (family == "qwen3" or hidden_size % heads):
            raise ValueError(
                f"{source}: head_dim is missing, and hidden_size {hidden_size} / num_attention_heads {heads} cannot "
                "stand for it; allowed: a positive even integer"
            )
        head_dim = given.positive_int("head_dim", default=hidden_size // heads)
        if head_dim % 2:
            raise ValueError(f"{source}: head_dim is {head_dim}; allowed: even numbers (rotary embedding turns pairs)")
        if heads % kv_heads:
            raise ValueError(
                f"{source}: num_attention_heads is {heads} and num_key_value_heads is {kv_heads}; allowed: a divisor"
            )

        num_layers = given.positive_int("num_hidden_layers")
        sliding_window, layer_windows = _windows(given, family, num_layers)
        max_positions = given.positive_int("max_position_embeddings")
        rope_theta, rope_scaling = _rope(given, max_positions, default_theta=1e6 if family == "mixtral" else 1e4)
        # mistral and mixtral have none: _NEUTRAL_BY_FAMILY
        bias = family == "qwen2" or given.boolean("attention_bias", default=False)
        return cls(
            model_type=family,
            vocab_size=given.positive_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=given.positive_int("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=given.positive_number("rms_norm_eps"),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=max_positions,
            tie_word_embeddings=given.boolean("tie_word_embeddings", default=False),
            attention_bias=bias,
            o_bias=bias and family != "qwen2",
            qk_norm=family == "qwen3",
            sliding_window=sliding_window,
            layer_windows=layer_windows,
            torch_dtype=_dtype(given),
            bos_token_id=given.token_ids("bos_token_id")[0] if "bos_token_id" in given.values else None,
            eos_token_ids=given.token_ids("eos_token_id"),
            **(_mixture(given) if family == "mixtral" else {}),
        )


@dataclass(frozen=True)
class _Given:
    """The keys of one JSON object, read with a check of their types; `source` says where it stands."""

    values: dict[str, Any]
    source: str

    def get(self, key: str, kind: type | tuple[type, ...], default: Any, allowed: str) -> Any:
        value = self.values.get(key, default)
        # bool is a subclass of int, and `true` for a size is a mistake
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = "missing" if value is None else repr(value)
            raise ValueError(f"{self.source}: {key} is {found}; allowed: {allowed}")
        return value

    def positive_int(self, key: str, default: int | None = None) -> int:
        value = self.get(key, int, default, "a positive integer")
        if value <= 0:
            raise ValueError(f"{self.source}: {key} is {value}; allowed: a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = float(self.get(key, (int, float), default, "a number, 0 or more"))
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{self.source}: {key} is {value}; allowed: a number, 0 or more")
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        value = float(self.get(key, (int, float), default, "a positive number"))
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{self.source}: {key} is {value}; allowed: a positive number")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        return self.get(key, bool, default, "true, false")

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self.get(key, str, default, ", ".join(allowed))
        if value not in allowed:
            raise ValueError(f"{self.source}: {key} is {value!r}; allowed: {', '.join(allowed)}")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids."""
        value = self.values.get(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"{self.source}: {key} is {value!r}; allowed: a token id, or a list of them")
        return tuple(ids)


def _refuse_unsupported(given: _Given, family: str) -> None:
    architectures = given.values.get("architectures", [ARCHITECTURES[family]])
    if architectures != [ARCHITECTURES[family]]:
        raise ValueError(
            f"{given.source}: architectures is {architectures!r} for model_type {family!r}; "
            f"allowed: [{ARCHITECTURES[family]!r}]"
        )
    neutral = _NEUTRAL | _NEUTRAL_BY_FAMILY[family]
    known = _READ | _READ_BY_FAMILY[family] | _HARMLESS | set(neutral)
    for key, value in given.values.items():
        if key in neutral and value not in neutral[key]:
            allowed = " or ".join(map(repr, neutral[key]))
            raise ValueError(f"{given.source}: {key} is {value!r}, which steep does not compute; allowed: {allowed}")
        if key not in known:
            raise ValueError(
                f"{given.source}: {key} is {value!r}: this key is not known for model_type {family!r} and may change "
                "what the model computes; allowed: null or no such key, if you know that it does not"
            )


def _windows(given: _Given, family: str, num_layers: int) -> tuple[int | None, tuple[int | None, ...]]:
    """(sliding_window, window of each layer): mistral slides in all layers, qwen from max_window_layers on."""
    qwen = family in ("qwen2", "qwen3")
    slides = "sliding_window" in given.values and (not qwen or given.boolean("use_sliding_window", default=False))
    window = given.positive_int("sliding_window") if slides else None
    first = given.get("max_window_layers", int, 28, "an integer") if qwen else 0
    kinds = ["sliding_attention" if slides and i >= first else "full_attention" for i in range(num_layers)]

    stated = given.values.get("layer_types", kinds)
    # transformers obeys layer_types for qwen only; for the others it must say what they do anyway
    allowed = {"full_attention", "sliding_attention"} if slides else {"full_attention"}
    obeyed = qwen and isinstance(stated, list) and len(stated) == num_layers and all(kind in allowed for kind in stated)
    if stated != kinds and not obeyed:
        raise ValueError(
            f"{given.source}: layer_types is {stated!r}; allowed for this {family} model: "
            + (f"{num_layers} values from {', '.join(sorted(allowed))}" if qwen else f"{num_layers} times {kinds[0]!r}")
        )
    return window, tuple(window if kind == "sliding_attention" else None for kind in stated)


def _mixture(given: _Given) -> dict[str, Any]:
    """The fields of a mixture of experts; defaults, where the file may be silent, are transformers'."""
    experts, per_token = given.positive_int("num_local_experts"), given.positive_int("num_experts_per_tok")
    if not per_token <= experts <= MAX_EXPERTS:
        raise ValueError(
            f"{given.source}: num_experts_per_tok is {per_token} and num_local_experts is {experts}; "
            f"allowed: num_experts_per_tok <= num_local_experts <= {MAX_EXPERTS}"
        )
    return {
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "router_aux_loss_coef": given.number("router_aux_loss_coef", default=0.001),
        "output_router_logits": given.boolean("output_router_logits", default=False),
    }


def _rope(given: _Given, max_positions: int, default_theta: float) -> tuple[float, dict[str, Any] | None]:
    """(rope_theta, rope_scaling) from `rope_scaling` + `rope_theta` (transformers 4) or `rope_parameters` (5)."""
    source = given.source
    stated = {key: given.get(key, dict, {}, "an object or null") for key in ("rope_scaling", "rope_parameters")}
    if all(stated.values()) and stated["rope_scaling"] != stated["rope_parameters"]:
        raise ValueError(f"{source}: rope_scaling and rope_parameters differ: {stated}; allowed: one of them")
    rope = {k: v for k, v in (stated["rope_scaling"] or stated["rope_parameters"]).items() if v is not None}
    inner = _Given(rope, f"{source}: rope_parameters" if stated["rope_parameters"] else f"{source}: rope_scaling")

    theta = given.positive_number("rope_theta", default=default_theta)
    if "rope_theta" in rope:
        theta = inner.positive_number("rope_theta")
        if given.values.get("rope_theta", theta) != theta:
            raise ValueError(f"{source}: rope_theta is {given.values['rope_theta']} and, in {inner.source}, {theta}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"{inner.source}: partial_rotary_factor is {rope['partial_rotary_factor']!r}; allowed: 1")

    kinds = tuple(ROPE_PARAMETERS)
    kind = inner.one_of("rope_type" if "rope_type" in rope else "type", kinds, default="default")
    if inner.one_of("type", kinds, default=kind) != kind:
        raise ValueError(f"{inner.source}: type is {rope['type']!r} and rope_type is {kind!r}; allowed: the same")
    required, optional = ROPE_PARAMETERS[kind]
    read = {"rope_theta", "partial_rotary_factor", "rope_type", "type"}
    parameters = {key: value for key, value in rope.items() if key not in read}
    for key in sorted(parameters.keys() - required - optional):
        allowed = ", ".join(sorted(required | optional)) or "none"
        raise ValueError(f"{inner.source}: {key} is {parameters[key]!r}; allowed parameters of {kind!r}: {allowed}")
    for key in sorted(required | parameters.keys()):
        if key == "truncate":
            inner.boolean(key, default=True)
        else:
            inner.positive_number(key)
    if kind == "default":
        return theta, None
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(
            f"{inner.source}: high_freq_factor is {rope['high_freq_factor']} and low_freq_factor is "
            f"{rope['low_freq_factor']}; allowed: the first greater"
        )
    if kind in ("llama3", "yarn"):
        parameters.setdefault("original_max_position_embeddings", max_positions)
    return theta, {"rope_type": kind} | parameters


def _dtype(given: _Given) -> torch.dtype | None:
    """`dtype` (transformers 5) or `torch_dtype` (4)."""
    key = "dtype" if "dtype" in given.values else "torch_dtype"
    return DTYPES[given.one_of(key, tuple(DTYPES))] if key in given.values else None
