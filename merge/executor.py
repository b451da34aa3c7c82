"""Carrying out a merge: tensors stream from the inputs through a method into a new model folder, chunk by chunk.

Memory is workers x (inputs + a few) x chunk, whatever the size of the models; the result depends on neither chunk size,
number of workers nor device. A model is published by one rename, so a killed merge leaves no output. Touches the input
folders (reading) and the output folder.

Numerics: inputs are read in the dtype of their files, all arithmetic is float32, and the result is rounded once, to
`out_dtype`, else `dtype`, else the dtype of the donor's tensor. mergekit instead casts inputs and weights to `dtype`
when it loads them and computes in it, which under `dtype: bfloat16` rounds several times; with float32 both agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from torch import Tensor

from ..data.files import atomic_folder, atomic_write, check_absent, hash_inputs, read_manifest
from ..engine.safetensors_io import SafetensorsWriter
from ..engine.weights import write_model_manifest
from .arranged import TensorReader
from .config import parse_config, read_yaml
from .geometry import PARALLEL_COSINE
from .method_table import METHODS
from .methods import ROW, partial_sums
from .plan import MergePlan, TensorPlan, plan_merge
from .tensor_merge import Subject, Sums, TensorMerge

CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
MAX_WORKERS = 8


def merge(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    device: str = "cpu",
    *,
    max_shard_bytes: int = 5_000_000_000,
    chunk_elements: int | None = None,
    workers: int | None = None,
    log: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Merge models as a mergekit YAML says and publish the result as a Hugging Face folder with a manifest.

    Args:
        config: path of the YAML; or its content as a mapping, whose relative paths count from the current folder.
        out: folder to create; it must not exist or be empty.
        device: where the arithmetic runs: cpu, cuda or cuda:N.
        max_shard_bytes: size at which a further weight file is begun.
        chunk_elements: elements of a tensor held at once, rounded up to a multiple of 4096.
        workers: tensors merged at the same time; default: torch's number of threads, at most 8.
        log: called with lines for a person: donors, notes and warnings, before the work and after it.
        progress: called with (bytes of output done, bytes in all).

    Returns:
        The manifest: configuration, hashes of inputs, and for every output tensor its sha256, resolved parameters and
        figures (norms, relative norms of task vectors, cosines); `figures.layers` has the same figures by layer.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: before anything is written, for everything that headers tell.
        ValueError: naming model and tensor, for NaN or infinite inputs, or a result that `dtype` cannot hold.
        OSError: the disk is full.
    """
    log = log or (lambda line: None)
    started = time.monotonic()
    where = _device(device)
    check_absent(out)
    if isinstance(config, Mapping):
        written, folder, sources = dict(config), None, []
        plan = plan_merge(parse_config(written), out=out)
    else:
        written, folder, sources = read_yaml(config), Path(config).resolve().parent, [Path(config)]
        plan = plan_merge(parse_config(written, str(config)), folder, out=out)
    for line in plan.summary():
        log(line)

    chunk = -(-(chunk_elements or CHUNK_ELEMENTS[where.type]) // ROW) * ROW
    workers = workers or min(MAX_WORKERS, torch.get_num_threads())
    sources += plan.input_files
    with atomic_folder(out) as building, _hashing(sources) as input_hashes:
        specs = [(tensor.name, tensor.dtype, tensor.shape) for tensor in plan.tensors]
        with SafetensorsWriter(building, specs, max_shard_bytes) as writer:
            records = _merge_all(plan, writer, where, chunk, workers, progress)
        atomic_write(building / "config.json", json.dumps(plan.config_json, indent=2, ensure_ascii=False) + "\n")
        for donor, file in plan.carried:
            target = building / file.relative_to(donor)
            target.parent.mkdir(exist_ok=True)
            copyfile(file, target)
        for name, text in plan.written.items():
            atomic_write(building / name, text)
        straight = _straight_lines(plan, records)
        write_model_manifest(
            building,
            "merged model",
            inputs={path: entry for job in input_hashes for path, entry in job.result().items()},
            config=written,
            figures={
                "seconds": round(time.monotonic() - started, 3),
                "values": sum(tensor.numel for tensor in plan.tensors),
                "layers": _layer_figures(plan, records),
            },
            models=list(plan.model_labels),
            donors={"config": str(plan.config_donor), "tokenizer": str(plan.tokenizer_donor)},
            notes=list(plan.notes),
            warnings=[*plan.warnings, *straight],
            tensors={name: record for name, (record, _) in records.items()},
        )
    for line in straight:
        log(f"warning: {line}")
    return read_manifest(out)


def _merge_all(
    plan: MergePlan,
    writer: SafetensorsWriter,
    device: torch.device,
    chunk: int,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, tuple[dict[str, Any], Sums]]:
    """Every tensor through a pool of threads; {name: (its manifest entry, its dot products)} in the plan's order."""
    total = sum(tensor.numel * tensor.dtype.itemsize for tensor in plan.tensors)
    done = 0
    found = {}
    with _torch_threads(1), ThreadPoolExecutor(workers, "steep-merge") as pool:
        try:
            jobs = {pool.submit(_merge_tensor, plan, tensor, writer, device, chunk): tensor for tensor in plan.tensors}
            for job in as_completed(jobs):
                tensor = jobs[job]
                found[tensor.name] = job.result()
                done += tensor.numel * tensor.dtype.itemsize
                if progress:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {tensor.name: found[tensor.name] for tensor in plan.tensors}


def _merge_tensor(
    plan: MergePlan, tensor: TensorPlan, writer: SafetensorsWriter, device: torch.device, chunk: int
) -> tuple[dict[str, Any], Sums]:
    """Look at the whole tensor as often as its method needs, then merge, round, hash and write it chunk by chunk."""
    if tensor.operation == "equal":
        method: TensorMerge = _Equal(_subject(plan, tensor, device))
    else:
        method = METHODS[tensor.operation].carry_out(_subject(plan, tensor, device))
    reader = _Reader(plan, tensor, method, device, chunk)
    known: Sums = {}
    for number in range(method.looks):
        parts: dict[tuple[int, int], list[float]] = {pair: [] for pair in reader.pairs}
        for lo, vectors in reader:
            if not number:
                reader.add_products(vectors, parts)
            method.look(number, lo, vectors)
        known = known or {pair: math.fsum(values) for pair, values in parts.items()}
        method.end_look(number, known)

    parts = {pair: [] for pair in reader.pairs}
    digest = hashlib.sha256()
    for lo, vectors in reader:
        if not known:
            reader.add_products(vectors, parts)
        merged = method.merge(lo, vectors)
        rounded = merged.to(tensor.dtype).cpu()
        if tensor.dtype.is_floating_point and not _all_finite(rounded):
            raise ValueError(f"{tensor.name}: the result has values that {tensor.dtype} cannot hold")
        digest.update(rounded.view(torch.uint8).numpy().data)
        writer.write_range(tensor.name, lo, rounded)

    known = known or {pair: math.fsum(values) for pair, values in parts.items()}
    record = {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": digest.hexdigest(),
        "models": reader.models,
        "parameters": tensor.parameters,
        **_figures(tensor.operation, known, reader.models, tensor.base is not None),
        **method.figures(),
    }
    return record, known


def _subject(plan: MergePlan, tensor: TensorPlan, device: torch.device) -> Subject:
    models = tuple(
        plan.model_names[source.model] for position, source in enumerate(tensor.sources) if position != tensor.base
    )
    seed, based = plan.config.random_seed, tensor.base is not None
    return Subject(tensor.name, tensor.shape, tensor.parameters, models, seed, device, based)


class _Equal(TensorMerge):
    """An integer tensor, copied if all inputs agree."""

    def pairs(self, count: int) -> list[tuple[int, int]]:
        return []

    def merge(self, lo: int, vectors: Sequence[Tensor]) -> Tensor:
        for other in vectors[1:]:
            if not torch.equal(vectors[0], other):
                raise ValueError(
                    f"{self.subject.name}: integer tensor that differs between the models cannot be merged"
                )
        return vectors[0]


class _Reader:
    """Chunks of one output tensor's inputs, on the device, in the order of the tensor; can be gone through repeatedly.

    Iteration yields (first flat element, vectors as the method wants them); integers stay as they are. `pairs` are the
    vectors whose dot products are gathered. A tensor of one chunk is read once.
    """

    def __init__(
        self, plan: MergePlan, tensor: TensorPlan, method: TensorMerge, device: torch.device, chunk: int
    ) -> None:
        self.tensor, self.device, self.vectors = tensor, device, method.vectors
        self.chunk, self.unit = _piece(tensor, method, chunk), method.unit
        order = sorted(range(len(tensor.sources)), key=lambda position: position != tensor.base)  # the base goes first
        self.models = [tensor.sources[position].model for position in order]
        self._inputs: list[tuple[TensorReader, str]] = []
        self._buffers = []
        for position in order:
            folder, name = plan.models[tensor.sources[position].model], tensor.sources[position].name
            self._inputs.append((folder, name))
            self._buffers.append(torch.empty(min(self.chunk, tensor.numel), dtype=folder.dtype(name)))
        self._only_chunk: list[Tensor] | None = None
        self.pairs = method.pairs(len(order))

    def __iter__(self) -> Iterator[tuple[int, list[Tensor]]]:
        if self.tensor.numel <= self.chunk:
            self._only_chunk = self._only_chunk or self._load(0)
            yield 0, self._only_chunk
            return
        for lo in range(0, self.tensor.numel, self.chunk):
            yield lo, self._load(lo)

    def _load(self, lo: int) -> list[Tensor]:
        count = min(self.chunk, self.tensor.numel - lo)
        raw = [
            folder.read_into(name, lo, buffer[:count]).to(self.device)
            for (folder, name), buffer in zip(self._inputs, self._buffers)
        ]
        if self.tensor.operation == "equal":
            return raw
        values = [x.to(torch.float32) for x in raw]
        if self.vectors == "models" or self.tensor.base is None:
            return values
        deltas = [x - values[0] for x in values[1:]]
        return [values[0], *deltas] if self.vectors == "deltas" else [*values, *deltas]

    def add_products(self, vectors: Sequence[Tensor], sums: dict[tuple[int, int], list[float]]) -> None:
        """Append the partial dot products of one chunk. A square that is not finite uncovers NaN or infinity."""
        for i, j in self.pairs:
            parts = partial_sums(vectors[i], vectors[j], self.unit).tolist()
            if i == j and not all(map(math.isfinite, parts)):
                self._refuse_not_finite()
            sums[i, j] += parts

    def _refuse_not_finite(self) -> None:
        """Name the input, unless the square has only overflowed. The buffers still hold the chunk."""
        for (folder, name), buffer in zip(self._inputs, self._buffers):
            if not _all_finite(buffer):
                raise ValueError(f"{folder.file_of(name)}: {name} holds NaN or infinite values")


def _piece(tensor: TensorPlan, method: TensorMerge, chunk: int) -> int:
    """Elements read at once: a multiple of the method's unit, or everything."""
    return max(tensor.numel if method.pieces == "whole" else -(-chunk // method.unit) * method.unit, 1)


def _all_finite(x: Tensor) -> bool:
    """aminmax passes NaN on and is many times faster than isfinite on a CPU."""
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(x.to(torch.float32))) if x.numel() else True


def _figures(
    operation: str, sums: Mapping[tuple[int, int], float], models: Sequence[int], based: bool
) -> dict[str, Any]:
    """Norms and cosines from the dot products of one tensor, or from their sums over several; `models` are the numbers
    of the models that the vectors stand for, `based` says whether the first is a base."""

    def norm(i: int) -> float:
        return math.sqrt(sums[i, i])

    def ratio(above: float, below: float) -> float | None:
        return above / below if below and math.isfinite(above / below) else None

    if not sums:
        return {}
    if (vectors := METHODS[operation].carry_out.vectors) == "models" or not based:
        return {"norms": [norm(i) for i, j in sums if i == j]}
    first = 1 if vectors == "deltas" else len(models)
    deltas = range(first, first + len(models) - 1)
    figures: dict[str, Any] = {
        "base_norm": norm(0),
        "relative_deltas": [ratio(norm(i), norm(0)) for i in deltas],
        "delta_cosines": [
            {"models": [models[i - first + 1], models[j - first + 1]], "cosine": ratio(sums[i, j], norm(i) * norm(j))}
            for i, j in combinations(deltas, 2)
        ],
    }
    if vectors == "both":
        figures["cosines"] = [ratio(sums[0, i], norm(0) * norm(i)) for i in range(1, len(models))]
    return figures


def _layer_figures(plan: MergePlan, records: Mapping[str, tuple[dict[str, Any], Sums]]) -> list[dict[str, Any]]:
    """The figures of all tensors of a layer taken as one vector; `layer` None is what lies outside the layers.

    Tensors that came from different models (slices with different sources) are kept apart.
    """
    groups: dict[tuple[int | None, tuple[int, ...]], Sums] = {}
    for tensor in plan.tensors:
        record, sums = records[tensor.name]
        if tensor.operation == "equal":
            continue
        group = groups.setdefault((tensor.layer, tuple(record["models"])), dict.fromkeys(sums, 0.0))
        for pair, value in sums.items():
            group[pair] += value
    method = plan.config.merge_method
    based = METHODS[method].has_base(plan.config.base_model is not None)
    ordered = sorted(groups.items(), key=lambda item: -1 if item[0][0] is None else item[0][0])
    return [
        {"layer": layer, "models": list(models), **_figures(method, sums, models, based)}
        for (layer, models), sums in ordered
    ]


def _straight_lines(plan: MergePlan, records: Mapping[str, tuple[dict[str, Any], Sums]]) -> list[str]:
    if plan.config.merge_method != "slerp":
        return []
    cosines = [cosine for record, _ in records.values() for cosine in record.get("cosines", ()) if cosine is not None]
    parallel = sum(abs(cosine) > PARALLEL_COSINE for cosine in cosines)
    if not parallel:
        return []
    return [f"slerp: {parallel} of {len(cosines)} tensors have |cosine| over {PARALLEL_COSINE}: interpolated on a line"]


def _device(name: str) -> torch.device:
    if name.split(":")[0] not in CHUNK_ELEMENTS:
        raise ValueError(f"device: {name!r}; allowed: {', '.join(CHUNK_ELEMENTS)}")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device: {name!r}, but torch finds no CUDA device here")
    return torch.device(name)


@contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[list[Future[dict[str, Any]]]]:
    """Hash files in one thread beside the merge; it reads ahead, so they come from the disk once if memory allows."""
    pool = ThreadPoolExecutor(1, "steep-hash")
    try:
        yield [pool.submit(hash_inputs, [file]) for file in files]
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """One thread for each torch operation while tensors are merged side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
