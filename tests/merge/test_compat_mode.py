"""What `compat` does to a merge besides its numbers: what it refuses, records, and depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.merge import merge, parse_config, plan_merge, sweep
from steep.merge.compat import MERGEKIT
from tests.merge.models import random_tensors, read_model, sibling, write_model, write_yaml
from tests.merge.test_resume import contents, finished, kill_after

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compat_mode")
    base = random_tensors(0, layers=1)
    for name, tensors in {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}.items():
        write_model(folder / name, tensors, dtype=torch.bfloat16, num_hidden_layers=1)
    return folder


def config(folder: Path, method: str = "dare_linear", **changes: Any) -> dict[str, Any]:
    parameters = {"weight": 0.5} | ({"density": 0.4} if method in ("dare_linear", "ties") else {})
    models = [{"model": str(folder / name), "parameters": parameters} for name in "ab"]
    written = {"merge_method": method, "base_model": str(folder / "base"), "models": models, "compat": MERGEKIT}
    return written | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compat": "mergekit"}, "compat: unknown peer 'mergekit'; did you mean 'mergekit-0.1.5'"),
        ({"method": "tsv_m"}, "mergekit-0.1.5 has no method 'tsv_m'; allowed with compat: linear, slerp"),
        ({"parameters": {"rescale": "inv_density"}}, "rescale: 'inv_density' is not in mergekit-0.1.5; allowed with"),
        ({"method": "ties", "parameters": {"topk_scope": "row"}}, "topk_scope: 'row' is not in mergekit-0.1.5"),
        ({"method": "ties", "parameters": {"ties_sign": "unweighted"}}, "ties_sign: 'unweighted' is not in merge"),
    ],
)
def test_what_mergekit_does_not_have_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_merge(parse_config(config(folder, **changes)))


def test_a_gpu_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="device: 'cuda'; compat is bit parity on a CPU: allowed: cpu"):
        merge(config(folder), tmp_path / "out", "cuda")
    assert list(tmp_path.iterdir()) == []


def test_the_record_says_which_mode(folder: Path, tmp_path: Path) -> None:
    result = merge(config(folder, random_seed=3), tmp_path / "out", workers=4)
    assert result["mode"] == result["resolved"]["compat"] == MERGEKIT
    assert result["seed"] == 3
    assert result["execution"]["threads"] == torch.get_num_threads()
    exact = config(folder)
    del exact["compat"]
    assert merge(exact, tmp_path / "exact")["mode"] == "exact"
    asked = merge(exact | {"random_seed": 3}, tmp_path / "asked", compat=MERGEKIT)
    assert asked["mode"] == MERGEKIT
    assert contents(tmp_path / "asked") == contents(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj.weight"
    ours, exactly = (
        result["tensors"][name],
        json.loads((tmp_path / "exact" / "merge.json").read_text())["tensors"][name],
    )
    assert ours["relative_deltas"] == exactly["relative_deltas"]
    assert ours["delta_cosines"] == exactly["delta_cosines"]


def test_masks_depend_on_the_seed_and_on_the_order_of_the_models(folder: Path, tmp_path: Path) -> None:
    written = config(folder, dtype="float32")
    variants = [written, written | {"random_seed": 1}, written | {"models": written["models"][::-1]}, written]
    for number, variant in enumerate(variants):
        merge(variant, tmp_path / str(number))
    first, seed, order, again = (contents(tmp_path / str(number))["model.safetensors"] for number in range(4))
    assert first == again
    assert len({first, seed, order}) == 3


def test_a_sweep_is_merges_side_by_side(folder: Path, tmp_path: Path) -> None:
    """Each output has a generator of its own."""
    values = [0.5, 1.0]
    sweep(config(folder), tmp_path / "sweep", "lambda", values)
    for value in values:
        merge(config(folder, parameters={"lambda": value}), tmp_path / str(value))
        assert contents(tmp_path / "sweep" / f"lambda={value}") == contents(tmp_path / str(value))


def test_a_killed_merge_draws_again_what_it_drew(folder: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "merge.yml", config(folder))
    kill_after(path, tmp_path / "out", 5)
    assert len(finished(tmp_path / "out")) == 5
    assert merge(path, tmp_path / "out", max_shard_bytes=60_000)["taken_over"] == 0
    merge(path, tmp_path / "expected", max_shard_bytes=60_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_killed_merge_without_masks_is_gone_on_with(folder: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "merge.yml", config(folder, "ties"))
    kill_after(path, tmp_path / "out", 5)
    assert merge(path, tmp_path / "out", max_shard_bytes=60_000)["taken_over"] == 5
    merge(path, tmp_path / "expected", max_shard_bytes=60_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_dot_products_of_a_whole_tensor_do_not_depend_on_blocks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = merge(config(folder), tmp_path / "expected")
    monkeypatch.setattr("steep.merge.stream.BLOCK", 4096)
    assert merge(config(folder), tmp_path / "out")["tensors"] == expected["tensors"]


def test_where_mergekit_breaks_off_the_tensor_is_named(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mixer.weight": torch.arange(4.0).view(4, 1)}
    for number, name in enumerate(("base", "a", "b")):
        shifted = {key: x + number for key, x in tensors.items()}
        write_model(tmp_path / name, shifted, num_hidden_layers=1)
    written = config(tmp_path, "della", parameters={"density": 0.5})
    with pytest.raises(ValueError, match="layers.0.mixer.weight: a row of one element has no ranks: mergekit 0.1.5"):
        merge(written, tmp_path / "out")
    for name, factor in (("c", 1), ("d", -1), ("e", -1)):  # 2 u - u - u
        write_model(tmp_path / name, {key: factor * x for key, x in tensors.items()}, num_hidden_layers=1)
    weights = {"c": 2, "d": 1, "e": 1}
    models = [{"model": str(tmp_path / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    with pytest.raises(ValueError, match="layers.0.mixer.weight: multislerp: the weighted unit vectors cancel"):
        merge({"merge_method": "multislerp", "models": models, "compat": MERGEKIT}, tmp_path / "out")


def test_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    written = config(folder)
    merge(written, tmp_path / "expected")
    del written["compat"]
    path = write_yaml(tmp_path / "merge.yml", written)
    command = [sys.executable, "-m", "steep.cli", "merge", path, tmp_path / "out", "--compat"]
    run = subprocess.run([*command, "mergekit-0.1.4"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "compat: unknown peer 'mergekit-0.1.4'; did you mean 'mergekit-0.1.5'?" in run.stderr
    subprocess.run([*command, MERGEKIT], capture_output=True, check=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_without_a_dtype_the_widest_of_the_models(folder: Path, tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide", sibling(random_tensors(0, layers=1), 4), num_hidden_layers=1)
    written = config(folder, "ties")
    written["models"].append({"model": str(wide), "parameters": {"weight": 0.1}})
    merge(written, tmp_path / "out")
    assert {x.dtype for x in read_model(tmp_path / "out").values()} == {torch.float32}
