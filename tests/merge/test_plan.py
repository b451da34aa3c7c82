"""What is settled from headers alone: parameters, heads, donors, warnings, and every refusal before a byte is out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steep.cli.app import app
from steep.merge import MergePlan, TensorPlan, parse_config, plan_merge
from steep.merge.findings import PlanError, abbreviate
from steep.merge.layers import layer_index, part_of
from tests.merge.models import random_tensors, sibling, write_model, write_yaml

Q_PROJ, UP_PROJ = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    base = random_tensors(0)
    for number, name in enumerate(("base", "a", "b")):
        write_model(folder / name, sibling(base, number))
    tied = random_tensors(5, tied=True)
    write_model(folder / "tied", tied, tie_word_embeddings=True)
    head = {"lm_head.weight": tied["model.embed_tokens.weight"].clone()}
    write_model(folder / "tied_with_head", tied | head, tie_word_embeddings=True)
    write_model(folder / "untied", random_tensors(6))
    write_model(folder / "more_words", random_tensors(7, vocab=328), vocab_size=328)
    write_model(folder / "deeper", random_tensors(8, layers=4), num_hidden_layers=4)
    return folder


def plan(folder: Path, method: str, models: list[Any], **changes: Any) -> MergePlan:
    entries = [entry if isinstance(entry, dict) else {"model": entry} for entry in models]
    return plan_merge(parse_config({"merge_method": method, "models": entries} | changes), folder)


def weighted(model: str, weight: Any = 1.0, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "parameters": {"weight": weight} | parameters}


def by_name(plan: MergePlan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.tensors}


def test_layers_and_parts_by_name() -> None:
    assert layer_index("model.layers.12.mlp.experts.5.w1.weight") == 12
    assert layer_index("transformer.h.3.attn.c_attn.bias") == 3
    assert layer_index("model.embed_tokens.weight") is None
    assert layer_index("multi_modal_projector.linear.1.weight") is None
    parts = ["text_decoder", "vision_tower", "multi_modal_projector"]
    assert part_of("language_model.model.layers.0.mlp.up_proj.weight", parts) == "text_decoder"
    assert part_of("lm_head.weight", parts) == "text_decoder"
    assert part_of("model.visual.blocks.0.attn.qkv.weight", parts) == "vision_tower"
    assert part_of("model.multi_modal_projector.linear_1.weight", parts) == "multi_modal_projector"
    assert part_of("lm_head.weight", parts[1:]) is None


def test_names_are_abbreviated_without_loss() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1.weight" for layer in (0, 1, 2, 5) for expert in range(8)]
    assert abbreviate([*names, "model.layers.7.x", "norm"]) == [
        "model.layers.{0-2,5}.mlp.experts.{0-7}.w1.weight", "model.layers.7.x", "norm",
    ]  # fmt: skip


def test_gradients_run_over_the_layers_and_start_at_their_first_value_outside(folder: Path) -> None:
    gradient = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": [1, 0, 0.5]}]
    gradient.append({"value": [0.2, 0.4]})
    tensors = by_name(plan(folder, "slerp", ["a"], base_model="base", parameters={"t": gradient}))
    assert [tensors[Q_PROJ.format(layer)].parameters["t"] for layer in range(3)] == [0, 0.5, 1]
    assert [tensors[UP_PROJ.format(layer)].parameters["t"] for layer in range(3)] == [1, 0, 0.5]
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert tensors[name].parameters["t"] == 0.2
    assert tensors["model.layers.1.input_layernorm.weight"].parameters["t"] == pytest.approx(0.3)


def test_slices_have_their_own_gradients_and_sources(folder: Path) -> None:
    def sources(first: int, last: int) -> list[dict[str, Any]]:
        return [{"model": name, "layer_range": [first, last]} for name in ("base", "a")]

    slices = [
        {"sources": sources(0, 1), "parameters": {"t": 0.9}},
        {"sources": sources(1, 3), "parameters": {"t": [{"filter": "mlp", "value": [0.6, 0.8]}]}},
    ]
    config = {"merge_method": "slerp", "base_model": "base", "slices": slices, "parameters": {"t": [0.1, 0.3]}}
    tensors = by_name(plan_merge(parse_config(config), folder))
    assert [tensors[UP_PROJ.format(layer)].parameters["t"] for layer in range(3)] == pytest.approx([0.9, 0.6, 0.8])
    assert [tensors[Q_PROJ.format(layer)].parameters["t"] for layer in range(3)] == pytest.approx([0.9, 0.1, 0.3])
    assert tensors["model.embed_tokens.weight"].parameters["t"] == 0.9
    assert tensors["lm_head.weight"].parameters["t"] == 0.1

    slices[1]["sources"] = sources(2, 4)
    with pytest.raises(ValueError, match=r"slices.1: layer_range \[2, 4\] of .*/base, which has 3 layers"):
        plan_merge(parse_config(config), folder)
    without_base = [{"sources": [{"model": name, "layer_range": [0, 3]} for name in ("a", "b")]}]
    with pytest.raises(ValueError, match="slices.0: base_model .*/base is not among the sources"):
        plan_merge(parse_config(config | {"slices": without_base}), folder)


def test_a_models_parameter_goes_before_the_global_one(folder: Path) -> None:
    entries = [weighted("a", [{"filter": "mlp", "value": 0.9}], density=0.5), {"model": "b"}]
    tensors = by_name(plan(folder, "ties", entries, base_model="base", parameters={"weight": 0.4, "density": 0.3}))
    assert tensors[UP_PROJ.format(0)].parameters == {
        "normalize": True, "lambda": 1.0, "weight": [0.9, 0.4], "density": [0.5, 0.3],
        "rescale": "none", "ties_sign": "weighted", "topk_scope": "tensor",
    }  # fmt: skip
    assert tensors[Q_PROJ.format(0)].parameters["weight"] == [0.4, 0.4]


def test_base_is_added_last_and_is_the_donor(folder: Path) -> None:
    found = plan(folder, "task_arithmetic", [weighted("b"), weighted("a")], base_model="base")
    assert [model.path.name for model in found.models] == ["b", "a", "base"]
    assert found.config_donor == found.tokenizer_donor == folder / "base"
    tensor = found.tensors[0]
    assert [source.model for source in tensor.sources] == [0, 1, 2]
    assert tensor.base == 2
    assert plan(folder, "linear", [weighted("b"), weighted("a")]).config_donor == folder / "b"


def test_output_dtype_is_out_dtype_else_dtype_else_the_donors(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "half", random_tensors(0), dtype=torch.bfloat16)
    models = [weighted(str(tmp_path / "half")), weighted("a")]
    for keys, dtype, written in [
        ({}, torch.bfloat16, "bfloat16"),
        ({"dtype": "float16"}, torch.float16, "float16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16, "bfloat16"),
    ]:
        found = plan(folder, "linear", models, **keys)
        assert {tensor.dtype for tensor in found.tensors} == {dtype}
        assert found.config_json["torch_dtype"] == written


def test_tied_heads(folder: Path) -> None:
    both = plan(folder, "linear", [weighted("tied"), weighted("tied_with_head")])
    assert "lm_head.weight" not in by_name(both)
    assert any("stored but tied" in note for note in both.notes)
    mixed = plan(folder, "linear", [weighted("tied"), weighted("untied")])
    assert [source.name for source in by_name(mixed)["lm_head.weight"].sources] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
    ]
    assert mixed.config_json["tie_word_embeddings"] is False
    assert any("tied in some models" in note for note in mixed.notes)


def test_all_problems_are_reported_together(folder: Path, tmp_path: Path) -> None:
    tensors = sibling(random_tensors(0), 1)
    del tensors["model.norm.weight"]
    tensors[Q_PROJ.format(1)] = torch.zeros(64, 32)
    write_model(tmp_path / "odd", tensors)
    with pytest.raises(ValueError) as error:
        plan(folder, "linear", ["base", weighted(str(tmp_path / "odd"))])
    text = str(error.value)
    assert f"model.norm.weight: not in {tmp_path / 'odd'}" in text
    assert f"{Q_PROJ.format(1)}: shapes differ: [64, 64] in {folder / 'base'}; [64, 32] in {tmp_path / 'odd'}" in text
    assert f"{folder / 'base'}: no value for the required parameter 'weight' (first needed for model.embed" in text
    assert len(text.splitlines()) == 4


@pytest.mark.parametrize(
    ("method", "models", "changes", "message"),
    [
        ("linear", ["base", "more_words"], {"parameters": {"weight": 1}},
         r"model.embed_tokens.weight, lm_head.weight: vocabularies differ: rows 320 in .*base, 328 in .*more_words"),
        ("linear", ["base", "deeper"], {"parameters": {"weight": 1}}, "num_hidden_layers is 3 in .*base and 4 in"),
        ("linear", ["a", "a"], {"parameters": {"weight": 1}}, "models: .*/a is listed 2 times"),
        ("linear", [weighted("a", 1), weighted("b", -1)], {}, r"weights \[1.0, -1.0\] sum to 0 under normalize"),
        ("slerp", ["a", "b"], {"base_model": "base", "parameters": {"t": 0.5}}, "exactly 1 model besides the base"),
        ("slerp", ["a"], {"base_model": "base"}, "no value for the required parameter 't'"),
        ("ties", ["base"], {"base_model": "base"}, "models: ties needs at least 1 model besides the base, found 0"),
        ("ties", [weighted("a")], {"base_model": "base", "parameters": {"rescale": "elementwise"}}, "ties: rescale: "),
        ("della", [weighted("a", density=0.9)], {"base_model": "base"}, "density 0.9 plus or minus epsilon 0.15 must"),
        ("multislerp", [weighted("a"), weighted("b", -1)], {}, "sum to 0 under normalize_weights: true"),
        ("nuslerp", [weighted("a")], {}, "nuslerp needs exactly 2 models, found 1"),
        ("chat_vector", ["a"], {"base_model": "base"}, "chat_vector needs exactly 2 models besides the base, found 1"),
        ("linear", [weighted("a")], {"tokenizer_source": "b"}, "a: no tokenizer.json, which arranging"),
        ("linear", [weighted("nowhere")], {}, "model 'nowhere': no such folder"),
    ],
)  # fmt: skip
def test_refusals(folder: Path, method: str, models: list[Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan(folder, method, models, **changes)


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "whole", random_tensors(0))
    for name, damage in (("cut", "truncate"), ("gone", "unlink")):
        write_model(tmp_path / name, random_tensors(0), shards=2)
        shard = tmp_path / name / "model-00002-of-00002.safetensors"
        if damage == "unlink":
            shard.unlink()
        else:
            shard.write_bytes(shard.read_bytes()[:-10])
        with pytest.raises((ValueError, FileNotFoundError), match="model-00002-of-00002.safetensors"):
            plan(tmp_path, "linear", [weighted("whole"), weighted(name)])


def test_quantised_and_pickled_models_are_refused(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "quantised", random_tensors(0), quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="quantised weights cannot be merged"):
        plan(folder, "linear", [weighted(str(tmp_path / "quantised"))])
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(PlanError, match="pickle"):
        plan(folder, "linear", [weighted(str(tmp_path / "pickled"))])


def test_warnings(folder: Path, tmp_path: Path) -> None:
    def warnings(*arguments: Any, **changes: Any) -> str:
        return "\n".join(plan(folder, *arguments, **changes).warnings)

    assert "reads no 'density'" in warnings("linear", [weighted("a", density=0.5)])
    assert "belongs to the merge as a whole" in warnings("linear", [weighted("a", normalize=True)])
    assert "reads no parameters of the base" in warnings("ties", [weighted("base"), weighted("a")], base_model="base")
    assert "t = 1.5 is outside [0, 1]" in warnings("slerp", ["a"], base_model="base", parameters={"t": 1.5})
    nothing = {"base_model": "base", "parameters": {"normalize": True}}
    assert "not divided" in warnings("task_arithmetic", [weighted("a"), weighted("b", -1)], **nothing)
    assert "nearly cancel" in warnings("linear", [weighted("a"), weighted("b", -0.99)])
    assert "divisors can be near zero" in warnings("ties", [weighted("a"), weighted("b", -0.3)], base_model="base")
    write_model(tmp_path / "longer", random_tensors(0), rope_theta=1e6)
    assert "rope_theta is 10000.0" in warnings("linear", [weighted("a"), weighted(str(tmp_path / "longer"))])
    assert warnings("linear", [weighted("a"), weighted("b")]) == ""


def test_tokenizers_that_disagree(tmp_path: Path) -> None:
    for name, vocabulary in {
        "one": {"a": 0, "b": 1, "c": 2},
        "same_and_more": {"c": 2, "b": 1, "a": 0, "d": 3},
        "other": {"a": 0, "b": 2, "c": 1},
    }.items():
        write_model(tmp_path / name, random_tensors(0))
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    assert plan(tmp_path, "linear", [weighted("one"), weighted("same_and_more")]).warnings == ()
    (warning,) = plan(tmp_path, "linear", [weighted("one"), weighted("other")]).warnings
    assert "2 ids (first: 1) mean other tokens" in warning
    arranged = plan(tmp_path, "linear", [weighted("one"), weighted("other")], tokenizer_source="other")
    assert arranged.warnings == ()
    source = by_name(arranged)["lm_head.weight"].sources[0]
    assert source.rows is not None
    assert source.rows.rows[:4].tolist() == [0, 2, 1, 3]
    assert arranged.config_donor.name == "one"
    assert arranged.tokenizer_donor.name == "other"
    chosen = plan(tmp_path, "linear", [weighted("one"), weighted("same_and_more")], tokenizer_source="same_and_more")
    assert chosen.config_donor.name == "one"
    assert [file.name for donor, file in chosen.carried if donor.name == "same_and_more"] == ["tokenizer.json"]


def test_every_error_is_reported_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    """A broken header, a pickle, a missing folder, an odd tensor, a zero sum, an output in use: all in one message."""
    write_model(tmp_path / "lies", random_tensors(0), shards=3)
    for number in (1, 3):
        shard = tmp_path / "lies" / f"model-0000{number}-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        place = data.index(b'"data_offsets":[') + len(b'"data_offsets":[')
        data[place : place + 1] = b"9"
        shard.write_bytes(data)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    tensors = sibling(random_tensors(0), 1)
    for layer in range(3):
        del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
    write_model(tmp_path / "lacks", tensors)
    names = ["lies", "pickled", "nowhere", "lacks"]
    entries = [*({"model": str(tmp_path / name)} for name in names), weighted(str(folder / "base"), -4.0)]
    written = {"merge_method": "linear", "models": entries, "parameters": {"weight": 1.0}, "chat_template": "chatlm"}
    with pytest.raises(PlanError) as error:
        plan_merge(parse_config(written), out=tmp_path)
    text = str(error.value)
    for message in (
        "model-00001-of-00003.safetensors: ",
        "model-00003-of-00003.safetensors: ",
        "pytorch_model.bin is a pickle",
        "nowhere': no such folder",
        f"model.layers.{{0-2}}.mlp.up_proj.weight: not in {tmp_path / 'lacks'}",
        "weights [1.0, 1.0, 1.0, 1.0, -4.0] sum to 0 under normalize: true",
        f"{tmp_path}: holds the input",
        "chat_template: allowed: auto",
    ):
        assert message in text
    assert len(error.value.problems) >= 8


def test_the_place_of_the_result(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse_config({"merge_method": "linear", "models": [weighted("a"), weighted("b")]})
    assert plan_merge(parsed, folder, out=tmp_path / "new" / "deep").tensors
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for out, message in (
        (folder / "a", "is an input of the merge"),
        (folder / "a" / "merged", "lies in the input"),
        (tmp_path / "used", "already exists and is not empty"),
    ):
        with pytest.raises(PlanError, match=message):
            plan_merge(parsed, folder, out=out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(PlanError, match=r"GB are needed, the disk of .* has 0.00 GB free"):
        plan_merge(parsed, folder, out=tmp_path / "new")


def test_layers_of_the_configuration_follow_slices(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    for name in ("a", "b"):
        write_model(tmp_path / name, random_tensors(0), layer_types=kinds, max_window_layers=3)
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 2]}]},
        {"sources": [{"model": "b", "layer_range": [1, 3]}]},
    ]
    found = plan_merge(parse_config({"merge_method": "passthrough", "slices": slices}), tmp_path)
    assert found.config_json["num_hidden_layers"] == found.config_json["max_window_layers"] == 4
    assert found.config_json["layer_types"] == [kinds[0], kinds[1], kinds[1], kinds[2]]
    source = by_name(found)[UP_PROJ.format(3)].sources[0]
    assert (source.model, source.name) == (1, UP_PROJ.format(2))
    assert by_name(found)["lm_head.weight"].sources[0].model == 1


def test_experts_stay_as_they_are_on_disk(tmp_path: Path) -> None:
    shape = {f"model.layers.{layer}.block_sparse_moe.experts.{e}.w1.weight": (8, 4) for layer in (0, 1) for e in (0, 1)}
    for name in ("a", "b"):
        write_model(tmp_path / name, {key: torch.zeros(size) for key, size in shape.items()}, num_hidden_layers=2)
    models = [weighted("a"), weighted("b", [{"filter": "experts.1", "value": 2}])]
    tensors = by_name(plan(tmp_path, "linear", models, parameters={"weight": 1}))
    assert tensors.keys() == shape.keys()
    assert tensors["model.layers.1.block_sparse_moe.experts.1.w1.weight"].parameters["weight"] == [1, 2]
    assert tensors["model.layers.1.block_sparse_moe.experts.0.w1.weight"].layer == 1


def test_filters_that_match_nothing_are_noted(folder: Path) -> None:
    found = plan(folder, "linear", [weighted("a"), weighted("b", [{"filter": "mpl", "value": 2}, {"value": [1, 3]}])])
    assert "weight: the filter 'mpl' is in no tensor's name" in found.warnings
    assert any("take the gradient's first value" in note for note in found.notes)


def test_the_command_prints_the_plan_and_every_error(folder: Path, tmp_path: Path) -> None:
    written = {"merge_method": "linear", "models": [weighted(str(folder / "a")), weighted(str(folder / "b"), [0, 1])]}
    path = write_yaml(tmp_path / "merge.yaml", written)
    result = CliRunner().invoke(app, ["merge", "plan", str(path)])
    assert result.exit_code == 0
    assert "model.layers.{0-2}.mlp.up_proj.weight" in result.output
    assert "[1, 0] → [1, 0.5] → [1, 1]" in result.output
    write_yaml(path, written | {"dtpye": "float32"})
    result = CliRunner().invoke(app, ["merge", "plan", str(path), "--out", str(folder)])
    assert "did you mean 'dtype'" in str(result.exception)
    assert "already exists and is not empty" in str(result.exception)
