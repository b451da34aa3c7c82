"""`steep merge verify`: is a merged folder what its configuration makes of its inputs? Reads only.

Checked are, each by itself, so that one fault does not hide another: the hashes that the record of the merge gives of
inputs, tensors and files; structure against a plan made anew (names, shapes, dtypes, config.json, tokenizer and other
files beside the weights); that all weights are finite; and random pieces of every tensor, recomputed in float64 by
formulas of their own (recompute.py). What cannot be checked is said.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batch import IGNORE, PackedBatch
from ..data.files import MANIFEST, read_json, sha256_file
from ..engine.safetensors_io import SafetensorsFolder, dtype_name
from .config import parse_config, read_yaml
from .measure import pieces
from .plan import MergePlan, TensorPlan, plan_merge
from .recompute import FORMULAS, formula
from .recompute_task import Expected, Task

MERGE_JSON = "merge.json"
PIECE = 4096  # elements recomputed at once
PIECES = 4  # of every tensor
WHOLE = ("tsv_m", "iso_c")  # singular vectors of whole matrices: only some tensors are recomputed
MOST_WHOLE = 4
TEXT = "The quick brown fox jumps over the lazy dog."


@dataclass
class _Findings:
    """Everything that is wrong, and what was looked at."""

    problems: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    not_checked: list[str] = field(default_factory=list)


def verify_merge(
    folder: str | Path,
    *,
    config: str | Path | None = None,
    forward: bool = False,
    chunks: int = PIECES,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Check a merged model.

    Args:
        folder: the result of a merge.
        config: the YAML it was made by, if the record that lies in the folder is not to be relied on.
        forward: also load the model into the engine and run it on one short sentence.
        chunks: random pieces of 4096 elements that are recomputed of every tensor.
        seed: which pieces.
        progress: called with (bytes of weights checked, bytes in all).

    Returns:
        {"path", "tensors", "values", "hashes", "recomputed", "forward", "not_checked"} if all is well.

    Raises:
        FileNotFoundError: no such folder, or it has no weights.
        ValueError: no record of a merge and no config; or the list of all problems.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: not found, or not a folder")
    record = _read_record(folder, config)
    findings = _Findings(report={"path": str(folder)})
    plan = _plan(record, config, findings)
    inputs_as_recorded = _check_inputs(record, findings)
    with _opened(folder, findings) as tensors:
        if plan is not None and tensors is not None:
            _check_structure(plan, tensors, findings)
            _check_files(plan, folder, findings)
        if tensors is not None:
            _check_tensors(tensors, record.get("tensors") or {}, findings, progress)
        _check_hashes(folder, record, findings)
        if plan is not None and tensors is not None:
            if inputs_as_recorded:
                made_with = plan.config.random_seed if config is not None else record.get("seed")
                _recompute(plan, record, made_with, tensors, chunks, seed, findings)
            else:
                findings.not_checked.append("values: the inputs are not those that were merged")
    if forward and not findings.problems:
        findings.report["forward"] = _forward(folder, findings)
    if findings.problems:
        count = len(findings.problems)
        listed = "".join(f"\n  {problem}" for problem in findings.problems)
        raise ValueError(f"{folder}: {count} problem{'s' * (count > 1)}:{listed}")
    return findings.report | {"not_checked": findings.not_checked}


def _read_record(folder: Path, config: str | Path | None) -> dict[str, Any]:
    """What the merge wrote of itself: merge.json, or the manifest if that holds it all."""
    for name in (MERGE_JSON, MANIFEST):
        if (folder / name).is_file():
            record = read_json(folder / name)
            if record.get("kind") == "merged model" and "config" in record:
                return record
    if config is None:
        raise ValueError(f"{folder}: no record of a merge by steep; give --config, the YAML that it was made by")
    return {}


def _plan(record: Mapping[str, Any], config: str | Path | None, findings: _Findings) -> MergePlan | None:
    """The plan of the recorded configuration, or of the one given."""
    folder = _config_folder(record) if config is None else Path(config).resolve().parent
    where = "the recorded configuration" if config is None else str(config)
    written = record["config"] if config is None else read_yaml(config)
    if not _is_exact(record):
        written = {**written, "compat": record["mode"]}
    try:
        return plan_merge(parse_config(written, where), folder)
    except (ValueError, FileNotFoundError) as error:
        hint = "" if config is not None else "; if models have moved, give --config"
        findings.problems.append(f"{where} cannot be planned any more{hint}: {error}")
        return None


def _is_exact(record: Mapping[str, Any]) -> bool:
    return record.get("mode", "exact") == "exact"


def _config_folder(record: Mapping[str, Any]) -> Path | None:
    """Where the YAML lay, from which relative paths count: among the inputs it is the file with this content."""
    for name in record.get("inputs", {}):
        path = Path(name)
        if _is_yaml(path) and path.is_file():
            try:
                if read_yaml(path) == record["config"]:
                    return path.resolve().parent
            except ValueError:
                continue
    return None


def _is_yaml(file: Path) -> bool:
    return file.suffix in (".yaml", ".yml")


def _check_inputs(record: Mapping[str, Any], findings: _Findings) -> bool:
    """Whether all inputs are there and as they were. The YAML need not be: the record holds what it said."""
    before = len(findings.problems)
    inputs = record.get("inputs", {})
    for name, expected in inputs.items():
        file = Path(name)
        if not file.is_file():
            problem = f"{file}: an input of the merge, not found"
        elif file.stat().st_size != expected["bytes"] or sha256_file(file) != expected["sha256"]:
            problem = f"{file}: has changed since it was merged"
        else:
            continue
        (findings.not_checked if _is_yaml(file) else findings.problems).append(problem)
    findings.report["hashes"] = {"inputs": len(inputs)}
    return len(findings.problems) == before


@contextmanager
def _opened(folder: Path, findings: _Findings) -> Iterator[SafetensorsFolder | None]:
    """The tensors of a folder, or None and a problem if it cannot be read."""
    try:
        tensors = SafetensorsFolder(folder)
    except (ValueError, FileNotFoundError) as error:
        findings.problems.append(str(error))
        yield None
        return
    with tensors:
        yield tensors


def _check_structure(plan: MergePlan, tensors: SafetensorsFolder, findings: _Findings) -> None:
    planned = {tensor.name: tensor for tensor in plan.tensors}
    for name, tensor in planned.items():
        if name not in tensors:
            findings.problems.append(f"{tensors.path}: no tensor {name}, which the plan has")
        elif tensors.shape(name) != tensor.shape:
            found, wanted = list(tensors.shape(name)), list(tensor.shape)
            findings.problems.append(f"{tensors.file_of(name)}: {name} has shape {found}, the plan says {wanted}")
        elif tensors.dtype(name) != tensor.dtype:
            text = f"{name} is {dtype_name(tensors.dtype(name))}, the plan says {dtype_name(tensor.dtype)}"
            findings.problems.append(f"{tensors.file_of(name)}: {text}")
    for name in tensors.names:
        if name not in planned:
            findings.problems.append(f"{tensors.file_of(name)}: tensor {name} is not in the plan")
    findings.report["tensors"] = len(tensors.names)
    findings.report["values"] = sum(tensors.numel(name) for name in tensors.names)


def _check_files(plan: MergePlan, folder: Path, findings: _Findings) -> None:
    """config.json, and what is carried or written beside it: tokenizer, template, licences."""
    try:
        config = read_json(folder / "config.json")
    except (ValueError, FileNotFoundError) as error:
        findings.problems.append(str(error))
    else:
        for key in sorted(config.keys() | plan.config_json.keys()):
            if (found := config.get(key)) != (wanted := plan.config_json.get(key)):
                findings.problems.append(f"{folder / 'config.json'}: {key} is {found!r}, the plan says {wanted!r}")
    contents = {file.relative_to(donor).as_posix(): file.read_bytes() for donor, file in plan.carried}
    origins = {file.relative_to(donor).as_posix(): str(donor) for donor, file in plan.carried}
    contents |= {name: text.encode() for name, text in plan.written.items()}
    for name, wanted in contents.items():
        if not (folder / name).is_file():
            findings.problems.append(f"{folder / name}: not found, but the plan has it")
        elif (folder / name).read_bytes() != wanted:
            origin = f"is not that of {origins[name]}" if name in origins else "is not what the plan says"
            findings.problems.append(f"{folder / name}: {origin}")
    findings.report["files"] = len(contents) + 1


def _check_tensors(
    tensors: SafetensorsFolder,
    recorded: Mapping[str, Any],
    findings: _Findings,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Hashes and finiteness, in one reading."""
    hashed = done = 0
    for name in tensors.names:
        dtype, digest, finite = tensors.dtype(name), hashlib.sha256(), True
        for lo, hi in pieces(tensors.numel(name)):
            values = tensors.read_into(name, lo, torch.empty(hi - lo, dtype=dtype))
            digest.update(values.view(torch.uint8).numpy().data)
            finite = finite and (not dtype.is_floating_point or bool(torch.isfinite(values.float()).all()))
        where = f"{tensors.file_of(name)}: {name}"
        if not finite:
            findings.problems.append(f"{where} holds NaN or infinite values")
        entry = recorded.get(name)
        expected = entry["sha256"] if isinstance(entry, Mapping) else entry
        if expected is not None:
            hashed += 1
            if digest.hexdigest() != expected:
                findings.problems.append(f"{where}: its bytes are not those that the merge wrote")
        done += tensors.numel(name) * dtype.itemsize
        if progress:
            progress(done, tensors.total_bytes)
    findings.report.setdefault("hashes", {})["tensors"] = hashed
    if not recorded:
        findings.not_checked.append("hashes: there is no record of the merge")


def _check_hashes(folder: Path, record: Mapping[str, Any], findings: _Findings) -> None:
    """The files that the manifest lists; weights by size alone, since `_check_tensors` has their bytes."""
    files = record.get("files") or (read_json(folder / MANIFEST).get("files") if (folder / MANIFEST).is_file() else {})
    for name, expected in (files or {}).items():
        file = folder / name
        size = expected["bytes"] if isinstance(expected, Mapping) else expected
        if not file.is_file():
            findings.problems.append(f"{file}: not found, but {MANIFEST} lists it")
        elif file.stat().st_size != size:
            findings.problems.append(f"{file}: has {file.stat().st_size} bytes, {MANIFEST} says {size}")
        elif file.suffix != ".safetensors" and sha256_file(file) != expected["sha256"]:
            findings.problems.append(f"{file}: is not the file that {MANIFEST} lists")
    findings.report.setdefault("hashes", {})["files"] = len(files or {})


def _recompute(
    plan: MergePlan,
    record: Mapping[str, Any],
    made_with: int | None,
    tensors: SafetensorsFolder,
    chunks: int,
    seed: int,
    findings: _Findings,
) -> None:
    """Random pieces of every tensor that has its planned shape and dtype, against the formulas.

    Args:
        made_with: the seed of the merge; None: the configuration's.
    """
    method = plan.config.merge_method
    if not _is_exact(record):
        findings.not_checked.append(f"values: the mode is {record['mode']}, whose arithmetic is another's")
        return
    if method not in FORMULAS:
        findings.not_checked.append(f"values: {method} has no formula to recompute it by")
        return
    if any("+" in label for label in plan.model_labels) or plan.vocabulary is not None:
        findings.not_checked.append("adapters and arranged vocabularies: their rows are read as the merge reads them")
    random = np.random.default_rng(seed)
    fitting = [tensor for tensor in plan.tensors if tensor.name in tensors and _fits(tensor, tensors)]
    chosen = fitting
    if method in WHOLE:
        matrices = [number for number, tensor in enumerate(fitting) if len(tensor.shape) == 2]
        left_out = set(random.permutation(matrices)[MOST_WHOLE:].tolist())
        chosen = [tensor for number, tensor in enumerate(fitting) if number not in left_out]
        if left_out:
            text = f"values of {len(left_out)} matrices: {method} is recomputed on {MOST_WHOLE} whole ones"
            findings.not_checked.append(text)
    made_with = plan.config.random_seed if made_with is None else made_with
    values = undecided = 0
    for tensor in chosen:
        counts = _check_tensor(plan, tensor, tensors, made_with, chunks, random, findings)
        values, undecided = values + counts[0], undecided + counts[1]
    found = {"method": method, "tensors": len(chosen), "values": values, "either_sign": undecided}
    findings.report["recomputed"] = found


def _fits(tensor: TensorPlan, tensors: SafetensorsFolder) -> bool:
    return tensors.shape(tensor.name) == tensor.shape and tensors.dtype(tensor.name) == tensor.dtype


def _check_tensor(
    plan: MergePlan,
    tensor: TensorPlan,
    tensors: SafetensorsFolder,
    seed: int,
    chunks: int,
    random: np.random.Generator,
    findings: _Findings,
) -> tuple[int, int]:
    """(values compared, those for which either sign or selection was accepted)."""
    if not tensor.numel:
        return 0, 0
    compared = either = 0
    faults: list[tuple[int, int, float]] = []
    if tensor.operation == "equal":
        for lo, hi in _random_pieces(tensor.numel, 1, chunks, random):
            source = tensor.sources[0]
            wanted = plan.models[source.model].read_into(source.name, lo, _buffer(plan, tensor, 0, hi - lo))
            found = tensors.read_into(tensor.name, lo, torch.empty(hi - lo, dtype=tensor.dtype))
            faults += [(lo + int(at), 1, float(wanted[at])) for at in torch.nonzero(wanted != found).flatten()[:1]]
            compared += hi - lo
    else:
        with np.errstate(all="ignore"):
            computed = formula(tensor.operation, _task(plan, tensor, seed))
            for lo, hi in _random_pieces(tensor.numel, computed.unit, chunks, random):
                found = tensors.read_into(tensor.name, lo, torch.empty(hi - lo, dtype=tensor.dtype))
                expected = computed.at(lo, hi)
                wrong = ~_agrees(found, expected)
                either += int((expected.other != expected.values).sum())
                compared += hi - lo
                if wrong.any():
                    at = int(np.argmax(wrong))
                    faults.append((lo + at, int(wrong.sum()), float(expected.values[at])))
    if faults:
        at, _, value = faults[0]
        stored = tensors.read_into(tensor.name, at, torch.empty(1, dtype=tensor.dtype)).item()
        count = sum(number for _, number, _ in faults)
        text = f"{count} of {compared} recomputed values differ, first at element {at}: {stored:.9g} is stored"
        findings.problems.append(f"{tensors.file_of(tensor.name)}: {tensor.name}: {text}, {value:.9g} expected")
    return compared, either


def _agrees(found: Tensor, expected: Expected) -> np.ndarray:
    """Where the stored value is what a value within the slack is rounded to."""
    stored = found.double().numpy()
    agrees = np.zeros(len(stored), bool)
    for values in (expected.values, expected.other):
        low, high = (
            torch.from_numpy(values + sign * expected.slack).to(torch.float32).to(found.dtype).double().numpy()
            for sign in (-1, 1)
        )
        agrees |= (low <= stored) & (stored <= high)
    return agrees | np.isinf(expected.slack)


def _task(plan: MergePlan, tensor: TensorPlan, seed: int) -> Task:
    order = sorted(range(len(tensor.sources)), key=lambda position: position != tensor.base)

    def load(vector: int, lo: int, hi: int) -> np.ndarray:
        source = tensor.sources[order[vector]]
        raw = plan.models[source.model].read_into(source.name, lo, _buffer(plan, tensor, order[vector], hi - lo))
        return np.asarray(raw.to(torch.float32).numpy())

    models = tuple(plan.model_names[s.model] for number, s in enumerate(tensor.sources) if number != tensor.base)
    based = tensor.base is not None
    return Task(tensor.name, tensor.shape, tensor.parameters, models, seed, based, load)


def _buffer(plan: MergePlan, tensor: TensorPlan, position: int, count: int) -> Tensor:
    source = tensor.sources[position]
    return torch.empty(count, dtype=plan.models[source.model].dtype(source.name))


def _random_pieces(numel: int, unit: int, chunks: int, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Disjoint pieces of about PIECE elements, multiples of unit; the whole tensor if they would cover it."""
    size = max(1, PIECE // unit) * unit
    count = math.ceil(numel / size)
    for number in sorted(random.permutation(count)[:chunks].tolist()):
        yield number * size, min((number + 1) * size, numel)


def _forward(folder: Path, findings: _Findings) -> dict[str, Any] | None:
    """Mean negative log-likelihood of one sentence."""
    from ..data import load_tokenizer
    from ..engine import Engine

    try:
        tokenizer = load_tokenizer(folder)
        tokens = np.array(tokenizer.encode(TEXT), np.int64)
        engine = Engine.load(folder)
        batch = PackedBatch(
            tokens=tokens,
            labels=np.append(tokens[1:], IGNORE),
            positions=np.arange(len(tokens), dtype=np.int32),
            cu_seqlens=np.array([0, len(tokens)], np.int32),
            max_seqlen=len(tokens),
            source_ids=np.zeros(1, np.int32),
            num_valid=len(tokens) - 1,
        )
        loss = float(engine.eval_nll(batch).nll.sum()) / batch.num_valid
    except (ValueError, FileNotFoundError) as error:
        findings.problems.append(f"forward: {error}")
        return None
    if not math.isfinite(loss):
        findings.problems.append(f"forward: the mean loss of {TEXT!r} is {loss}")
    return {"text": TEXT, "tokens": len(tokens), "nats_per_token": round(loss, 4)}
