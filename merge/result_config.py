"""The config.json of a merged model: the donor's, with what the merge changed. Pure functions on JSON objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .findings import Findings
from .vocabulary import OutputVocabulary, Tokens

# One entry a layer.
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers")
# What counts layers in another way and may be wrong once they have moved.
BY_POSITION = (
    *("mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace", "moe_layer_freq", "full_attention_interval"),
    *("sliding_window_pattern", "attn_layer_period", "attn_layer_offset", "expert_layer_period"),
    "cross_attention_layers",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part about the language model: `text_config` where several are nested."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else dict(config)


def set_value(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of the language model, where the configuration has it."""
    nested = config.get("text_config")
    if isinstance(nested, dict) and (key in nested or key not in config):
        nested[key] = value
    else:
        config[key] = value


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    nested = config.get("text_config")
    if isinstance(nested, dict):
        for key in nested.keys() & {"dtype", "torch_dtype"}:
            nested[key] = dtype


def set_layers(
    config: dict[str, Any],
    origins: Sequence[Sequence[tuple[int, int]]],
    configs: Mapping[int, Mapping[str, Any]],
    findings: Findings,
) -> None:
    """Number and kinds of the layers under slices.

    Args:
        origins: for each layer of the result the (model, layer) it is merged from; the first is the leading one.
        configs: of the models, by number.
    """
    before = text_config(config)
    old = before.get("num_hidden_layers")
    moved = [layers[0][1] for layers in origins] != list(range(old or 0))
    set_value(config, "num_hidden_layers", len(origins))
    for key in PER_LAYER:
        if key not in before:
            continue
        kinds = []
        for number, layers in enumerate(origins):
            found = [text_config(configs[model]).get(key, ())[layer : layer + 1] for model, layer in layers]
            if not all(found):
                findings.error(f"config.json: {key} has no entry for the layers that become layer {number}")
                break
            if any(kind != found[0] for kind in found):
                findings.warn(f"config.json: {key} differs between the layers that become layer {number}: {found}")
            kinds += found[0]
        set_value(config, key, kinds)
    window = before.get("max_window_layers")
    if moved and window is not None:
        if old is not None and window >= old:
            set_value(config, "max_window_layers", len(origins))
        elif before.get("use_sliding_window"):
            findings.warn(f"config.json: max_window_layers is {window}, and slices move layers: see that it still fits")
    for key in BY_POSITION:
        if moved and before.get(key):
            findings.warn(f"config.json: {key} is {before[key]!r}, and slices move layers: see that it still fits")


def set_vocabulary(
    config: dict[str, Any], vocabulary: OutputVocabulary, donors_tokens: Tokens | None, findings: Findings
) -> None:
    """`vocab_size`, and the ids of special tokens where the result's tokenizer counts otherwise than the donor's."""
    set_value(config, "vocab_size", vocabulary.rows)
    if donors_tokens is None or donors_tokens.ids == vocabulary.donor.ids:
        return
    names = {index: token for token, index in donors_tokens.ids.items()}
    for key in TOKEN_IDS:
        for place in (config, config.get("text_config")):
            if not isinstance(place, dict) or place.get(key) is None:
                continue
            ids = place[key] if isinstance(place[key], list) else [place[key]]
            new = [vocabulary.ids.get(names.get(index, ""), None) for index in ids]
            if None in new:
                findings.warn(f"config.json: {key} {place[key]} is no token of the result's tokenizer; it is kept")
            elif new != ids:
                place[key] = new if isinstance(place[key], list) else new[0]
                findings.note(f"config.json: {key} becomes {place[key]}, the same token in the result's tokenizer")
