"""What a configuration may say to each method, and what follows from the table for a merge as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steep.merge import MergePlan, lines, merge, parse_config, plan_merge
from steep.merge.method_table import METHODS, PARAMETERS
from tests.merge.models import bits, random_tensors, read_model, sibling, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    base = random_tensors(0)
    for number, name in enumerate(("base", "cpt", "instruct")):
        write_model(folder / name, sibling(base, number), eos_token_id=number)
        (folder / name / "tokenizer_config.json").write_text(f'{{"of": "{name}"}}')
    return folder


def plan(folder: Path, method: str, **keys: Any) -> MergePlan:
    models = [{"model": name} for name in ("cpt", "instruct")]
    return plan_merge(parse_config({"merge_method": method, "models": models, "base_model": "base"} | keys), folder)


def test_all_parameters_have_a_rule() -> None:
    for name, method in METHODS.items():
        assert method.shared.keys() | method.per_model.keys() <= PARAMETERS.keys(), name
        for parameter, default in (method.shared | method.per_model).items():
            if default is not None:
                assert PARAMETERS[parameter].parse(parameter, default) == default


def test_chat_vector_is_the_continued_model_with_its_configuration(folder: Path, tmp_path: Path) -> None:
    found = plan(folder, "chat_vector")
    assert found.config_donor == found.tokenizer_donor == folder / "cpt"
    assert plan(folder, "task_arithmetic", parameters={"weight": 1}).config_donor == folder / "base"
    listed = [{"model": str(folder / name)} for name in ("base", "cpt", "instruct")]
    config = {"merge_method": "chat_vector", "base_model": str(folder / "base"), "models": listed}
    assert plan_merge(parse_config(config)).config_donor == folder / "cpt"

    but_not = [{"filter": name, "value": 0} for name in ("embed_tokens", "lm_head", "norm")]
    merge(config | {"parameters": {"scale": [*but_not, {"value": 1}]}}, tmp_path / "out")
    cpt = read_model(folder / "cpt")
    for name, x in read_model(tmp_path / "out").items():
        left_out = any(part in name for part in ("embed_tokens", "lm_head", "norm"))
        assert (bits(x) == bits(cpt[name])) == left_out, name


def test_lines_is_a_gradient_on_lambda(folder: Path) -> None:
    found = plan(folder, "task_arithmetic", parameters={"weight": 1, "lambda": [0.2, 1.0]})
    by_layer = {tensor.layer: tensor.parameters["lambda"] for tensor in found.tensors if tensor.layer is not None}
    assert by_layer == pytest.approx({layer: lines(layer, 3, 0.2, 0.8) for layer in range(3)})


def test_random_seed_is_part_of_the_configuration(folder: Path) -> None:
    config = {"merge_method": "dare_linear", "base_model": "base", "models": [{"model": "cpt"}]}
    assert parse_config(config).random_seed == 0
    assert parse_config(config | {"random_seed": 17}).random_seed == 17
    for wrong in (-1, 1.5, "1", 1 << 63):
        with pytest.raises(ValueError, match="random_seed"):
            parse_config(config | {"random_seed": wrong})


def test_models_are_known_to_masks_as_they_are_written(folder: Path) -> None:
    assert plan(folder, "linear", parameters={"weight": 1}).model_names == ("cpt", "instruct", "base")
    models = [{"model": str(folder / "cpt")}, {"model": "./instruct"}]
    found = plan(folder, "linear", models=models, parameters={"weight": 1})
    assert found.model_names == (str(folder / "cpt"), "./instruct", "base")
