"""Every method in pieces of any size against its function on whole tensors: the same bits."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steep import merge as m
from steep.merge.method_table import METHODS
from steep.merge.methods import partial_sums
from steep.merge.tensor_merge import Subject, TensorMerge
from tests.merge.models import bits, random_tensors, sibling, write_model

pytestmark = pytest.mark.usefixtures("one_thread")
Tensors = list[torch.Tensor]
Whole = Callable[[torch.Tensor, Tensors, Tensors, dict[str, Any]], torch.Tensor]
NAME, MODELS, SEED = "model.layers.1.mlp.up_proj.weight", ("a", "b", "c"), 17
SHAPES = [(), (1,), (9000,), (9300, 1), (61, 200), (5, 20, 97), (0, 3), (3, 0)]


def noises() -> list[m.Noise]:
    return [m.Noise.of(SEED, NAME, model) for model in MODELS]


def thinned(rule: Callable[..., torch.Tensor], *names: str) -> Callable[[Tensors, dict[str, Any]], Tensors]:
    return lambda deltas, p: [
        rule(delta, *values) for delta, *values in zip(deltas, *(p[name] for name in names), strict=False)
    ]


def dare(deltas: Tensors, p: dict[str, Any]) -> Tensors:
    each = zip(deltas, p["density"], noises(), strict=False)
    return [m.dare(delta, density, noise, p["rescale"]) for delta, density, noise in each]


def della(deltas: Tensors, p: dict[str, Any]) -> Tensors:
    each = zip(deltas, p["density"], p["epsilon"], noises(), strict=False)
    return [m.della(delta, density, epsilon, noise, p["rescale"]) for delta, density, epsilon, noise in each]


def added(thin: Callable[[Tensors, dict[str, Any]], Tensors]) -> Whole:
    return lambda base, models, deltas, p: m.task_arithmetic(
        base, thin(deltas, p), p["weight"], p["normalize"], p["lambda"]
    )


def elected(thin: Callable[[Tensors, dict[str, Any]], Tensors]) -> Whole:
    return lambda base, models, deltas, p: m.ties_consensus(
        base, thin(deltas, p), p["weight"], p["normalize"], p["lambda"], p["ties_sign"]
    )


trim, trim_rows = thinned(m.trim, "density"), thinned(m.trim_rows, "density")
trim_outliers = thinned(m.trim_outliers, "density", "gamma")
WEIGHTS = {"weight": [0.7, 0.4, -0.1]}
THIN = WEIGHTS | {"density": [0.3, 0.6, 1.0]}
OUTLIERS = {"density": [0.3, 0.6, 0.9], "gamma": [0.05, 0.2, 0.3]}
RANKS = THIN | {"density": [0.3, 0.6, 1.0], "epsilon": [0.1, 0.25, 0.1]}

# name: (method, parameters beside the defaults, the function on whole tensors, with or without a base)
CASES: dict[str, tuple[str, dict[str, Any], Whole, bool]] = {
    "linear": ("linear", WEIGHTS, lambda b, x, d, p: m.linear(x, p["weight"]), False),
    "passthrough": ("passthrough", {"scale": [0.3]}, lambda b, x, d, p: m.passthrough(x[0], 0.3), False),
    "slerp": ("slerp", {"t": 0.3}, lambda b, x, d, p: m.slerp(b, x[0], 0.3), True),
    "nearswap": ("nearswap", {"t": 1e-3}, lambda b, x, d, p: m.nearswap(b, x[0], 1e-3), True),
    "chat_vector": ("chat_vector", {"scale": 0.7}, lambda b, x, d, p: m.chat_vector(b, *x, 0.7), True),
    "nuslerp": ("nuslerp", WEIGHTS, lambda b, x, d, p: m.nuslerp(*x, p["weight"]), False),
    "nuslerp_of_task_vectors": ("nuslerp", WEIGHTS, lambda b, x, d, p: m.nuslerp(*x, p["weight"], b), True),
    "nuslerp_rows": (
        "nuslerp",
        WEIGHTS | {"nuslerp_flatten": False},
        lambda b, x, d, p: m.nuslerp(*x, p["weight"], b, False),
        True,
    ),
    "nuslerp_columns": (
        "nuslerp",
        WEIGHTS | {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        lambda b, x, d, p: m.nuslerp(*x, p["weight"], None, False, True),
        False,
    ),
    "multislerp": ("multislerp", WEIGHTS, lambda b, x, d, p: m.multislerp(x, p["weight"]), False),
    "multislerp_of_task_vectors": (
        "multislerp",
        WEIGHTS | {"normalize_weights": False},
        lambda b, x, d, p: m.multislerp(x, p["weight"], b, False),
        True,
    ),
    "karcher": ("karcher", {}, lambda b, x, d, p: m.karcher(x), False),
    "model_stock": ("model_stock", {}, lambda b, x, d, p: m.model_stock(b, d), True),
    "model_stock_rows": ("model_stock", {"filter_wise": True}, lambda b, x, d, p: m.model_stock(b, d, True), True),
    "task_arithmetic": ("task_arithmetic", WEIGHTS | {"lambda": 0.8}, added(lambda d, p: d), True),
    "ties": ("ties", THIN, elected(trim), True),
    "ties_unweighted": ("ties", THIN | {"ties_sign": "unweighted", "lambda": 1.2}, elected(trim), True),
    "ties_rows": ("ties", THIN | {"topk_scope": "row"}, elected(trim_rows), True),
    "breadcrumbs": ("breadcrumbs", WEIGHTS | OUTLIERS, added(trim_outliers), True),
    "breadcrumbs_ties": ("breadcrumbs_ties", WEIGHTS | OUTLIERS, elected(trim_outliers), True),
    "dare_linear": ("dare_linear", THIN, added(dare), True),
    "dare_ties": ("dare_ties", THIN | {"rescale": "inv_density", "normalize": True}, elected(dare), True),
    "della": ("della", RANKS, elected(della), True),
    "della_linear": ("della_linear", RANKS | {"rescale": "elementwise"}, added(della), True),
    "sce": ("sce", {}, lambda b, x, d, p: m.sce(b, d), True),
    "sce_selected": ("sce", {"select_topk": 0.3}, lambda b, x, d, p: m.sce(b, d, 0.3), True),
    "ram": ("ram", {"epsilon": 1e-3}, lambda b, x, d, p: m.ram(b, d, 1e-3), True),
    "ramplus_tl": ("ramplus_tl", {"epsilon": 1e-3}, lambda b, x, d, p: m.ramplus_tl(b, d, 1e-3), True),
    "arcee_fusion": ("arcee_fusion", {}, lambda b, x, d, p: m.arcee_fusion(b, x[0]), True),
    "consensus_ta": (
        "consensus_ta",
        {"weight": [1.0] * 3, "tall_lambda": [0.4, 0.3, 0.6]},
        lambda b, x, d, p: m.consensus_ta(b, d, p["weight"], p["tall_lambda"]),
        True,
    ),
    "tsv_m": ("tsv_m", {"lambda": 0.9}, lambda b, x, d, p: m.tsv_m(b, d, 0.9), True),
    "iso_c": ("iso_c", {"lambda": 0.9}, lambda b, x, d, p: m.iso_c(b, d, 0.9), True),
}


def inputs(shape: tuple[int, ...], models: int, coarse: bool, seed: int = 0) -> tuple[torch.Tensor, Tensors]:
    """A base and siblings of which 30 % of the elements are equal; `coarse` ones hold bf16 values."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(shape, generator=generator)
    changed = [torch.rand(shape, generator=generator) < 0.7 for _ in range(models)]
    others = [base + 2e-3 * torch.randn(shape, generator=generator) * where for where in changed]
    if coarse:
        return base.bfloat16().float(), [x.bfloat16().float() for x in others]
    return base, others


def parameters_of(method: str, given: dict[str, Any], models: int) -> dict[str, Any]:
    described = METHODS[method]
    found = described.shared | {name: [value] * models for name, value in described.per_model.items()} | given
    return {name: value[:models] if isinstance(value, list) else value for name, value in found.items()}


def looked_at(
    subject: Subject, method: type[TensorMerge], models: Tensors, sizes: Sequence[int]
) -> tuple[TensorMerge, list[tuple[int, Tensors]]]:
    """The method after its looks, and the pieces to merge: what the executor does, with pieces of changing sizes."""
    merging = method(subject)
    flat = [x.reshape(-1) for x in models]
    deltas = [x - flat[0] for x in flat[1:]]
    vectors = {"models": flat, "deltas": [flat[0], *deltas], "both": [*flat, *deltas]}[merging.vectors]
    vectors = vectors if subject.based else flat
    unit = max(subject.numel, 1) if merging.pieces == "whole" else merging.unit
    starts = [0]
    while starts[-1] < subject.numel:
        starts.append(starts[-1] + sizes[len(starts) % len(sizes)] * unit)
    spans = list(zip(starts, [*starts[1:-1], subject.numel])) or [(0, 0)]
    pieces = [(lo, [x[lo:hi] for x in vectors]) for lo, hi in spans]
    parts: dict[tuple[int, int], list[float]] = {pair: [] for pair in merging.pairs(len(models))}
    for _, piece in pieces:
        for (i, j), found in parts.items():
            found += partial_sums(piece[i], piece[j], merging.unit).tolist()
    sums = {pair: math.fsum(found) for pair, found in parts.items()}
    for number in range(merging.looks):
        for lo, piece in pieces:
            merging.look(number, lo, piece)
        merging.end_look(number, sums)
    return merging, pieces


def in_pieces(subject: Subject, method: type[TensorMerge], models: Tensors, sizes: Sequence[int]) -> torch.Tensor:
    merging, pieces = looked_at(subject, method, models, sizes)
    merged = torch.cat([merging.merge(lo, piece) for lo, piece in pieces])
    merging.figures()
    return merged.view(subject.shape)


@pytest.mark.parametrize("case", CASES)
def test_methods_hold_no_tensor(case: str) -> None:
    """What they hold grows by less than 5 bits for each element of three models."""
    method, given_parameters, _, based = CASES[case]
    count = min(3, METHODS[method].models[1] or 3)
    held = []
    for rows in (100, 200):
        base, others = inputs((rows, 1500), count, coarse=True)
        parameters = parameters_of(method, given_parameters, count)
        subject = Subject(NAME, base.shape, parameters, MODELS[:count], SEED, torch.device("cpu"), based)
        models = [base, *others] if based else others
        merging, _ = looked_at(subject, METHODS[method].carry_out, models, [8])
        held.append(len(pickle.dumps(merging)))
    assert held[1] - held[0] < 100 * 1500 * 5 / 8
    assert held[0] < 2_000_000 * count


@pytest.mark.parametrize("case", ["tsv_m", "iso_c", "ties", "della", "nuslerp_rows", "arcee_fusion"])
def test_threads_leave_no_trace(case: str) -> None:
    """Of what torch computes in threads; everything else is elementwise."""
    method, given_parameters, whole, _ = CASES[case]
    count = min(3, METHODS[method].models[1] or 3)
    base, others = inputs((150, 400), count, coarse=False)
    parameters = parameters_of(method, given_parameters, count)
    found = set()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.add(bits(whole(base, others, [x - base for x in others], parameters)))
    torch.set_num_threads(1)
    assert len(found) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_does_not_depend_on_chunks_workers_or_shards(method: str, models: Path, tmp_path: Path) -> None:
    """Neither do the figures in its manifest."""
    described = METHODS[method]
    names = ["a", "b", "c"][: described.models[1]]
    required = {name: 0.3 for name, value in described.shared.items() if value is None}
    config = {
        "merge_method": method,
        "models": [{"model": str(models / name), "parameters": {}} for name in names],
        "parameters": required | {"weight": 0.6, "density": 0.5},
    }
    if described.base == "required":
        config["base_model"] = str(models / "base")
    runs = [{}, {"chunk_elements": 4096, "workers": 3}, {"chunk_elements": 20_000, "max_shard_bytes": 100_000}]
    manifests = [m.merge(config, tmp_path / str(number), **run) for number, run in enumerate(runs)]
    for manifest in manifests[1:]:
        assert manifest["tensors"] == manifests[0]["tensors"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = random_tensors(0, layers=1)
    for seed, name in enumerate(("base", "a", "b", "c")):
        write_model(folder / name, sibling(base, seed) if seed else base, dtype=torch.bfloat16, num_hidden_layers=1)
    return folder


def test_every_method_has_a_case() -> None:
    assert {method for method, *_ in CASES.values()} == METHODS.keys()


@pytest.mark.parametrize("case", CASES)
@given(
    shape=st.sampled_from(SHAPES),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    coarse=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_pieces_leave_no_trace(case: str, shape: tuple[int, ...], sizes: list[int], coarse: bool, seed: int) -> None:
    method, given_parameters, whole, based = CASES[case]
    least, most = METHODS[method].models
    count = min(3, most or 3)
    assert count >= least
    base, others = inputs(shape, count, coarse, seed)
    parameters = parameters_of(method, given_parameters, count)
    subject = Subject(NAME, shape, parameters, MODELS[:count], SEED, torch.device("cpu"), based)
    deltas = [x - base for x in others]
    expected = whole(base, others, deltas, parameters)
    merged = in_pieces(subject, METHODS[method].carry_out, [base, *others] if based else others, sizes)
    assert merged.dtype == torch.float32
    same = bits(merged) == bits(expected)  # pytest would explain a difference of bytes for minutes
    assert same
