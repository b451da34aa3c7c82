"""Recipes: every mistake is named by its path, overrides, what a resume may change."""

import pytest
import yaml

from steep.engine.recipe import changed_keys, load_recipe, parse_recipe
from tests.engine.tiny_run import make_recipe


@pytest.fixture
def values(tmp_path):
    (tmp_path / "base").mkdir()  # nothing is opened by reading a recipe
    return make_recipe(tmp_path)


def test_defaults_are_filled_in(values):
    recipe = parse_recipe(values)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.data.packing == "best_fit"
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schedule", "warmup_step"], 3, r"^recipe: schedule\.warmup_step: unknown key; did you mean 'warmup_steps'\? "
                                         r"allowed: kind, lr, end_lr"),
        (["optimiser"], {}, r"optimiser: unknown key; did you mean 'optimizer'\?"),
        (["zzz"], 1, r"zzz: unknown key; allowed: model, out, data"),
        (["data", "sources", 1, "wieght"], 2, r"data\.sources\.1\.wieght: unknown key; did you mean 'weight'\? "
                                              r"allowed: name, store, weight, max_epochs"),
        (["batch", "sequences"], "many", r"batch\.sequences: given 'many'; .*integer"),
        (["batch", "micro_batches"], 0, r"batch\.micro_batches: given 0; .*greater than or equal to 1"),
        (["schedule", "kind"], "cosin", r"schedule\.kind: given 'cosin'; .*'linear', 'cosine', 'constant' or 'wsd'"),
        (["precision"], "fp8", r"precision: given 'fp8'; .*'float32' or 'bfloat16'"),
        (["tokens"], 1000, r"exactly one of steps, tokens and epochs; given: steps, tokens"),
        (["steps"], None, r"exactly one of steps, tokens and epochs; given: none"),
        (["schedule", "warmup_ratio"], 0.1, r"schedule: give warmup_steps or warmup_ratio, not both"),
        (["data", "sources"], [], r"data\.sources: given \[\]; .*at least 1 item"),
    ],
)  # fmt: skip
def test_mistakes_are_named(values, path, value, message):
    node = values
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        parse_recipe(values)


def test_missing_keys_and_several_mistakes_at_once(values):
    del values["model"]
    values["schedule"].pop("lr")
    values["log"] = {"evry": 2}
    with pytest.raises(ValueError) as caught:
        parse_recipe(values, "r.yaml")
    assert str(caught.value).splitlines() == [
        "r.yaml: model: required, not given",
        "r.yaml: schedule.lr: required, not given",
        "r.yaml: log.evry: unknown key; did you mean 'every'? allowed: every, tensorboard",
    ]


def test_updates_in_backward_go_with_nothing_that_judges_a_step(values):
    values |= {"optimizer": {"in_backward": True, "max_grad_norm": None}, "batch": {"sequences": 2}}
    parse_recipe(values)
    with pytest.raises(ValueError, match=r"in_backward .*: spikes\.factor is 6; allowed: null"):
        parse_recipe({**values, "spikes": {"factor": 6}})
    with pytest.raises(ValueError, match=r"in_backward .*: batch\.micro_batches is 2; allowed: 1"):
        parse_recipe({**values, "batch": {"micro_batches": 2}})


def test_overrides(values, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    overrides = ["schedule.lr=2e-3", "data.sources.1.weight=5", "optimizer.max_grad_norm=null", "export.every=3"]
    recipe = load_recipe(file, overrides)
    assert recipe.schedule.lr == 2e-3  # a string to YAML 1.1
    assert [source.weight for source in recipe.data.sources] == [3, 5]
    assert recipe.optimizer.max_grad_norm is None
    assert recipe.export.every == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected key=value"),
        ("data.sources.9.weight=1", r"data\.sources is a list of 2; allowed: 0 to 1"),
        ("data.sources.first.weight=1", r"data\.sources is a list of 2"),
        ("steps.more=1", r"steps is 12, which has no key 'more'"),
        ("shcedule.lr=1", r"shcedule: unknown key; did you mean 'schedule'"),
    ],
)
def test_wrong_overrides(values, tmp_path, override, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        load_recipe(file, [override])


@pytest.mark.parametrize(("content", "message"), [("a: [", "not valid YAML"), ("- 1", "found list"), ("", "NoneType")])
def test_files_that_are_no_recipe(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(file)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_changed_keys_names_what_matters_only(values):
    old = parse_recipe(values).model_dump(mode="json")
    values["schedule"]["lr"] = 1e-3
    values["optimizer"] = {"weight_decay": 0.0}
    values["checkpoint"] = {"every": 99}
    values["out"] = "elsewhere"
    new = parse_recipe(values).model_dump(mode="json")
    assert changed_keys(old, new) == [
        "optimizer.weight_decay (was 0.1, now 0.0)",
        "schedule.lr (was 0.003, now 0.001)",
    ]


def test_example_recipes_are_valid():
    from pathlib import Path

    files = sorted(Path(__file__).parents[2].glob("recipes/train*.yaml"))
    assert files
    for file in files:
        load_recipe(file)
