"""Reading mergekit's YAML: settings, precedence of filters, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steep.merge import parse_config, read_yaml
from steep.merge.config import Setting, TokenizerRule, resolve_model, resolve_model_path

MODELS = [{"model": "a", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 0.5}}]


def config(**changes: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": MODELS} | changes


def test_a_setting_is_a_scalar_a_gradient_or_filtered() -> None:
    assert Setting.parse("t", 0.25).at("x", 0.7) == 0.25
    assert Setting.parse("t", "1e-3").at("x", 0) == 1e-3
    gradient = Setting.parse("t", [0, 0.5, 0.3])
    assert [gradient.at("x", depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 0.25, 0.5, 0.4, 0.3])
    filtered = Setting.parse(
        "weight", [{"filter": "mlp", "value": [0, 1]}, {"filter": "attn", "value": 0.5}, {"filter": "*", "value": 2}]
    )
    assert filtered.at("layers.0.mlp.up", 0.5) == 0.5
    assert filtered.at("layers.0.attn.q", 1) == 0.5
    assert filtered.at("norm", 0) == 2
    assert Setting.parse("weight", {"filter": "mlp", "value": 3}).at("norm", 0) is None


def test_booleans_are_selected_not_interpolated() -> None:
    switch = Setting.parse("normalize", [True, False, True])
    assert [switch.at("x", depth) for depth in (0, 0.4, 0.5, 0.99, 1)] == [True, True, False, False, True]
    assert Setting.parse("int8_mask", 1.0).at("x", 0) is True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modles": MODELS}, "unknown key 'modles'; did you mean 'modules' or 'models'?"),
        ({"models": [{"model": "a", "weight": 1}]}, "models.0: unknown key 'weight'; allowed: model, parameters"),
        ({"parameters": {"normalise": True}}, "unknown parameter 'normalise'; did you mean 'normalize'"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "'wieght'; did you mean 'weight'"),
        ({"parameters": {"normalize": "often"}}, "normalize: expected true or false, found 'often'"),
        ({"parameters": {"weight": "heavy"}}, "weight: expected a number, found 'heavy'"),
        ({"parameters": {"weight": float("nan")}}, "weight: expected a finite number"),
        ({"parameters": {"weight": []}}, "weight: an empty list"),
        ({"parameters": {"density": 1.5}}, "density: must be between 0 and 1, found 1.5"),
        ({"parameters": {"weight": [{"filtre": "mlp", "value": 1}]}}, "unknown key 'filtre'; did you mean 'filter'"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "needs 'value'"),
        ({"merge_method": "tie"}, "unknown method 'tie'; did you mean 'ties'"),
        ({"parameters": {"rescale": "l2"}}, "rescale: allowed: l1, inv_density, elementwise, true, false, none; found"),
        ({"parameters": {"max_iter": 2.5}}, "max_iter: must be a whole number, found 2.5"),
        ({"parameters": {"epsilon": -1}}, "epsilon: must be at least 0, found -1"),
        ({"merge_method": "ties"}, "base_model: required by ties"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "exactly one of 'models', 'slices' and"),
        ({"models": []}, "exactly one of 'models', 'slices' and 'modules'"),
        ({"models": [], "modules": {"text": {}}}, "modules.text: exactly one of 'models' and 'slices' must be given"),
        ({"models": [], "modules": {"text": {"model": MODELS}}}, "modules.text: unknown key 'model'; did you mean 'm"),
        ({"tokenizer": {"source": "base"}}, "tokenizer.source: 'base' needs a base_model"),
        ({"tokenizer": {"sauce": "union"}}, "tokenizer: unknown key 'sauce'; did you mean 'source'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: Input should be greater"),
        ({"tokenizer": {"vocab_size": "padded"}}, "tokenizer.vocab_size: Input should be 'keep' or 'exact'"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "tokenizer.tokens.x: force: true needs a source"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "zeros"}}}}}, "unknown kind 'zeros'; did you mean 'zero'"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}}, "one of 'token' and"),
        ({"tokenizer": {}, "tokenizer_source": "union"}, "only one of 'tokenizer_source' and 'tokenizer'"),
        ({"tokenizer_source": "base"}, "tokenizer_source: 'base' needs a base_model"),
        ({"chat_template": 1}, "chat_template: Input should be a valid string"),
        ({"random_seed": -1}, "random_seed: Input should be greater than or equal to 0"),
        ({"dtype": "float8"}, "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ({"models": [{"model": {"path": "a"}}]}, "models.0.model: unknown key 'path' of a model"),
        ({"models": [{"model": {"model": {"path": "a", "revision": "x"}}}]}, "model: revision 'x': models are folders"),
    ],
)
def test_refusals_name_the_key_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^the file: ") as error:
        parse_config(config(**changes), "the file")
    assert message in str(error.value)


def test_sources_of_a_slice_have_as_many_layers() -> None:
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [1, 3]}]
    written: dict[str, Any] = {"merge_method": "linear", "slices": [{"sources": sources}]}
    assert parse_config(written).slices[0].sources[1].layer_range == (1, 3)
    sources[1]["layer_range"] = [1, 2]
    with pytest.raises(ValueError, match=r"slices.0: .* as many layers, found \[0, 2\] of a, \[1, 2\] of b"):
        parse_config(written)
    sources[1]["layer_range"] = [3, 1]
    with pytest.raises(ValueError, match=r"slices.0.sources.1.layer_range: expected \[first, last\)"):
        parse_config(written)


def test_all_mistakes_are_named_at_once() -> None:
    models = [{"model": "a", "wieght": 1, "parameters": {"wieght": 1, "density": 2}}]
    with pytest.raises(ValueError, match="^merge configuration: ") as error:
        parse_config(config(modles=MODELS, merge_method="linaer", dtype="float8", models=models))
    for message in ("'modles'", "'linaer'; did you mean 'linear'", "dtype: Input", "models.0: unknown key 'wieght'",
                    "unknown parameter 'wieght'", "density: must be between 0 and 1, found 2"):  # fmt: skip
        assert message in str(error.value)


def test_models_with_adapters_have_two_spellings() -> None:
    entries = [{"model": "a+lora"}, {"model": {"model": {"path": "a"}, "lora": {"path": "lora"}}}]
    parsed = parse_config({"merge_method": "linear", "models": entries})
    assert [entry.model for entry in parsed.models] == ["a+lora", "a+lora"]


def test_tokenizer_source_is_short_for_a_rule() -> None:
    assert parse_config(config()).tokenizer_rule is None
    assert parse_config(config(tokenizer_source="b")).tokenizer_rule == TokenizerRule(source="b")
    tokens = {"<x>": {"source": {"kind": "zero"}, "force": True}, "<y>": {"source": "a"}}
    written = {"source": "union", "tokens": tokens}
    rule = parse_config(config(tokenizer=written)).tokenizer_rule
    assert rule is not None
    assert rule.tokens["<x>"].force
    assert rule.tokens["<y>"].source == "a"


def test_null_means_absent() -> None:
    parsed = parse_config(config(chat_template=None, slices=None, parameters=None, tokenizer=None))
    assert len(parsed.models) == 2
    assert parsed.parameters == {}


def test_yaml_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="merge configuration not found"):
        read_yaml(tmp_path / "none.yml")
    path = tmp_path / "merge.yml"
    for text, message in [
        ("merge_method: [", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping"),
        ("dtype: float32\ndtype: float16\n", "key 'dtype' is given twice"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_yaml(path)


def test_relative_paths_count_from_the_yaml_then_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "beside", tmp_path / "here"
    for folder in (beside / "both", here / "both", here / "only"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert resolve_model_path("both", beside) == beside / "both"
    assert resolve_model_path("only", beside) == here / "only"
    assert resolve_model_path("both", None) == here / "both"
    with pytest.raises(FileNotFoundError, match="no such folder .*beside/x.*here/x.*nothing is downloaded"):
        resolve_model_path("x", beside)


def test_an_adapter_stands_behind_a_plus(tmp_path: Path) -> None:
    for name in ("a", "lora", "c++"):
        (tmp_path / name).mkdir()
    assert resolve_model("a", tmp_path) == (tmp_path / "a", None)
    assert resolve_model("a+lora", tmp_path) == (tmp_path / "a", tmp_path / "lora")
    assert resolve_model("c++", tmp_path) == (tmp_path / "c++", None)
    with pytest.raises(FileNotFoundError, match="adapter 'nowhere': no such folder"):
        resolve_model("a+nowhere", tmp_path)
