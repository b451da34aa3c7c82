"""`steep merge diff`: figures against plain torch, whatever the pieces; odd folders; what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from steep.cli.app import app
from steep.merge.diff import diff
from steep.merge.measure import Magnitudes, place_of
from tests.merge.models import random_tensors, read_model, sibling, write_model

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff")
    base = random_tensors(0)
    for number, name in enumerate(("base", "a", "b")):
        write_model(folder / name, sibling(base, number), dtype=torch.bfloat16, shards=1 + number)
    write_model(folder / "wide", read_model(folder / "a"), dtype=torch.float32)
    write_model(folder / "tied", random_tensors(0, tied=True, vocab=328), vocab_size=328)
    return folder


def compare(tmp_path: Path, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    for name, tensor in (("x", x), ("y", y)):
        write_model(tmp_path / name, {"t": tensor}, dtype=tensor.dtype)
    return diff(tmp_path / "x", tmp_path / "y")["tensors"]["t"]


def test_figures_are_those_of_plain_torch(folder: Path) -> None:
    found = diff(folder / "a", folder / "b", folder / "base")
    a, b, base = (read_model(folder / name) for name in ("a", "b", "base"))
    assert found["tensors"].keys() == a.keys()
    groups = {
        "all": (found["all"], list(a)),
        "layer": (found["layers"][2], [name for name in a if ".layers.1." in name]),
        "role": (next(r for r in found["roles"] if r["role"] == "mlp.up_proj"), [n for n in a if "up_proj" in n]),
        "tensor": (found["tensors"][UP_PROJ], [UP_PROJ]),
    }
    assert groups["layer"][0]["layer"] == "1"
    for figures, names in groups.values():
        x, y, c = (torch.cat([m[name].double().flatten() for name in names]) for m in (a, b, base))
        assert figures["values"] == x.numel()
        assert figures["relative_norm"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
        assert figures["cosine"] == pytest.approx(float(x @ y / x.norm() / y.norm()), rel=1e-6)
        assert figures["equal"] == float((x == y).double().mean())
        assert figures["max_abs"] == pytest.approx(float((y - x).abs().max()), rel=1e-6)
        expected = [float((m - c).norm() / c.norm()) for m in (x, y)]
        assert figures["relative_deltas"] == pytest.approx(expected, rel=1e-6)
        cosine = float((x - c) @ (y - c) / (x - c).norm() / (y - c).norm())
        assert figures["delta_cosine"] == pytest.approx(cosine, abs=1e-6)


def test_pieces_leave_no_trace(folder: Path) -> None:
    assert diff(folder / "a", folder / "b", piece=4096) == diff(folder / "a", folder / "b", piece=1 << 20)


def test_equal_models(folder: Path) -> None:
    found = diff(folder / "a", folder / "wide")
    assert found["all"]["equal"] == 1
    assert found["all"]["relative_norm"] == 0
    assert set(found["all"]["ulps"].values()) == {0}
    assert found["tensors"][UP_PROJ]["dtypes"] == ["bfloat16", "float32"]


def test_ulps_are_those_of_the_storage_dtype_at_the_larger_value(tmp_path: Path) -> None:
    x = torch.tensor([1.0, 1.0, -2.0, 0.0, 1.0, 256.0]).bfloat16()
    y = torch.tensor([1.0078125, 1.0, -2.03125, 2.0**-133, -1.0, 255.0]).bfloat16()
    # bf16: 2^-7 apart from 1 on, 2^-6 from 2 on, 2 from 256 on; 2^-133 is the least number
    found = compare(tmp_path, x, y)
    assert found["ulps"] == {"0.5": 1, "0.9": 256, "0.99": 256, "0.999": 256, "1": 256}
    assert found["equal"] == pytest.approx(1 / 6)


def test_of_two_dtypes_the_coarser_one_counts(tmp_path: Path) -> None:
    found = compare(tmp_path, torch.tensor([1.0, 1.0]), torch.tensor([1.0078125, 1.0 + 2.0**-7]).bfloat16())
    assert found["ulps"]["1"] == 1


def test_integers(tmp_path: Path) -> None:
    found = compare(tmp_path, torch.tensor([1 << 40, 5]), torch.tensor([(1 << 40) + 1, 8]))
    assert found["equal"] == 0
    assert found["max_abs"] == 3
    assert found["ulps"]["1"] == 3


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    x = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    found = compare(tmp_path, x, torch.tensor([1.0, 2.0, 3.5, 4.0]))
    assert found["not_finite"] == 2
    assert found["max_abs"] == 0.5
    assert found["relative_norm"] == pytest.approx(0.5 / 10**0.5)
    assert found["equal"] == 0.25


def test_empty_scalar_and_zero_tensors(tmp_path: Path) -> None:
    assert compare(tmp_path / "empty", torch.zeros(0, 3), torch.zeros(0, 3))["values"] == 0
    assert compare(tmp_path / "scalar", torch.tensor(2.0), torch.tensor(3.0))["relative_norm"] == 0.5
    zero = compare(tmp_path / "zero", torch.zeros(3), torch.ones(3))
    assert zero["relative_norm"] is None
    assert zero["cosine"] is None


def test_tensors_that_have_no_counterpart_are_listed(folder: Path) -> None:
    found = diff(folder / "a", folder / "tied")
    assert found["only_in_a"] == ["lm_head.weight"]
    assert found["only_in_b"] == []
    assert found["shapes_differ"] == {"model.embed_tokens.weight": [[320, 64], [328, 64]]}
    assert "model.embed_tokens.weight" not in found["tensors"]


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "other", {"t": torch.ones(3)})
    with pytest.raises(ValueError, match="no tensor has the same name and shape"):
        diff(folder / "a", tmp_path / "other")
    with pytest.raises(ValueError, match=r"tied: has no tensor lm_head|tied: has no tensor model\.embed"):
        diff(folder / "a", folder / "b", folder / "tied")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        diff(folder / "a", tmp_path / "nowhere")


def test_the_command(folder: Path, tmp_path: Path) -> None:
    arguments = ["merge", "diff", str(folder / "a"), str(folder / "b"), "--base", str(folder / "base")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "diff.json")])
    assert result.exit_code == 0, result.output
    assert "By role" in result.output
    assert "mlp.up_proj" in result.output
    found = json.loads((tmp_path / "diff.json").read_text())
    assert found == diff(folder / "a", folder / "b", folder / "base")
    assert max(found["tensors"], key=lambda name: found["tensors"][name]["relative_norm"]) in result.output
    every = CliRunner().invoke(app, [*arguments, "--tensors"]).output
    assert all(name in every for name in read_model(folder / "a"))


def test_places() -> None:
    found = place_of("model.layers.3.block_sparse_moe.experts.5.w1.weight")
    assert (found.stack, found.layer, found.role) == ("model.layers", 3, "block_sparse_moe.experts.w1")
    assert place_of("transformer.h.3.attn.c_attn.bias").role == "attn.c_attn.bias"
    assert (place_of("lm_head.weight").layer, place_of("model.norm.weight").role) == (-1, "norm")


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=200), st.floats(0.01, 1), st.integers(0, 200))
def test_histograms_are_right_to_within_their_bins(values: list[float], q: float, k: int) -> None:
    histogram = Magnitudes()
    for lo in range(0, len(values), 7):
        histogram.add(torch.tensor(values[lo : lo + 7], dtype=torch.float32))
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    place = max(1, -int(-q * len(values) // 1))
    exact = float(ordered[place - 1])
    assert exact * (1 - 2**-7) - 1e-40 <= histogram.quantile(q) <= exact
    k = min(k, len(values))
    largest = ordered[len(values) - k :]
    count, squares = histogram.largest(k)
    assert count == int((largest >= 2.0**-133).sum())
    assert squares == pytest.approx(float(largest.square().sum()), rel=0.02, abs=1e-60)
