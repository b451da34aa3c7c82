"""The exact mode on bf16 Mistral, Qwen2 and Mixtral models under `dtype: bfloat16`, against mergekit 0.1.5.

mergekit's results are those of `compat`, which has its bits (test_compat.py). Two of them are compared with: what
mergekit computes in float32, and what it computes under `dtype: bfloat16`. Rounded once, the first is within one bf16
step of the exact mode's result, which does not depend on `dtype`; where it is not, elements of equal magnitude were to
be chosen from. The second is further away from the first than the exact mode is: the difference is mergekit's rounding.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from steep.merge import merge
from steep.merge.compat import MERGEKIT
from tests.merge.models import read_model, write_model
from tests.merge.test_compat import BF16, CASES, DRAWN, KINDS, OF_KIND, SIZES, VOCAB, random_models
from tests.merge.test_mergekit import _absolute, bf16_steps

pytestmark = pytest.mark.usefixtures("one_thread")

OTHERS = [kind for kind in KINDS if kind != "llama"]
COMPARED = [(kind, case) for kind in OTHERS for case in OF_KIND[kind] if case not in DRAWN]  # masks are not mergekit's


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("exact_parity")
    for kind in OTHERS:
        for model, tensors in random_models(kind, VOCAB).items():
            write_model(folder / kind / model, tensors, dtype=BF16, **SIZES | KINDS[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        for kind, case in COMPARED:
            written = _absolute(CASES[case], folder / kind)
            merge(written | {"dtype": "bfloat16"}, folder / kind / case / "exact")
            merge(written | {"dtype": "float32", "compat": MERGEKIT}, folder / kind / case / "float32")
            merge(written | {"dtype": "bfloat16", "compat": MERGEKIT}, folder / kind / case / "bfloat16")
    return folder


def to_choose_from(folder: Path, kind: str, case: str, name: str) -> torch.Tensor:
    """Elements of which mergekit keeps any, because others are as large: as the smallest that a task vector keeps, as
    its smallest outlier. sce selects by the difference of the two models: then all, for its weights depend on it."""
    x = {model: read_model(folder / kind / model)[name].float() for model in ("base", "a", "b", "far", "farther")}
    found = torch.zeros(x["base"].shape, dtype=torch.bool)
    parameters, count = CASES[case]["parameters"], found.numel()
    if case == "sce_selected":
        ordered = (x["far"] - x["farther"]).abs().flatten().sort(descending=True).values
        kept = int(torch.count_nonzero(ordered) * parameters["select_topk"])
        return found | bool(kept and ordered[kept - 1] == ordered[kept])
    if not case.startswith(("ties", "breadcrumbs")):
        return found
    written = parameters["density"]
    for model in "a", "b", "far":
        sizes = (x[model] - x["base"]).abs()
        ordered = sizes.flatten().sort().values
        for density in written if isinstance(written, list) else [written]:
            kept = max(1, int(density * count))
            outliers = int(parameters.get("gamma", 0.01) * count) if case.startswith("breadcrumbs") else 0
            first = max(0, count - kept - outliers)
            for place in (first, first + kept - 1, first + kept):
                found |= (sizes == ordered[min(place, count - 1)]) & (sizes > 0)
    return found


@pytest.mark.parametrize(("kind", "case"), COMPARED)
def test_within_one_rounding_of_mergekit_in_float32(folder: Path, kind: str, case: str) -> None:
    ours, theirs = (read_model(folder / kind / case / mode) for mode in ("exact", "float32"))
    assert ours.keys() == theirs.keys()
    apart = compared = total = 0
    for name, found in ours.items():
        assert found.dtype == BF16
        steps = bf16_steps(found, theirs[name].bfloat16())
        cancelled = (found.float() - theirs[name]).abs() < 1e-7  # what is left where terms cancel
        counted = ~to_choose_from(folder, kind, case, name) if case != "stacked" else torch.ones_like(cancelled)
        assert not (counted & ~cancelled & (steps > 1)).any(), name
        apart += int((counted & (steps > 0)).sum())
        compared += int(counted.sum())
        total += found.numel()
    assert apart <= 5e-3 * total
    assert compared >= 0.85 * total


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, case in COMPARED if case != "stacked"])
def test_nearer_to_mergekit_in_float32_than_mergekit_in_bf16(folder: Path, kind: str, case: str) -> None:
    """Equally near for linear and slerp, which mergekit computes in float32 always, and for passthrough."""
    ours, theirs, wide = (read_model(folder / kind / case / mode) for mode in ("exact", "bfloat16", "float32"))
    squared = torch.zeros(2, dtype=torch.float64)
    for name, found in wide.items():
        counted = ~to_choose_from(folder, kind, case, name)
        squared += torch.stack([(x[name].double() - found)[counted].square().sum() for x in (ours, theirs)])
    assert squared[0] <= squared[1] * 1.0001
