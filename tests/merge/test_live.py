"""A merge in live weights: the bits that the executor writes, whatever the method, dtype, threads and pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.engine.config import ModelConfig
from steep.engine.model import Decoder
from steep.engine.weights import load_weights
from steep.merge import merge, parse_config, plan_merge
from steep.merge.live import live_decoder, merge_live
from tests.merge.models import random_tensors, sibling, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["untied", "tied"])
def models(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder, tied = tmp_path_factory.mktemp("live"), request.param == "tied"
    base = random_tensors(0, tied=tied)
    for name, tensors in {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}.items():
        write_model(folder / name, tensors, dtype=torch.bfloat16, shards=2, tie_word_embeddings=tied)
    return folder


def configuration(method: str, **changes: Any) -> dict[str, Any]:
    models = [{"model": name, "parameters": {"weight": [0.2, 0.7], "density": 0.5}} for name in "ab"]
    return {"merge_method": method, "base_model": "base", "models": models} | changes


CASES = {
    "ties": configuration("ties"),
    "dare_ties": configuration("dare_ties", random_seed=7),
    "della": configuration("della", dtype="float32"),
    "task_arithmetic": configuration("task_arithmetic", parameters={"lambda": [{"filter": "mlp", "value": 0.3}]}),
    "linear": configuration("linear", out_dtype="float16", parameters={"weight": 0.1}),
    "slerp": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}], "parameters": {"t": [0, 1]}},
    "tsv_m": {"merge_method": "tsv_m", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]},
    "slices": {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in "ab"],
    },
}


def loaded(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_folder(folder))
    load_weights(decoder, folder, dtype)
    return decoder.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_live_weights_are_those_that_the_executor_writes(
    models: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    (models / "merge.yml").write_text(json.dumps(CASES[name]))
    record = merge(models / "merge.yml", tmp_path / "out")
    plan = plan_merge(parse_config(CASES[name]), models)
    decoder = live_decoder(plan, dtype)
    hashes = merge_live(plan, decoder, workers=2, chunk_elements=4096)
    assert hashes == {tensor: entry["sha256"] for tensor, entry in record["tensors"].items()}
    expected = loaded(tmp_path / "out", dtype)
    assert decoder.state_dict().keys() == expected.keys()
    for tensor, values in decoder.state_dict().items():
        assert torch.equal(values, expected[tensor]), tensor
    assert not decoder.training


def test_a_decoder_is_used_again(models: Path) -> None:
    """Nothing of the merge before is left."""
    plans = [plan_merge(parse_config(CASES[name]), models) for name in ("ties", "task_arithmetic")]
    used, fresh = live_decoder(plans[0]), live_decoder(plans[1])
    merge_live(plans[0], used)
    merge_live(plans[1], used)
    merge_live(plans[1], fresh)
    assert all(torch.equal(x, y) for x, y in zip(used.parameters(), fresh.parameters(), strict=True))


def test_mixtral_experts_go_to_their_rows(tmp_path: Path) -> None:
    base = {k: v for k, v in random_tensors(0).items() if ".mlp." not in k}
    generator = torch.Generator().manual_seed(5)
    for layer in range(3):
        prefix = f"model.layers.{layer}.block_sparse_moe."
        base[prefix + "gate.weight"] = torch.randn(4, 64, generator=generator)
        for expert in range(4):
            for matrix, shape in {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}.items():
                base[f"{prefix}experts.{expert}.{matrix}.weight"] = torch.randn(shape, generator=generator)
    family = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    for name, tensors in {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}.items():
        write_model(tmp_path / name, tensors, num_local_experts=4, num_experts_per_tok=2, **family)
    (tmp_path / "merge.yml").write_text(json.dumps(CASES["ties"]))
    merge(tmp_path / "merge.yml", tmp_path / "out")
    plan = plan_merge(parse_config(CASES["ties"]), tmp_path)
    decoder = live_decoder(plan)
    merge_live(plan, decoder)
    expected = loaded(tmp_path / "out", torch.float32)
    assert all(torch.equal(values, expected[name]) for name, values in decoder.state_dict().items())


def test_what_the_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    base = random_tensors(0)
    for name, tensors in {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}.items():
        write_model(tmp_path / name, tensors, model_type="gpt_neox")
    plan = plan_merge(parse_config(CASES["ties"]), tmp_path)
    with pytest.raises(ValueError, match="model_type is 'gpt_neox'"):
        live_decoder(plan)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    base = random_tensors(0) | {"model.extra.weight": torch.zeros(3)}
    for name, tensors in {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}.items():
        write_model(tmp_path / name, tensors)
    plan = plan_merge(parse_config(CASES["ties"]), tmp_path)
    with pytest.raises(ValueError, match=r"1 unexpected tensors, for example model\.extra\.weight"):
        live_decoder(plan)


def test_nan_in_an_input_is_refused(models: Path, tmp_path: Path) -> None:
    base = random_tensors(0)
    bad = sibling(base, 1)
    bad["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    for name, tensors in {"base": base, "a": bad, "b": sibling(base, 2)}.items():
        write_model(tmp_path / name, tensors)
    plan = plan_merge(parse_config(CASES["ties"]), tmp_path)
    with pytest.raises(ValueError, match=r"a/model.safetensors: model.layers.1.mlp.up_proj.weight holds NaN"):
        merge_live(plan, live_decoder(plan))
