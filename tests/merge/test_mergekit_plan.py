"""Vocabularies, slices, modules and adapters against mergekit 0.1.5, which merges all cases in one subprocess.

Rows of embedding and head are compared token by token: mergekit numbers new tokens by the order of a hash map. Where
the results differ it is mergekit's fault or steep's stated choice, and the test shows which.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steep.data.tokenizer import load_tokenizer
from steep.merge import merge
from steep.merge.compat import MERGEKIT
from steep.merge.vocabulary import read_tokens
from tests.merge.models import random_tensors, read_model, sibling, write_model, write_yaml

pytest.importorskip("mergekit")

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SPECIAL = ["<pad>", "<s>", "</s>"]


def source(model: str, first: int, last: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, last]} | ({"parameters": parameters} if parameters else {})


def weighted(model: str, weight: Any, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": {"weight": weight} | parameters}


BASED: dict[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [weighted("more", 0.7), weighted("other", 0.4)],
}
UNBASED: dict[str, Any] = {
    "merge_method": "linear",
    "models": [weighted("base", 0.5), weighted("more", 0.3), weighted("other", 0.4)],
}
RULES: dict[str, Any] = {
    "<more>": {"source": {"kind": "model_token", "model": "other", "token": "t5"}},
    "<other>": {"source": {"kind": "zero"}, "force": True},
    "u1": {"source": "other", "force": True},
    "t7": {"source": "more", "force": True},
    "<new>": {"source": {"kind": "model_token", "model": "more", "token_id": 11}},
}
STACKED = [
    {"sources": [source("base", 0, 2)]},
    {"sources": [source("a", 1, 3)], "parameters": {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}},
    {"sources": [source("b", 2, 3)]},
]
CASES: dict[str, dict[str, Any]] = {
    "union": BASED | {"tokenizer_source": "union"},
    "union_without_base": UNBASED | {"tokenizer_source": "union"},
    "union_ties": BASED | {"merge_method": "ties", "tokenizer": {"source": "union"}, "parameters": {"density": 0.6}},
    "base": BASED | {"tokenizer_source": "base"},
    "a_model": UNBASED | {"tokenizer": {"source": "other"}},
    "rules": BASED | {"tokenizer": {"source": "union", "tokens": RULES}},
    "rules_of_a_model": UNBASED | {"tokenizer": {"source": "more", "tokens": RULES}},
    "padded_to_64": BASED | {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
    "padded_exact": {
        "merge_method": "task_arithmetic",
        "base_model": "padded",
        "models": [weighted("more", 0.7)],
        "tokenizer": {"source": "base"},
    },
    "stacked": {"merge_method": "passthrough", "slices": STACKED},
    "repeated": {"merge_method": "passthrough", "slices": [STACKED[1], STACKED[1], STACKED[2]]},
    "moved_gradients": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("base", 0, 2, weight=[0.1, 0.7]), source("a", 1, 3, weight=0.4)]},
            {
                "sources": [
                    source("b", 0, 3, weight=[{"filter": "layers.1.", "value": 0.9}, {"value": [0.2, 0.5]}]),
                    source("a", 0, 3),
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": [0.3, 0.6, 0.1]}]},
            },
        ],
        "parameters": {"weight": 0.25},
    },
    "modules": {
        "merge_method": "slerp",
        "base_model": "base",
        "modules": {
            "default": {
                "slices": [
                    {"sources": [source("base", 0, 1), source("a", 0, 1)]},
                    {"sources": [source("b", 1, 3), source("a", 1, 3)], "base_model": "b", "parameters": {"t": 0.8}},
                ],
                "parameters": {"t": [{"filter": "mlp", "value": 0.3}]},
            }
        },
        "parameters": {"t": [0.4, 0.6]},
    },
    "modules_of_models": {
        "merge_method": "linear",
        "modules": {
            "default": {"models": [weighted("base", [0.1, 0.9]), {"model": "a"}], "parameters": {"weight": 0.6}},
        },
    },
    "uneven": {
        "merge_method": "linear",
        "slices": [
            {"sources": [source("base", 0, 1, weight=1.0)]},
            {"sources": [source("base", 1, 3, weight=0.7), source("a", 1, 3, weight=0.3)]},
        ],
    },
    "adapter": {
        "merge_method": "linear",
        "models": [weighted("base+lora", 0.6), weighted("a", 0.4), weighted("base", 0.3)],
    },
    "adapter_stacked": {
        "merge_method": "passthrough",
        "slices": [{"sources": [source("base+lora", 0, 2)]}, {"sources": [source("a", 1, 3)]}],
    },
}  # fmt: skip


def write_tokenizer(folder: Path, tokens: list[str], added: Mapping[str, int]) -> None:
    """A BPE tokenizer without merges, and what transformers needs to open it."""
    entries = [
        {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": token == "<more>",
         "normalized": False, "special": True}
        for token, index in added.items()
    ]  # fmt: skip
    model = {"type": "BPE", "vocab": {token: index for index, token in enumerate(tokens)}, "merges": [],
             "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": False,
             "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    written = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": None,
               "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(written))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))


def write_adapter(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """An adapter as PEFT writes it: a linear layer of one layer, the embedding, and a norm that is replaced."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    prefix = "base_model.model.model."
    stored = {}
    for name, rank in (("layers.1.self_attn.q_proj", 4), ("layers.0.mlp.down_proj", 2)):
        rows, columns = tensors[f"model.{name}.weight"].shape
        stored[f"{prefix}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.1
        stored[f"{prefix}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    rows, columns = tensors[EMBED].shape
    stored[f"{prefix}embed_tokens.lora_embedding_A"] = torch.randn(4, rows, generator=generator) * 0.1
    stored[f"{prefix}embed_tokens.lora_embedding_B"] = torch.randn(columns, 4, generator=generator) * 0.1
    stored[f"{prefix}norm.weight"] = torch.rand(columns, generator=generator) + 0.5
    folder.mkdir()
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none",
              "target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["model.norm"],
              "layers_to_transform": None, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5},
              "base_model_name_or_path": "base", "inference_mode": True}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit_plan")
    ordinary = [f"t{number}" for number in range(300)]
    base = random_tensors(0, vocab=303)
    for number, name in enumerate(("base", "a", "b")):
        write_model(folder / name, sibling(base, number), vocab_size=303)
        write_tokenizer(folder / name, ordinary, {token: 300 + index for index, token in enumerate(SPECIAL)})
    write_model(folder / "more", random_tensors(3, vocab=304), vocab_size=304)
    write_tokenizer(folder / "more", ordinary, {token: 300 + index for index, token in enumerate([*SPECIAL, "<more>"])})
    write_model(folder / "other", random_tensors(4, vocab=312), vocab_size=312)
    replaced = [f"u{number}" for number in range(10)] + [f"t{number}" for number in reversed(range(290))]
    names = ["<more>", *reversed(SPECIAL), "<other>"]
    write_tokenizer(folder / "other", replaced, {token: 300 + index for index, token in enumerate(names)})
    write_model(folder / "padded", random_tensors(5, vocab=320), vocab_size=320)
    write_tokenizer(folder / "padded", ordinary, {token: 300 + index for index, token in enumerate(SPECIAL)})
    write_adapter(folder / "lora", read_model(folder / "base"))
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[[str], dict[str, Tensor]]:
    """case -> what mergekit makes of it, with dtype float32."""
    jobs = [
        (str(write_yaml(folder / f"{case}.yaml", config | {"dtype": "float32"})), str(folder / "mergekit" / case))
        for case, config in (CASES | DRAWN).items()
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("mergekit_oracle.py")
    command = [sys.executable, str(script), str(folder / "jobs.json")]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return lambda case: read_model(folder / "mergekit" / case)


def merged(folder: Path, case: str, **changes: Any) -> tuple[dict[str, Tensor], Path]:
    out = folder / "steep" / "_".join([case, *changes])
    config = (CASES | DRAWN)[case] | {"dtype": "float32"} | changes
    merge(write_yaml(folder / f"steep_{case}.yaml", config), out)
    return read_model(out), out


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("case", [case for case in CASES if case != "uneven" and "tokenizer" not in str(CASES[case])])
def test_slices_modules_and_adapters(folder: Path, oracle: Callable[[str], dict[str, Tensor]], case: str) -> None:
    tensors, out = merged(folder, case)
    assert_same(tensors, oracle(case))
    layers = json.loads((folder / "mergekit" / case / "config.json").read_text())["num_hidden_layers"]
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == layers


@pytest.mark.parametrize("case", [case for case in CASES if "tokenizer" in str(CASES[case])])
def test_vocabularies(folder: Path, oracle: Callable[[str], dict[str, Tensor]], case: str) -> None:
    rule = CASES[case].get("tokenizer")
    changes = {"tokenizer": rule | {"vocab_size": "exact"}} if rule else {}
    tensors, out = merged(folder, case, **changes)
    ours, theirs = read_tokens(out), read_tokens(folder / "mergekit" / case)
    assert ours is not None
    assert theirs is not None
    assert ours.ids.keys() == theirs.ids.keys()
    for token in ours.added.keys() & theirs.added.keys():  # without a base mergekit takes any model's tokenizer first
        assert ours.added[token]["rstrip"] == theirs.added[token]["rstrip"] == (token == "<more>")
    expected = oracle(case)
    tokens = list(ours.ids)
    for name in (EMBED, HEAD):
        our_rows = [ours.ids[token] for token in tokens]
        their_rows = [theirs.ids[token] for token in tokens]
        assert tensors[name].shape == expected[name].shape
        torch.testing.assert_close(tensors[name][our_rows], expected[name][their_rows], rtol=1e-5, atol=1e-7)
        rest = tensors[name][len(tokens) :]
        torch.testing.assert_close(rest, expected[name][len(tokens) :], rtol=1e-4, atol=1e-6)
    others = tensors.keys() - {EMBED, HEAD}
    assert_same({name: tensors[name] for name in others}, {name: expected[name] for name in others})
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(tensors[EMBED])
    assert load_tokenizer(out).vocab_size == max(ours.ids.values()) + 1


# with masks, which the exact mode draws from other bits
DRAWN = {
    "base_dare": BASED
    | {"merge_method": "dare_ties", "tokenizer_source": "base", "parameters": {"density": 0.6}, "random_seed": 5}
}
NOT_ITS_BITS = (
    "uneven",  # steep drops no models
    "padded_to_64",  # the padding is a mean of rows, added up in the order of their numbers
    *("adapter", "adapter_stacked"),  # PEFT multiplies B A in its own order
)


@pytest.mark.parametrize("case", [case for case in CASES | DRAWN if case not in NOT_ITS_BITS])
def test_same_bits_under_compat(folder: Path, oracle: Callable[[str], dict[str, Tensor]], case: str) -> None:
    tensors, out = merged(folder, case, compat=MERGEKIT)
    expected = oracle(case)
    assert tensors.keys() == expected.keys()
    if "tokenizer" in str((CASES | DRAWN)[case]):
        ours, theirs = read_tokens(out), read_tokens(folder / "mergekit" / case)
        assert ours is not None
        assert theirs is not None
        for name in (EMBED, HEAD):
            assert tensors[name].shape == expected[name].shape
            tensors[name] = tensors[name][[ours.ids[token] for token in ours.ids]]
            expected[name] = expected[name][[theirs.ids[token] for token in ours.ids]]
    assert not [name for name, found in tensors.items() if not torch.equal(found, expected[name])]


def test_ids_of_the_base_stay_and_new_ones_follow_in_the_order_of_the_models(folder: Path) -> None:
    _, out = merged(folder, "union", dtype="bfloat16")
    tokens = read_tokens(out)
    base = read_tokens(folder / "base")
    assert tokens is not None
    assert base is not None
    assert {token: tokens.ids[token] for token in base.ids} == base.ids
    new = [token for token in tokens.ids if token not in base.ids]
    assert new == [*(f"u{number}" for number in range(10)), "<more>", "<other>"]
    assert [tokens.ids[token] for token in new] == list(range(303, 315))
    encoded = load_tokenizer(out).encode_with_special("u3<other>")
    assert encoded == [tokens.ids["u3"], tokens.ids["<other>"]]


def test_padding_is_kept_where_mergekit_cuts_it(folder: Path, oracle: Callable[[str], dict[str, Tensor]]) -> None:
    tensors, out = merged(folder, "padded_exact")
    expected, base = oracle("padded_exact"), read_model(folder / "padded")
    for name in (EMBED, HEAD):
        assert expected[name].shape[0] == 303
        assert tensors[name].shape[0] == 320
        torch.testing.assert_close(tensors[name][:303], expected[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(tensors[name][304:], base[name][304:], rtol=1e-6, atol=0)  # no model has others
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 320


def test_uneven_slices_keep_the_models_that_mergekit_drops(
    folder: Path, oracle: Callable[[str], dict[str, Tensor]]
) -> None:
    """mergekit pairs the last slice's models with as many weights as the first slice has."""
    tensors, _ = merged(folder, "uneven")
    expected, base, a = oracle("uneven"), read_model(folder / "base"), read_model(folder / "a")
    for name in expected.keys() - {"model.norm.weight", HEAD}:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-5, atol=1e-7)
    for name in ("model.norm.weight", HEAD):
        torch.testing.assert_close(expected[name], base[name])
        torch.testing.assert_close(tensors[name], 0.7 * base[name] + 0.3 * a[name], rtol=1e-5, atol=1e-7)
