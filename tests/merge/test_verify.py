"""`steep merge verify`: what is whole passes, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from steep.cli.app import app
from steep.data.files import sha256_file
from steep.merge import merge
from steep.merge.verify import verify_merge
from tests.merge.models import random_tensors, sibling, write_model, write_yaml

UP_PROJ = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three siblings with a tokenizer, a configuration with relative paths, and its merge in `out`."""
    folder = tmp_path_factory.mktemp("verify")
    base = random_tensors(0, layers=1)
    for seed, name in enumerate(("base", "a", "b")):
        write_model(folder / name, sibling(base, seed), dtype=torch.bfloat16, num_hidden_layers=1)
        (folder / name / "LICENSE").write_text("a licence")
        write_tokenizer(folder / name)
    write_yaml(folder / "merge.yml", config())
    merge(folder / "merge.yml", folder / "out", workers=1)
    return folder


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE({chr(33 + i): i for i in range(300)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))


def config(weight: float = 0.7, density: float = 0.5, method: str = "ties", **changes: Any) -> dict[str, Any]:
    parameters = {"weight": weight, "density": density}
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": "a", "parameters": parameters}, {"model": "b", "parameters": parameters}],
    } | changes


@pytest.fixture
def out(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folder / "out", tmp_path / "out"))


def change_tensors(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def problems(out: Path, **options: Any) -> list[str]:
    with pytest.raises(ValueError, match="problem") as error:
        verify_merge(out, **options)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_what_is_whole_passes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_merge(folder / "out", forward=True, progress=lambda done, total: seen.append((done, total)))
    assert report["tensors"] == 12
    assert report["hashes"]["tensors"] == 12
    assert report["hashes"]["inputs"] >= 4
    assert report["hashes"]["files"] >= 4
    assert report["recomputed"]["tensors"] == 12
    assert report["not_checked"] == []
    assert 0 < report["forward"]["nats_per_token"] < 20
    assert seen[-1] == (2 * report["values"],) * 2


def test_the_choice_of_pieces_is_the_seeds(folder: Path) -> None:
    found = [verify_merge(folder / "out", chunks=1, seed=seed)["recomputed"] for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0]["values"] < 12 * 4096


def test_a_flipped_bit_is_found_by_hash_and_by_value(out: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP_PROJ].view(torch.int16)[3, 5] ^= 1 << 6

    change_tensors(out, flip)
    found = problems(out, chunks=2)
    assert any(UP_PROJ in line and "bytes are not those" in line for line in found)
    (value,) = [line for line in found if "recomputed" in line]
    assert UP_PROJ in value
    assert f"first at element {3 * 64 + 5}:" in value


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(UP_PROJ), f"no tensor {UP_PROJ}, which the plan has"),
        (lambda t: t.update({UP_PROJ: t[UP_PROJ].float()}), f"{UP_PROJ} is float32, the plan says bfloat16"),
        (lambda t: t.update({UP_PROJ: t[UP_PROJ].T.contiguous()}), f"{UP_PROJ} has shape [64, 96]"),
        (lambda t: t.update({"extra.weight": torch.zeros(3)}), "tensor extra.weight is not in the plan"),
        (lambda t: t[UP_PROJ].view(-1)[7].fill_(float("nan")), f"{UP_PROJ} holds NaN"),
    ],
    ids=["missing", "dtype", "shape", "extra", "nan"],
)
def test_damaged_structure_is_named(out: Path, damage: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    change_tensors(out, damage)
    assert any(message in line for line in problems(out))


def test_a_truncated_file_is_one_problem_among_others(out: Path) -> None:
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (out / "LICENSE").write_text("another licence")
    found = problems(out)
    assert any("truncated" in line for line in found)
    assert any("LICENSE" in line for line in found)


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE"])
def test_files_beside_the_weights(out: Path, name: str, folder: Path) -> None:
    (out / name).write_text("{}")
    assert any(name in line and f"is not that of {folder / 'base'}" in line for line in problems(out))
    (out / name).unlink()
    assert any(name in line and "not found" in line for line in problems(out))


def test_config_json(out: Path) -> None:
    values = json.loads((out / "config.json").read_text()) | {"rope_theta": 5.0}
    (out / "config.json").write_text(json.dumps(values))
    assert any("rope_theta is 5.0, the plan says 10000.0" in line for line in problems(out))


def test_inputs_that_have_changed(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "out")
    merge(copy / "merge.yml", copy / "out", workers=1)
    verify_merge(copy / "out", chunks=1)
    change_tensors(copy / "a", lambda tensors: tensors[UP_PROJ].mul_(2))
    assert problems(copy / "out") == [f"{copy / 'a' / 'model.safetensors'}: has changed since it was merged"]
    shutil.rmtree(copy / "b")
    found = problems(copy / "out")
    assert any("cannot be planned any more" in line for line in found)
    assert any("b/model.safetensors: an input of the merge, not found" in line for line in found)


def test_a_configuration_that_has_moved(folder: Path, tmp_path: Path) -> None:
    path = write_yaml(folder / "moving.yml", config())
    merge(path, tmp_path / "out", workers=1)
    path.rename(folder / "moved.yml")
    found = problems(tmp_path / "out", chunks=1)
    assert all("the recorded configuration cannot be planned" in line or "no such folder" in line for line in found)
    report = verify_merge(tmp_path / "out", config=folder / "moved.yml", chunks=1)
    assert report["not_checked"] == [f"{path}: an input of the merge, not found"]
    assert report["recomputed"]["tensors"] == 12


@pytest.mark.parametrize(
    "other",
    [
        {"weight": 0.8, "parameters": {"normalize": False}},
        {"density": 0.51},
        {"parameters": {"lambda": 1.1}},
        {"method": "dare_ties"},
        {"method": "task_arithmetic"},
    ],
    ids=["weight", "density", "lambda", "dare", "method"],
)
def test_values_of_another_configuration_are_told_apart(folder: Path, other: dict[str, Any]) -> None:
    written = config(**other)
    if written["merge_method"] == "task_arithmetic":
        written["models"] = [{"model": model, "parameters": {"weight": 0.7}} for model in ("a", "b")]
    path = write_yaml(folder / "other.yml", written)
    found = problems(folder / "out", config=path)
    assert sum("recomputed values differ" in line for line in found) >= 8  # of 9 matrices; vectors hardly change
    assert all("recomputed values differ" in line for line in found)


def test_another_seed_is_told_apart(folder: Path, tmp_path: Path) -> None:
    path = write_yaml(folder / "seeded.yml", config(method="dare_ties", random_seed=1))
    merge(path, tmp_path / "out", workers=1)
    verify_merge(tmp_path / "out", chunks=1)
    other = write_yaml(folder / "other_seed.yml", config(method="dare_ties", random_seed=2))
    assert sum("recomputed values differ" in line for line in problems(tmp_path / "out", config=other)) >= 8


def test_a_folder_without_a_record_needs_the_configuration(folder: Path, tmp_path: Path, out: Path) -> None:
    for name in ("manifest.json", "merge.json"):
        (out / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no record of a merge by steep; give --config"):
        verify_merge(out)
    report = verify_merge(out, config=folder / "merge.yml", chunks=1)
    assert report["not_checked"] == ["hashes: there is no record of the merge"]
    assert report["recomputed"]["tensors"] == 12
    with pytest.raises(FileNotFoundError, match="nowhere"):
        verify_merge(tmp_path / "nowhere")


def test_integers_that_are_no_longer_the_inputs(tmp_path: Path) -> None:
    base = random_tensors(0, layers=1) | {"model.steps": torch.arange(5)}
    for seed, name in enumerate(("base", "a")):
        write_model(tmp_path / name, base | {UP_PROJ: base[UP_PROJ] * (1 + seed / 100)}, num_hidden_layers=1)
    path = write_yaml(tmp_path / "m.yml", {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}],
                                           "parameters": {"t": 0.5}})  # fmt: skip
    merge(path, tmp_path / "out", workers=1)
    verify_merge(tmp_path / "out", chunks=1)
    change_tensors(tmp_path / "out", lambda tensors: tensors["model.steps"].add_(1))
    assert any("model.steps: 5 of 5" in line or "model.steps: 1 of 5" in line for line in problems(tmp_path / "out"))


def test_the_command(folder: Path, out: Path) -> None:
    result = CliRunner().invoke(app, ["merge", "verify", str(out), "--chunks", "1", "--forward"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["path"] == str(out)
    assert report["forward"]["tokens"] > 5
    assert sha256_file(out / "LICENSE") == sha256_file(folder / "base" / "LICENSE")
    change_tensors(out, lambda tensors: tensors[UP_PROJ].zero_())
    assert isinstance(CliRunner().invoke(app, ["merge", "verify", str(out)]).exception, ValueError)
