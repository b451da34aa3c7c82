"""What a finished merge tells of itself: figures from dot products, licences of the inputs, `merge.json`.

`merge.json` holds everything about the merge; `manifest.json`, the same in every artefact of steep, what `steep verify`
compares. Reads small files of the input folders; writes into the output folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.files import MANIFEST, atomic_write, make_manifest, read_json, sha256_file
from ..engine.metrics import peak_memory_bytes
from ..engine.model_files import write_model_manifest
from ..engine.safetensors_io import dtype_name
from .compat import MergekitMerge
from .config import MergeConfig
from .geometry import PARALLEL_COSINE
from .method_table import METHODS
from .plan import MergePlan, TensorPlan
from .result_files import LICENCES
from .tensor_merge import Sums

MERGE_JSON = "merge.json"
KIND = "merged model"


def write_records(
    folder: Path,
    plan: MergePlan,
    tensors: Mapping[str, Mapping[str, Any]],
    sums: Mapping[str, Sums],
    weight_files: Sequence[str],
    *,
    inputs: Mapping[str, Any],
    config: Mapping[str, Any],
    seconds: float,
    **extra: Any,
) -> dict[str, Any]:
    """Write `merge.json`, then `manifest.json`, into a folder that is complete otherwise; what `merge.json` holds.

    Args:
        tensors: {name: record} of the output in its order, each with `sha256`. sums: their dot products.
        inputs: {file: {"sha256", "bytes"}}. config: as written. seconds: of the whole merge.
    """
    straight = straight_lines(plan, tensors)
    not_finite = [
        f"{name}: NaN or infinite values of model {', '.join(map(str, record['not_finite']))} passed through"
        for name, record in tensors.items()
        if "not_finite" in record
    ]
    figures = {"seconds": round(seconds, 3), "peak_memory_bytes": peak_memory_bytes(torch.device("cpu"))}
    figures["values"] = sum(tensor.numel for tensor in plan.tensors)
    record = make_manifest(
        KIND,
        inputs=inputs,
        config=config,
        figures=figures | {"layers": layer_figures(plan, tensors, sums)},
        resolved=plan.config.model_dump(mode="json"),
        models=list(plan.model_labels),
        donors={
            "config": str(plan.config_donor),
            "tokenizer": str(plan.tokenizer_donor),
            "chat_template": plan.template_donor,
        },
        licences=[licence(model.path) for model in plan.models],
        notes=list(plan.notes),
        warnings=[*plan.warnings, *straight, *not_finite],
        **extra,
        tensors=dict(tensors),
    )
    atomic_write(folder / MERGE_JSON, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    hashes = {name: entry["sha256"] for name, entry in tensors.items()}
    write_model_manifest(
        folder, KIND, inputs=inputs, sized=weight_files, config=config, figures=figures, tensors=hashes
    )
    return record


def vectors_seen(config: MergeConfig) -> str:
    """`TensorMerge.vectors` of what carries a merge out."""
    return MergekitMerge.vectors if config.compat else METHODS[config.merge_method].carry_out.vectors


def tensor_record(
    tensor: TensorPlan, sha256: str, models: Sequence[int], sums: Sums, config: MergeConfig
) -> dict[str, Any]:
    """The entry of a tensor in `merge.json`. models: numbers of its inputs, a base first."""
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": sha256,
        "models": list(models),
        "parameters": tensor.parameters,
        **vector_figures(vectors_seen(config), sums, models, tensor.base is not None),
    }


def vector_figures(seen: str, sums: Sums, models: Sequence[int], based: bool) -> dict[str, Any]:
    """Norms and cosines from the dot products of one tensor, or from their sums over several; `models` are the numbers
    of the models that the vectors stand for, `based` says whether the first is a base, `seen` what is in `sums`."""

    def norm(i: int) -> float:
        return math.sqrt(sums[i, i])

    def ratio(above: float, below: float) -> float | None:
        return finite(above / below) if below else None

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    if not sums:
        return {}
    if seen == "models" or not based:
        return {"norms": [finite(norm(i)) for i, j in sums if i == j]}
    first = 1 if seen == "deltas" else len(models)
    deltas = range(first, first + len(models) - 1)
    figures: dict[str, Any] = {
        "base_norm": finite(norm(0)),
        "relative_deltas": [ratio(norm(i), norm(0)) for i in deltas],
        "delta_cosines": [
            {"models": [models[i - first + 1], models[j - first + 1]], "cosine": ratio(sums[i, j], norm(i) * norm(j))}
            for i, j in combinations(deltas, 2)
        ],
    }
    if seen == "both":
        figures["cosines"] = [ratio(sums[0, i], norm(0) * norm(i)) for i in range(1, len(models))]
    return figures


def layer_figures(
    plan: MergePlan, tensors: Mapping[str, Mapping[str, Any]], sums: Mapping[str, Sums]
) -> list[dict[str, Any]]:
    """The figures of all tensors of a layer taken as one vector; `layer` None is what lies outside the layers.

    Tensors that came from different models (slices with different sources) are kept apart.
    """
    groups: dict[tuple[int | None, tuple[int, ...]], Sums] = {}
    for tensor in plan.tensors:
        if tensor.operation == "equal":
            continue
        found = sums[tensor.name]
        group = groups.setdefault((tensor.layer, tuple(tensors[tensor.name]["models"])), dict.fromkeys(found, 0.0))
        for pair, value in found.items():
            group[pair] += value
    method = plan.config.merge_method
    based = METHODS[method].has_base(plan.config.base_model is not None)
    seen = vectors_seen(plan.config)
    ordered = sorted(groups.items(), key=lambda item: -1 if item[0][0] is None else item[0][0])
    return [
        {"layer": layer, "models": list(models), **vector_figures(seen, group, models, based)}
        for (layer, models), group in ordered
    ]


def straight_lines(plan: MergePlan, tensors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning if slerp did not take a curve."""
    if plan.config.merge_method != "slerp":
        return []
    cosines = [cosine for record in tensors.values() for cosine in record.get("cosines", ()) if cosine is not None]
    parallel = sum(abs(cosine) > PARALLEL_COSINE for cosine in cosines)
    if not parallel:
        return []
    return [f"slerp: {parallel} of {len(cosines)} tensors have |cosine| over {PARALLEL_COSINE}: interpolated on a line"]


def licence(model: Path) -> dict[str, Any]:
    """What a model folder says of its licence: its model card's and config's words, and its licence files' hashes."""
    found: dict[str, Any] = {"model": str(model)}
    card = _model_card(model / "README.md")
    config = read_json(model / "config.json")
    for key in ("license", "license_name", "license_link"):
        if (value := card.get(key, config.get(key))) is not None:
            found[key] = value
    files = sorted(path for path in model.iterdir() if path.is_file() and path.name.startswith(LICENCES))
    found["files"] = {path.name: sha256_file(path) for path in files}
    if (model / MANIFEST).is_file() and (model / MERGE_JSON).is_file():  # a merge itself: what its inputs said
        found["of_inputs"] = read_json(model / MERGE_JSON).get("licences", [])
    return found


def _model_card(path: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; nothing if there is none that can be read."""
    if not path.is_file():
        return {}
    head = path.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(head) < 3 or head[0].strip():
        return {}
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}
