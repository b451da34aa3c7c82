"""What may be asked of a search, and with which words the rest is refused before any work."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from steep.merge.search import search
from steep.merge.search_config import Choices, Range, place_of, put, read_search
from tests.merge.models import random_tensors, sibling, write_model

MEASURE = {"callable": "math:floor", "direction": "min", "held_out": "math:ceil"}
MERGE = {
    "merge_method": "task_arithmetic",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 1.0}}],
}


def config(**changes: Any) -> dict[str, Any]:
    written = {
        "merge": MERGE,
        "space": {"lambda": [0.2, 1.4]},
        "strategy": "grid",
        "objectives": {"domain": MEASURE, "general": MEASURE},
        "choose": {"max_general_loss": 0.1},
    }
    return written | changes


def objectives(**changes: Any) -> dict[str, Any]:
    return {"objectives": {"domain": {k: v for k, v in (MEASURE | changes).items() if v}, "general": MEASURE}}


def test_two_numbers_are_a_range_other_lists_are_choices() -> None:
    space = {"lambda": [0, 1], "a": ["1e-3", "1"], "b": [1, 2, 3], "c": [True, False], "d": {"choices": [1, 2]}}
    found = read_search(config(space=space | {"e": {"range": [0, 1], "points": 3}}))[0].space
    assert found == {
        "lambda": Range(range=(0, 1)),
        "a": Range(range=(0.001, 1)),
        "b": Choices(choices=[1, 2, 3]),
        "c": Choices(choices=[True, False]),
        "d": Choices(choices=[1, 2]),
        "e": Range(range=(0, 1), points=3),
    }


def test_values_of_a_range_are_short_and_inside() -> None:
    dimension = Range(range=(1 / 3, 2 / 3))
    assert dimension.at(0.123456789) == 0.374486
    assert (dimension.at(0), dimension.at(1)) == (1 / 3, 2 / 3)
    assert dimension.at(1e-9) == 1 / 3


def test_places() -> None:
    assert place_of("lambda") == (["parameters", "lambda"], None)
    assert place_of("merge_method") == (["merge_method"], None)
    assert place_of("weight[self_attn]") == (["parameters", "weight"], "self_attn")
    assert place_of("models.0.parameters.t[layers.1.]") == (["models", "0", "parameters", "t"], "layers.1.")


def test_the_first_filter_of_the_space_comes_first() -> None:
    point = {"weight[mlp]": 1, "weight[mlp.up]": 2, "weight": 3}
    assert put({"parameters": {"weight": [{"filter": "mlp", "value": 0}]}}, point)["parameters"]["weight"] == [
        {"filter": "mlp", "value": 1}, {"filter": "mlp.up", "value": 2}, {"value": 3},
    ]  # fmt: skip
    gradient = put({"parameters": {"weight": [0, 1]}}, {"weight[mlp]": 1})["parameters"]["weight"]
    assert gradient == [{"filter": "mlp", "value": 1}, {"value": [0, 1]}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "space: Dictionary should have at least 1 item"),
        ({"space": {"lambda": []}}, "space.lambda: choices: List should have at least 1 item"),
        ({"space": {"lambda": 0.5}}, r"space.lambda: expected \[low, high\], a list of choices"),
        ({"space": {"lambda": [1, 0.5]}}, r"space.lambda: .*low < high, found \[1.0, 0.5\]"),
        ({"space": {"lambda": {"range": [0, 1], "point": 3}}}, "space.lambda: unknown key 'point'; did you mean 'poi"),
        ({"space": {"lambda": [1, 1, 2]}}, "space.lambda: choice 1 is given twice"),
        ({"strategie": "grid"}, "unknown key 'strategie'; did you mean 'strategy'"),
        ({"strategy": "random"}, "strategy: Input should be 'grid', 'golden' or 'cmaes', found 'random'"),
        ({"budget": 4}, r"budget: 4, but the grid has 5 points \(5 of lambda\); allowed: 5 and more"),
        ({"budget": 0}, "budget: Input should be greater than or equal to 1"),
        ({"strategy": "golden"}, "budget: golden needs at least 2 evaluations, given None"),
        ({"strategy": "golden", "space": {"t": [0, 1], "lambda": [0, 1]}}, "golden searches along one range, space ha"),
        ({"strategy": "cmaes", "budget": 50}, "cmaes needs two ranges or more, space has 1"),
        (
            {"strategy": "cmaes", "budget": 9, "space": {"a": [0, 1], "b": [0, 1], "c": ["x", "y"]}},
            "cmaes needs at least 12 evaluations for 2 combinations of choices, given 9",
        ),
        ({"choose": {}}, "choose: exactly one of 'max_general_loss' and 'general_weight' must be given"),
        ({"choose": {"max_general_loss": "2 percent"}}, "choose: .*expected a number or 'N%', found '2 percent'"),
        ({"choose": {"max_loss": 1}}, "choose: unknown key 'max_loss'; did you mean 'max_general_loss'"),
        (objectives(task="perplexity:x.jsonl"), "exactly one of 'task' and 'callable'"),
        (objectives(direction=None), "objectives.domain: direction: min or max is needed for a callable"),
        (objectives(limit=5), "objectives.domain: limit: belongs to a task"),
        (objectives(held_out="math:floor"), "objectives.domain: held_out: 'math:floor' is what the search sees"),
        (objectives(heldout="x"), "objectives.domain: unknown key 'heldout'; did you mean 'held_out'"),
        (objectives(callable=None, task="x", direction="min"), "direction: follows from the metric of a task"),
    ],
)
def test_a_wrong_search_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_search(config(**changes))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = random_tensors(0)
    write_model(folder / "base", base)
    write_model(folder / "a", sibling(base, 1))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"lamda": [0, 1]}}, "space: unknown place 'lamda'; did you mean 'lambda'"),
        ({"space": {"model.0.parameters.weight": [0, 1]}}, "unknown place 'model.0.parameters.weight'; did you mean"),
        ({"space": {"models.0.parameters.weigth": [0, 1]}}, "unknown parameter 'weigth'; did you mean 'weight'"),
        ({"space": {"models.3.parameters.weight": [0, 1]}}, "models.3: expected a number below 1, found '3'"),
        ({"space": {"models.0.weight": [0, 1]}}, "models.0: unknown key 'weight'"),
        ({"space": {"dtype[mlp]": ["float32"]}}, "only a parameter has filters"),
        ({"space": {"lambda[": [0, 1]}}, r"expected PLACE or PLACE\[FILTER\]"),
        ({"space": {"merge_method": ["ties", "tis"]}}, "merge_method: unknown method 'tis'; did you mean 'ties'"),
        ({"space": {"density": [0, 1]}}, "space: 'density' has no effect on any tensor"),
        ({"space": {"weight": [0, 1]}}, "space: 'weight' has no effect on any tensor: .* goes before it"),
        (
            {"space": {"lambda[attn_x]": [0, 1]}},
            r"space: 'lambda\[attn_x\]' has no effect .* in no tensor's name",
        ),
        ({"space": {"merge_method": ["ties"], "density": [0, 2]}}, "density: must be between 0 and 1, found 2"),
        ({"merge": MERGE | {"base_model": "nowhere"}}, "model 'nowhere': no such folder"),
        ({"merge": MERGE | {"merge_methode": "ties"}}, "unknown key 'merge_methode'; did you mean 'merge_method'"),
        ({"merge": "nowhere.yml"}, "nowhere.yml: merge configuration not found"),
        (objectives(callable="math"), "objectives.domain: expected MODULE:FUNCTION, found 'math'"),
        (objectives(callable="maths_x:f"), "objectives.domain: 'maths_x:f': No module named 'maths_x'"),
        (objectives(held_out="math:ceill"), "objectives.domain.held_out: 'math:ceill': math has no function 'ceill'"),
        (objectives(callable=None, task="perplexity:x.jsonl", direction=None), "pass task_objective="),
        ({"reference": "nowhere"}, "model 'nowhere': no such folder"),
    ],
)
def test_a_search_that_does_not_fit_its_merge_is_refused(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        search(config(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_effect_under_any_method_is_enough(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`density` says nothing to task_arithmetic: the error that comes is that of the objective."""
    monkeypatch.chdir(models)
    space = {"merge_method": ["task_arithmetic", "ties"], "density": [0.2, 1]}
    with pytest.raises(TypeError, match="must be real number, not Decoder"):
        search(config(space=space), tmp_path / "out")


def test_a_missing_library_is_one_line(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def without_cma(name: str, *rest: Any, **options: Any) -> Any:
        if name == "cma":
            raise ImportError(name)
        return find(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without_cma)
    monkeypatch.chdir(models)
    space = {"weight[mlp]": [0, 1], "lambda": [0, 1]}
    with pytest.raises(ImportError, match=r"cmaes needs the library cma: pip install 'steep\[search\]'"):
        search(config(space=space, strategy="cmaes", budget=20), tmp_path / "out")
