"""The methods that mergekit 0.1.5 has beyond test_mergekit.py against it, computed in float32 in both.

From float32 models the results agree within float32 rounding; from bf16 models, rounded to bf16 once, within one bf16
step. Where mergekit draws masks at random it is given steep's. What is left is counted, and each of it is explained:
elements of equal magnitude of which mergekit keeps or ranks any, and mergekit's own rounding errors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.merge import arcee_fusion, merge
from steep.merge.fusion import importance
from steep.merge.method_table import METHODS
from tests.merge.models import random_tensors, read_model, sibling, write_model, write_yaml
from tests.merge.test_mergekit import _absolute, bf16_steps

pytest.importorskip("mergekit")
pytestmark = pytest.mark.usefixtures("one_thread")


def of_models(
    method: str, *names: str, base: str | None = None, weighted: bool = True, **shared: Any
) -> dict[str, Any]:
    """A configuration with weights 0.7, 0.4, ... for the models after the base."""
    models = [
        {"model": name} | ({"parameters": {"weight": weight}} if weighted else {})
        for name, weight in zip(names, (0.7, 0.4, 0.2), strict=False)
    ]
    return {"merge_method": method, "models": models, "parameters": shared} | ({"base_model": base} if base else {})


def thinned(method: str, **shared: Any) -> dict[str, Any]:
    return of_models(method, "a", "b", base="base", **shared)


CASES: dict[str, dict[str, Any]] = {
    "nuslerp": of_models("nuslerp", "base", "far"),
    "nuslerp_of_task_vectors": of_models("nuslerp", "a", "far", base="base"),
    "nuslerp_rows": of_models("nuslerp", "a", "far", nuslerp_flatten=False),
    "nuslerp_columns": of_models("nuslerp", "a", "far", base="base", nuslerp_flatten=False, nuslerp_row_wise=True),
    "multislerp": of_models("multislerp", "base", "far", "farther"),
    "multislerp_of_task_vectors": of_models("multislerp", "a", "far", base="base", normalize_weights=False),
    "karcher": of_models("karcher", "base", "far", "farther", weighted=False),
    "karcher_few_steps": of_models("karcher", "far", "farther", weighted=False, max_iter=1),
    "model_stock": of_models("model_stock", "far", "farther", "a", base="base", weighted=False),
    "model_stock_rows": of_models("model_stock", "far", "farther", base="base", weighted=False, filter_wise=True),
    "breadcrumbs": thinned("breadcrumbs", density=0.5, gamma=0.1),
    "breadcrumbs_default": thinned("breadcrumbs", density=0.9),
    "breadcrumbs_ties": thinned("breadcrumbs_ties", density=0.4, gamma=0.05, normalize=True, rescale=True),
    "ties_rescaled": thinned("ties", density=0.5, rescale=True),
    "dare_linear": thinned("dare_linear", density=0.4),
    "dare_ties": thinned("dare_ties", density=0.6, normalize=True),
    "dare_not_rescaled": thinned("dare_ties", density=0.3, rescale=False, **{"lambda": 1.4}),
    "della": thinned("della", density=0.5),
    "della_linear": thinned("della_linear", density=0.3, epsilon=0.2),
    "sce": of_models("sce", "far", "farther", base="base", weighted=False),
    "sce_selected": of_models("sce", "far", "farther", base="base", weighted=False, select_topk=0.3),
    "ram": of_models("ram", "a", "b", base="base", weighted=False),
    "ramplus_tl": of_models("ramplus_tl", "a", "b", base="base", weighted=False, r=0.3, alpha=0.7),
    "nearswap": of_models("nearswap", "a", base="base", weighted=False, t=1e-3),
    "arcee_fusion": of_models("arcee_fusion", "far", base="base", weighted=False),
    "passthrough": of_models("passthrough", "a", weighted=False),
    "passthrough_scaled": of_models("passthrough", "a", weighted=False, scale=0.3),
}
MODES = {
    "fp32": (torch.float32, {"dtype": "float32"}),
    "bf16": (torch.bfloat16, {"dtype": "float32", "out_dtype": "bfloat16"}),
}
# Steps along great circles: errors of float32 cosines and norms, in mergekit, show in every element.
BY_ANGLES = ("nuslerp", "multislerp", "karcher", "model_stock")
# Which elements: those of equal magnitude, of which bf16 task vectors have many, are kept or ranked as a sort leaves
# them in mergekit; the L1 norms follow. Elements whose importance is at the threshold within mergekit's rounding.
BY_ORDER = ("breadcrumbs", "della", "ties", "sce_selected", "arcee_fusion")


@dataclass(frozen=True)
class Results:
    folder: Path

    def of(self, program: str, mode: str, case: str) -> dict[str, torch.Tensor]:
        return read_model(self.folder / program / mode / case)

    def input(self, mode: str, model: str) -> dict[str, torch.Tensor]:
        return {name: x.float() for name, x in read_model(self.folder / mode / model).items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Results:
    folder = tmp_path_factory.mktemp("mergekit_methods")
    base = random_tensors(0, layers=1)
    models = {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}
    models |= {"far": sibling(base, 3, 0.02), "farther": sibling(base, 4, 0.03)}
    jobs: list[list[Any]] = []
    for mode, (stored, keys) in MODES.items():
        (folder / mode).mkdir()
        for name, tensors in models.items():
            write_model(folder / mode / name, tensors, dtype=stored, num_hidden_layers=1)
        order = [[tensor, str(folder / mode / model)] for tensor in sorted(base) for model in ("a", "b")]
        for case, config in CASES.items():
            yaml_file = write_yaml(folder / mode / f"{case}.yml", _absolute(config | keys, folder / mode))
            jobs.append([str(yaml_file), str(folder / "theirs" / mode / case), order])
            merge(yaml_file, folder / "ours" / mode / case)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    oracle = Path(__file__).with_name("mergekit_oracle.py")
    command = [sys.executable, oracle, folder / "jobs.json", folder / "described.json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return Results(folder)


def test_defaults_are_mergekits(results: Results) -> None:
    described = json.loads((results.folder / "described.json").read_text())
    assert described.keys() <= METHODS.keys()
    says = {True: "l1", False: "none"}  # rescale
    for name, parameters in described.items():
        own = METHODS[name].shared | METHODS[name].per_model
        for parameter, default in parameters.items():
            if name == "task_arithmetic" and parameter in ("density", "rescale"):
                continue  # which it does not read
            default = says[default] if parameter == "rescale" else default
            if (name, parameter) == ("passthrough", "scale"):
                default = 1.0  # its null
            assert own[parameter] == default, (name, parameter)


@pytest.mark.parametrize("case", CASES)
def test_float32_models(results: Results, case: str) -> None:
    ours, theirs = results.of("ours", "fp32", case), results.of("theirs", "fp32", case)
    assert ours.keys() == theirs.keys()
    differing = total = 0
    for name, found in ours.items():
        assert found.dtype == theirs[name].dtype == torch.float32
        # Where terms of up to 0.15 cancel, one of their float32 steps is left: 1.5e-8.
        tolerance = {"rtol": 3e-6, "atol": 3e-7} if case.startswith(BY_ANGLES) else {"rtol": 5e-7, "atol": 2e-8}
        differing += int((~torch.isclose(found, theirs[name], **tolerance)).sum())
        total += found.numel()
    assert differing <= (1e-4 * total if case == "arcee_fusion" else 0), (differing, total)


@pytest.mark.parametrize("case", CASES)
def test_bf16_models_rounded_once(results: Results, case: str) -> None:
    ours, theirs = results.of("ours", "bf16", case), results.of("theirs", "bf16", case)
    apart = further = total = 0
    for name, found in ours.items():
        their = theirs[name].bfloat16()  # arcee_fusion writes float32 whatever out_dtype says
        steps = bf16_steps(found, their)
        cancelled = (found.float() - their.float()).abs() < 1e-7
        apart += int((steps > 0).sum())
        further += int(((steps > 1) & ~cancelled).sum())
        total += found.numel()
    if case.startswith(BY_ORDER):
        assert further <= (1e-4 if case in ("sce_selected", "arcee_fusion") else 0.02) * total, (further, total)
    else:
        assert further == 0
        assert apart <= (5e-3 if case.startswith(BY_ANGLES) else 1e-3) * total, (apart, total)


@pytest.mark.parametrize("case", ["breadcrumbs", "breadcrumbs_default"])
def test_breadcrumbs_differ_only_where_magnitudes_are_equal(results: Results, case: str) -> None:
    """An element that only one program keeps is as large as the smallest that is kept or the smallest outlier."""
    base = results.input("bf16", "base")
    deltas = [{name: x - base[name] for name, x in results.input("bf16", model).items()} for model in ("a", "b")]
    ours, theirs = results.of("ours", "bf16", case), results.of("theirs", "bf16", case)
    density, gamma = (0.5, 0.1) if case == "breadcrumbs" else (0.9, 0.01)
    for name, found in ours.items():
        explained = torch.zeros(found.shape, dtype=torch.bool)
        for delta in deltas:
            magnitudes, n = delta[name].abs(), found.numel()
            first = max(0, n - int(density * n) - int(gamma * n))
            ordered = magnitudes.flatten().sort().values
            for place in (first, first + int(density * n) - 1, min(first + int(density * n), n - 1)):
                explained |= magnitudes == ordered[place]
        assert explained[bf16_steps(found, theirs[name]) > 1].all(), name


def test_arcee_fusion_differs_only_where_the_importance_is_at_the_threshold(results: Results) -> None:
    base, far = results.input("fp32", "base"), results.input("fp32", "far")
    theirs = results.of("theirs", "fp32", "arcee_fusion")
    for name, b in base.items():
        columns = b.shape[-1]
        scores = importance(b.flatten(), far[name].flatten(), (far[name] - b).flatten(), columns).view(b.shape)
        ours = arcee_fusion(b, far[name])
        threshold = scores[ours != b].min() if (ours != b).any() else scores.max()
        differing = (ours - theirs[name]).abs() > 1e-6
        assert ((scores[differing] / threshold - 1).abs() < 0.05).all(), name
