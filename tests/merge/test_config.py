"""Reading mergekit's YAML: settings, precedence of filters, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steep.merge import parse_config, read_yaml
from steep.merge.config import Setting, resolve_model_path

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
        ({"modles": MODELS}, "unknown key 'modles'; did you mean 'models'"),
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
        ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, "exactly one of 'models' and 'slices'"),
        ({"models": []}, "exactly one of 'models' and 'slices'"),
        ({"modules": {"text": {}}}, "key 'modules' is not supported yet"),
        ({"tokenizer": {"source": "base"}}, "key 'tokenizer' is not supported yet; use 'tokenizer_source"),
        ({"tokenizer_source": "union"}, "'union' is not supported yet"),
        ({"tokenizer_source": "base"}, "tokenizer_source: 'base' needs a base_model"),
        ({"chat_template": "auto"}, "key 'chat_template' is not supported yet"),
        ({"dtype": "float8"}, "dtype: Input should be 'float32', 'float16' or 'bfloat16'"),
        ({"models": [{"model": {"path": "a"}}]}, "models.0.model: Input should be a valid string"),
    ],
)
def test_refusals_name_the_key_and_what_is_allowed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^the file: ") as error:
        parse_config(config(**changes), "the file")
    assert message in str(error.value)


def test_slices_that_move_layers_are_refused() -> None:
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [1, 3]}]
    with pytest.raises(ValueError, match=r"slices.0: sources have layer ranges \[\(0, 2\), \(1, 3\)\]"):
        parse_config({"merge_method": "linear", "slices": [{"sources": sources}]})


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
    with pytest.raises(FileNotFoundError, match="no such folder .*beside/x.*here/x.*not downloaded"):
        resolve_model_path("x", beside)
    with pytest.raises(FileNotFoundError, match="adapters"):
        resolve_model_path("both+lora", beside)
