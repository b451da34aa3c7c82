"""The float64 formulas against the merges: every method agrees, and a change that is no rounding does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steep.kernels.philox import philox_bits
from steep.merge import merge
from steep.merge.method_table import METHODS
from steep.merge.recompute import FORMULAS
from steep.merge.recompute_thinned import philox
from steep.merge.verify import verify_merge
from tests.merge.models import random_tensors, read_model, sibling, write_model

BASED = {"base_model": "base"}
CASES: dict[str, dict[str, Any]] = {
    "linear": {"models": {"a": {"weight": 0.7}, "b": {"weight": 0.4}}},
    "slerp": BASED | {"models": {"far": {}}, "parameters": {"t": [0.1, 0.9]}},
    "nuslerp": {"models": {"a": {"weight": 0.7}, "far": {"weight": 0.4}}},
    "multislerp": BASED | {"models": {"a": {"weight": 0.7}, "b": {"weight": 0.4}}},
    "karcher": {"models": {"a": {}, "b": {}, "far": {}}},
    "model_stock": BASED | {"models": {"a": {}, "b": {}, "far": {}}},
    "task_arithmetic": BASED
    | {"models": {"a": {"weight": 0.7}, "b": {"weight": -0.4}}, "parameters": {"lambda": 1.3, "normalize": True}},
    "ties": BASED | {"models": {"a": {"weight": 0.7, "density": 0.3}, "b": {"weight": 0.4, "density": 0.5}}},
    "dare_linear": BASED | {"models": {"a": {"weight": 0.7, "density": 0.3}, "b": {"weight": 0.4, "density": 1}}},
    "dare_ties": BASED | {"models": {"a": {"weight": 0.5, "density": 0.3}, "b": {"weight": 0.5, "density": 0.6}}},
    "breadcrumbs": BASED | {"models": {"a": {"weight": 0.7, "density": 0.8, "gamma": 0.05}, "b": {"weight": 0.4}}},
    "breadcrumbs_ties": BASED | {"models": {"a": {"weight": 0.7, "density": 0.8}, "b": {"weight": 0.4}}},
    "della": BASED | {"models": {"a": {"weight": 0.7, "density": 0.5}, "b": {"weight": 0.4, "density": 0.5}}},
    "della_linear": BASED
    | {"models": {"a": {"weight": 0.7, "density": 0.5, "epsilon": 0.1}}, "parameters": {"rescale": "elementwise"}},
    "sce": BASED | {"models": {"a": {}, "b": {}, "far": {}}, "parameters": {"select_topk": 0.3}},
    "ram": BASED | {"models": {"a": {}, "b": {}}, "parameters": {"epsilon": 1e-3}},
    "ramplus_tl": BASED | {"models": {"a": {}, "b": {}}, "parameters": {"epsilon": 1e-3}},
    "nearswap": BASED | {"models": {"a": {}}, "parameters": {"t": 1e-3}},
    "arcee_fusion": BASED | {"models": {"far": {}}},
    "passthrough": {"models": {"a": {"scale": 0.9}}},
    "chat_vector": BASED | {"models": {"a": {}, "b": {}}, "parameters": {"scale": 0.8}},
    "consensus_ta": BASED | {"models": {"a": {}, "b": {}, "far": {}}},
    "tsv_m": BASED | {"models": {"a": {}, "b": {}}},
    "iso_c": BASED | {"models": {"a": {}, "b": {}}},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nuslerp of rows": ("nuslerp", {"parameters": {"nuslerp_flatten": False}}),
    "nuslerp of columns": ("nuslerp", {"parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}),
    "nuslerp of task vectors": ("nuslerp", BASED),
    "multislerp of models": ("multislerp", {"base_model": None}),
    "model_stock of rows": ("model_stock", {"parameters": {"filter_wise": True}}),
    "ties of rows, rescaled": ("ties", {"parameters": {"topk_scope": "row", "rescale": True}}),
    "ties, unweighted": ("ties", {"parameters": {"ties_sign": "unweighted", "normalize": False, "lambda": 0.6}}),
    "dare as in the paper": ("dare_ties", {"parameters": {"rescale": "inv_density", "normalize": True}}),
    "sce of everything": ("sce", {"parameters": {"select_topk": 1.0}}),
    "lambda zero": ("ties", {"parameters": {"lambda": 0}}),
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recompute")
    base = random_tensors(0, layers=1, vocab=96)
    models = {"base": base, "a": sibling(base, 1), "b": sibling(base, 2), "far": sibling(base, 3, 0.02)}
    for name, tensors in models.items():
        write_model(folder / name, tensors, dtype=request.param, num_hidden_layers=1, vocab_size=96)
    return folder


def config(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    written = CASES[method] | {"merge_method": method, "random_seed": 5} | changes
    written["models"] = [{"model": str(folder / n), "parameters": p} for n, p in written["models"].items()]
    if written.get("base_model"):
        written["base_model"] = str(folder / written["base_model"])
    return written


def test_there_is_a_formula_for_every_method() -> None:
    assert CASES.keys() == METHODS.keys() == FORMULAS.keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", [*CASES, *VARIANTS])
def test_a_merge_agrees_with_its_formula(folder: Path, tmp_path: Path, case: str) -> None:
    method, changes = VARIANTS.get(case, (case, {}))
    merge(config(folder, method, **changes), tmp_path / "out", workers=1)
    report = verify_merge(tmp_path / "out", chunks=3)
    assert report["recomputed"]["method"] == method
    assert report["recomputed"]["tensors"] >= 4
    assert report["recomputed"]["values"] > 10_000
    assert report["recomputed"]["either_sign"] < 0.02 * report["recomputed"]["values"]

    steps = 1 if read_model(tmp_path / "out")["model.norm.weight"].dtype == torch.bfloat16 else 64
    if method == "karcher" and steps > 1:
        steps = 4096  # it ends when a step is shorter than tol, 1e-5
    shifted = {name: shift(x, steps) for name, x in read_model(tmp_path / "out").items()}
    save_file(shifted, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="recomputed values differ") as error:
        verify_merge(tmp_path / "out", chunks=3)
    assert str(error.value).count("recomputed values differ") == report["recomputed"]["tensors"]


def shift(x: torch.Tensor, steps: int) -> torch.Tensor:
    """So many ulps away from 0."""
    return (x.view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32) + steps).view(x.dtype)


@pytest.mark.parametrize(("key", "stream", "lo", "hi"), [(0, 0, 0, 9), (2**64 - 1, 2**63 + 7, 13, 500), (3, 5, 4, 8)])
def test_philox_spelt_out_is_philox(key: int, stream: int, lo: int, hi: int) -> None:
    signed = [x - 2**64 if x >= 2**63 else x for x in (key, stream)]
    expected = philox_bits(*signed, lo, hi - lo).numpy()
    assert np.array_equal(philox(key, stream, lo, hi).astype(np.int64), expected)
