"""What the inputs of a merge have to do with each other: the figures of `steep merge report`, in one pass.

Reads the models of a plan, and the result if there is one, in small pieces; writes nothing.

B is the base, M_i the models, delta_i = M_i - B the task vectors. A method without a base has none either: then the
first source of a tensor stands for B here, which is said in the report. A layer, a role or a model is one long vector
made of its tensors; all figures are added up from those of tensors, exactly (measure.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.safetensors_io import SafetensorsFolder
from .geometry import PARALLEL_COSINE
from .measure import PIECE, Magnitudes, Place, Products, add_up, layer_label, pieces, place_of, ratio, side_by_side
from .plan import MergePlan, TensorPlan
from .sparsify import kept

NORM_BOUND = 0.5
COSINE_BOUND = 1 - NORM_BOUND**2 / 2  # where |delta| / |B| is NORM_BOUND and M is as long as B
BOUND_ORIGIN = (
    f"Bounds: |delta| / |B| at most {NORM_BOUND} and cosine between B and M at least {COSINE_BOUND}, which is the same "
    "where both are of one length. Unrelated weights of one length lie near a ratio of 1.41 with a cosine near 0, as "
    "random directions in many dimensions are at right angles; a change of an rms of 2e-4 to 1e-3 on weights of an rms "
    "of 0.02, as fine-tuning leaves, is a ratio of 0.01 to 0.05. The bound is a line drawn by hand between the two."
)
RESULT = -1  # stands for the result among the numbers of models

Key = tuple[str, int, int]


@dataclass
class Tally:
    """Counts and sums of squares of one tensor or of many; `values` add up, angles (degrees) are listed.

    Keys are (what, model, other model or 0): "base" (the square of B where the model takes part), "delta", "inner"
    (<B, delta>), "dot" and "squares" (of the first, where both take part), counts "zeros", "changed" and "vanished",
    "lost" and "scaled" (squares of what rounding takes from the scaled delta and of that), "kept", "kept_squares" and
    "trimmed_squares"; and of all models "conflicts" and "shared".
    """

    count: int
    values: dict[Key, float]
    angles: list[float] = field(default_factory=list)

    @classmethod
    def total(cls, parts: Sequence[Tally]) -> Tally:
        angles = [angle for part in parts for angle in part.angles]
        return cls(sum(part.count for part in parts), add_up(part.values for part in parts), angles)

    def figures(self) -> dict[str, Any]:
        """For JSON; what a method or a tensor does not have is left out."""
        models = sorted({model for what, model, _ in self.values if what == "delta"} - {RESULT})
        found: dict[str, Any] = {"values": self.count, "models": {str(m): self._of_model(m) for m in models}}
        pairs = [(a, b) for a, b in combinations(models, 2) if ("dot", a, b) in self.values]
        if pairs:
            found["cosines"] = {f"{a}-{b}": self._cosine(a, b) for a, b in pairs}
            found["sign_conflict"] = ratio(self.values["conflicts", 0, 0], self.values["shared", 0, 0])
        if self.angles:
            straight = sum(is_straight(angle) for angle in self.angles)
            found["slerp"] = {"angle": max(self.angles), "straight": straight, "tensors": len(self.angles)}
        if ("delta", RESULT, 0) in self.values:
            found["result"] = {
                "relative_norm": self._relative(RESULT),
                "unchanged": ratio(self.values["zeros", RESULT, 0], self.values["count", RESULT, 0]),
                "cosines": {str(m): self._cosine(m, RESULT) for m in models if ("dot", m, RESULT) in self.values},
            }
        return found

    def _of_model(self, model: int) -> dict[str, Any]:
        def value(what: str) -> float:
            return self.values[what, model, 0]

        length = math.sqrt(max(value("base") + 2 * value("inner") + value("delta"), 0.0))
        figures: dict[str, Any] = {
            "relative_norm": self._relative(model),
            "base_cosine": ratio(value("base") + value("inner"), math.sqrt(value("base")) * length),
            "zeros": ratio(value("zeros"), value("count")),
            "lost": ratio(math.sqrt(value("lost")), math.sqrt(value("scaled"))),
            "vanished": ratio(value("vanished"), value("changed")),
        }
        if ("kept", model, 0) in self.values:
            figures["kept"] = ratio(value("kept"), value("trimmed"))
            figures["kept_norm"] = ratio(math.sqrt(value("kept_squares")), math.sqrt(value("trimmed_squares")))
        return figures

    def _relative(self, model: int) -> float | None:
        return ratio(math.sqrt(self.values["delta", model, 0]), math.sqrt(self.values["base", model, 0]))

    def _cosine(self, a: int, b: int) -> float | None:
        norms = math.sqrt(self.values["squares", a, b]) * math.sqrt(self.values["squares", b, a])
        return ratio(self.values["dot", a, b], norms)


def is_straight(angle: float) -> bool:
    """Whether slerp takes the straight line at an angle in degrees."""
    return abs(math.cos(math.radians(angle))) > PARALLEL_COSINE


def analyse(
    plan: MergePlan,
    result: str | Path | None = None,
    *,
    piece: int = PIECE,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """All figures of a merge.

    Args:
        result: folder of the finished merge, if its figures are wanted too.
        piece: elements read at once; no figure depends on it.
        progress: called with (values done, values in all).

    Returns:
        {"method", "based", "models": {number: label}, "bounds", "alarms", "all", "layers", "roles", "cells",
        "tensors"}: `all` is one set of `Tally.figures`, the rest lists of them with the keys layer, role (`cells`:
        both) and name. Task vectors have their model's number in the plan.

    Raises:
        ValueError: NaN or infinite inputs, naming file and tensor; a result that does not fit the plan.
    """
    tensors = [tensor for tensor in plan.tensors if tensor.operation != "equal"]
    folder = SafetensorsFolder(result) if result is not None else None
    counted = 0

    def count(tensor: TensorPlan) -> None:
        nonlocal counted
        counted += tensor.numel
        if progress:
            progress(counted, sum(each.numel for each in tensors))

    try:
        if folder is not None:
            for tensor in tensors:
                if tensor.name not in folder or folder.shape(tensor.name) != tensor.shape:
                    raise ValueError(f"{folder.path}: no tensor {tensor.name} of shape {list(tensor.shape)}")
        found = side_by_side(lambda tensor: _tally(plan, tensor, folder, piece), tensors, count)
    finally:
        if folder is not None:
            folder.close()

    places = [place_of(tensor.name) for tensor in tensors]
    stacks = len({place.stack for place in places if place.layer >= 0})
    layers = [layer_label(place, stacks) for place in places]
    alarms = _alarms(plan, tensors, found)
    return {
        "method": plan.config.merge_method,
        "based": any(tensor.base is not None for tensor in tensors),
        "models": {str(number): label for number, label in enumerate(plan.model_labels)},
        "bounds": {"relative_norm": NORM_BOUND, "base_cosine": COSINE_BOUND, "origin": BOUND_ORIGIN},
        "alarms": alarms,
        "all": Tally.total(found).figures(),
        "layers": _grouped(found, [{"layer": layer} for layer in layers], places),
        "roles": _grouped(found, [{"role": place.role} for place in places], [Place("", 0, "")] * len(places)),
        "cells": _grouped(found, [{"layer": a, "role": b.role} for a, b in zip(layers, places)], places),
        "tensors": [{"name": tensor.name} | tally.figures() for tensor, tally in zip(tensors, found)],
    }


def _grouped(
    tallies: Sequence[Tally], labels: Sequence[dict[str, str]], places: Sequence[Place]
) -> list[dict[str, Any]]:
    """The figures of every label's tensors as one vector, in the order of their layers."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for position, label in enumerate(labels):
        groups.setdefault(tuple(label.values()), []).append(position)
    ordered = sorted(groups.values(), key=lambda members: (places[members[0]].stack, places[members[0]].layer))
    return [labels[members[0]] | Tally.total([tallies[i] for i in members]).figures() for members in ordered]


def _tally(plan: MergePlan, tensor: TensorPlan, result: SafetensorsFolder | None, piece: int) -> Tally:
    """One tensor, in one pass."""
    first = tensor.base if tensor.base is not None else 0
    order = [first, *(position for position in range(len(tensor.sources)) if position != first)]
    numbers = [tensor.sources[position].model for position in order[1:]] + ([RESULT] if result else [])
    weights = strengths(tensor)
    trims = _trims(tensor)
    products = Products(combinations_with_replacement(range(len(numbers) + 1), 2))
    magnitudes = [Magnitudes() for _ in trims]
    counts: dict[Key, float] = {(what, 0, 0): 0 for what in ("conflicts", "shared")}
    for model in numbers:
        counts |= {(what, model, 0): 0 for what in ("zeros", "changed", "vanished")}
    losses: dict[int, tuple[Products, Products]] = {
        m: (Products([(0, 0)]), Products([(0, 0)])) for m in numbers if m != RESULT
    }
    buffers = [(plan.models[tensor.sources[p].model], tensor.sources[p].name) for p in order]
    readers = [*buffers, *([(result, tensor.name)] if result else [])]
    for lo, hi in pieces(tensor.numel, piece):
        base, *others = (
            reader.read_into(name, lo, torch.empty(hi - lo, dtype=reader.dtype(name))).to(torch.float32)
            for reader, name in readers
        )
        deltas = [other - base for other in others]
        products.add([base, *deltas])
        base_rounded = base.to(tensor.dtype).to(torch.float32)
        for model, other in zip(numbers, others):
            counts["zeros", model, 0] += int((other == (base_rounded if model == RESULT else base)).sum())
        for number, weight in enumerate(weights):
            model, delta = numbers[number], deltas[number]
            scaled = delta.double() * weight
            exact = base.double() + scaled
            rounded = exact.to(torch.float32).to(tensor.dtype).to(torch.float32)  # as the executor rounds
            losses[model][0].add([(rounded - exact).to(torch.float32)])
            losses[model][1].add([scaled.to(torch.float32)])
            counts["changed", model, 0] += int((scaled != 0).sum())
            counts["vanished", model, 0] += int(((scaled != 0) & (rounded == base_rounded)).sum())
        _count_conflicts(counts, deltas[: len(weights)])
        for histogram, delta in zip(magnitudes, deltas):
            histogram.add(delta)
    values = counts | _products_of(products, numbers, tensor.numel)
    for model, (loss, change) in losses.items():
        values |= {("lost", model, 0): loss.total(0, 0), ("scaled", model, 0): change.total(0, 0)}
    for model, histogram, (outer, inner) in zip(numbers, magnitudes, trims):
        values |= _kept(model, histogram, outer, inner, tensor.numel)
    if not all(map(math.isfinite, values.values())):
        _refuse_not_finite(readers, tensor)
    return Tally(tensor.numel, values, _angle(tensor, values, numbers))


def _count_conflicts(counts: dict[Key, float], deltas: Sequence[Tensor]) -> None:
    """Elements that two models or more change, and those of them that they change in both directions."""
    if len(deltas) < 2:
        return
    up = torch.stack([delta > 0 for delta in deltas]).sum(0)
    down = torch.stack([delta < 0 for delta in deltas]).sum(0)
    counts["shared", 0, 0] += int((up + down >= 2).sum())
    counts["conflicts", 0, 0] += int(((up > 0) & (down > 0)).sum())


def _products_of(products: Products, numbers: Sequence[int], numel: int) -> dict[Key, float]:
    values: dict[Key, float] = {}
    for i, model in enumerate(numbers, 1):
        values |= {
            ("count", model, 0): numel,
            ("base", model, 0): products.total(0, 0),
            ("delta", model, 0): products.total(i, i),
            ("inner", model, 0): products.total(0, i),
        }
    for (i, a), (j, b) in combinations(list(enumerate(numbers, 1)), 2):
        values |= {
            ("dot", a, b): products.total(i, j),
            ("squares", a, b): products.total(i, i),
            ("squares", b, a): products.total(j, j),
        }
    return values


def _kept(model: int, histogram: Magnitudes, outer: int, inner: int, numel: int) -> dict[Key, float]:
    many, few, everything = histogram.largest(outer), histogram.largest(inner), histogram.largest(numel)
    return {
        ("kept", model, 0): many[0] - few[0],
        ("trimmed", model, 0): numel,
        ("kept_squares", model, 0): max(many[1] - few[1], 0.0),
        ("trimmed_squares", model, 0): everything[1],
    }


def strengths(tensor: TensorPlan) -> list[float]:
    """By what the method multiplies each task vector, as far as the parameters alone tell: t, or weight and lambda over
    the sum of the weights where they are normalised; 1 or an equal share where there are none.

    Election of signs, random masks and angles change it from element to element or tensor to tensor.
    """
    others = len(tensor.sources) - 1
    parameters, operation = tensor.parameters, tensor.operation
    if operation == "slerp":
        return [parameters["t"]]
    if operation == "chat_vector":
        return [1.0, parameters["scale"]]
    scale = float(parameters.get("lambda", 1.0))
    weights = parameters.get("weight")
    if weights is None:
        share = 1 / len(tensor.sources) if operation == "karcher" else 1.0
        share = 1 / others if operation in ("model_stock", "sce") else share
        return [share * scale] * others
    total = math.fsum(weights)
    normalised = parameters.get("normalize") or parameters.get("normalize_weights") or operation == "nuslerp"
    divisor = total if normalised and abs(total) > 1e-8 else 1.0
    shares = [scale * weight / divisor for weight in weights]
    return shares if tensor.base is not None else shares[1:]


def _trims(tensor: TensorPlan) -> list[tuple[int, int]]:
    """For each task vector that is trimmed by magnitude over the whole tensor: how many of the largest are kept, and of
    those the still larger ones that are dropped."""
    parameters = tensor.parameters
    densities = parameters.get("density", ())
    if tensor.operation == "ties" and parameters.get("topk_scope") != "row":
        return [(kept(tensor.numel, density), 0) for density in densities]
    if tensor.operation not in ("breadcrumbs", "breadcrumbs_ties"):
        return []
    found = []
    for density, gamma in zip(densities, parameters["gamma"], strict=True):
        k = int(density * tensor.numel)
        inner = 0 if density >= 1 else min(int(gamma * tensor.numel), tensor.numel - k)
        found.append((inner + k, inner))
    return found


def _angle(tensor: TensorPlan, values: Mapping[Key, float], numbers: Sequence[int]) -> list[float]:
    """Degrees between the two models of a slerp. From delta, so that small angles are right."""
    if tensor.operation != "slerp" or not values["base", numbers[0], 0]:
        return []
    base, inner, delta = (values[what, numbers[0], 0] for what in ("base", "inner", "delta"))
    across = math.sqrt(max(base * delta - inner * inner, 0.0))
    return [math.degrees(math.atan2(across, base + inner))]


def _refuse_not_finite(readers: Sequence[tuple[Any, str]], tensor: TensorPlan) -> None:
    for reader, name in readers:
        for lo, hi in pieces(tensor.numel):
            if not torch.isfinite(reader.read_into(name, lo, torch.empty(hi - lo, dtype=reader.dtype(name)))).all():
                raise ValueError(f"{reader.file_of(name)}: {name} holds NaN or infinite values")
    raise ValueError(f"{tensor.name}: values too large for sums of squares in float32")


def _alarms(plan: MergePlan, tensors: Sequence[TensorPlan], tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """Models that are no siblings of the base by their matrices; in models that are, the matrices that are not.

    Vectors are left out: the norms of any two models are all near 1.
    """
    matrices = [(tensor, tally) for tensor, tally in zip(tensors, tallies) if len(tensor.shape) > 1]
    alarms = []
    total = Tally.total([tally for _, tally in matrices]).figures()["models"] if matrices else {}
    for number, figures in total.items():
        whole = is_out_of_bounds(figures)
        names = []
        for tensor, tally in matrices:
            own = tally.figures()["models"].get(number)
            if own and is_out_of_bounds(own):
                names.append(tensor.name)
        if whole or names:
            alarms.append({
                "model": number,
                "label": plan.model_labels[int(number)],
                "whole": whole,
                "relative_norm": figures["relative_norm"],
                "base_cosine": figures["base_cosine"],
                "tensors": names,
            })  # fmt: skip
    return alarms


def is_out_of_bounds(figures: Mapping[str, Any]) -> bool:
    """Whether a model's figures say that it did not come from the base. A base of zeros says nothing."""
    norm, cosine = figures["relative_norm"], figures["base_cosine"]
    return (norm is not None and norm > NORM_BOUND) or (cosine is not None and cosine < COSINE_BOUND)
