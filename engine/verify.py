"""`steep verify`: is an artefact whole? Checksums of what its manifest lists, structure, finiteness. Reads only.

Everything is reported that can be found out: one damaged file does not hide another.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..data import TokenStore, load_tokenizer
from ..data.files import MANIFEST, read_manifest, sha256_file
from ..data.tokenize import STORE_KIND
from .checkpoint import KIND as CHECKPOINT_KIND
from .checkpoint import verify_checksums
from .config import ARCHITECTURES, ModelConfig
from .model import Decoder
from .safetensors_io import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, is_finite
from .weights import check_tensors, chunks


def verify(path: str | Path) -> dict[str, Any]:
    """Check a model folder, or an artefact of steep, and every artefact in the folders below it.

    A manifest's files are compared with its checksums; token stores check themselves; tensors are read and searched for
    NaN and Inf; a model's tensors are compared with its config.json, and its tokenizer with its vocabulary.

    Returns:
        {"path", "artefacts": [{"path", "kind", and what was checked}]} if all is well.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: nothing to verify, or the list of all problems.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: not found, or not a folder")
    folders = [path, *sorted(entry for entry in path.rglob("*") if entry.is_dir() and not _is_hidden(entry, path))]
    folders = [folder for folder in folders if _is_artefact(folder)]
    if not folders:
        raise ValueError(f"{path}: neither a model folder nor an artefact of steep (no {MANIFEST}, no safetensors)")
    artefacts, problems = [], []
    for folder in folders:
        report: dict[str, Any] = {"path": str(folder)}
        problems += _verify_folder(folder, report)
        artefacts.append(report)
    if problems:
        raise ValueError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems)}")
    return {"path": str(path), "artefacts": artefacts}


def _is_hidden(entry: Path, root: Path) -> bool:
    """Unfinished artefacts have hidden names."""
    return any(part.startswith(".") for part in entry.relative_to(root).parts)


def _is_artefact(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (MANIFEST, SINGLE_FILE, INDEX_FILE)) or _is_model(folder)


def _is_model(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and b'"model_type"' in config.read_bytes()


def _verify_folder(folder: Path, report: dict[str, Any]) -> list[str]:
    """Fill `report` with what was checked; the problems found."""
    problems: list[str] = []
    manifest: dict[str, Any] = {}
    if (folder / MANIFEST).is_file():
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            problems.append(str(error))
    report["kind"] = manifest.get("kind", "model" if _is_model(folder) else "unknown")
    files = manifest.get("files") or manifest.get("figures", {}).get("files")
    if isinstance(files, dict):
        problems += _verify_files(folder, files)
        report["files"] = len(files)
    try:
        if report["kind"] == STORE_KIND:
            store = TokenStore(folder)
            report |= {"documents": store.num_docs, "tokens": store.num_tokens}
            store.verify()
        elif _is_model(folder) or any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
            problems += _verify_tensors(folder, report, manifest)
            if report["kind"] == CHECKPOINT_KIND:
                problems += verify_checksums(folder)
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    return problems


def _verify_files(folder: Path, files: dict[str, Any]) -> list[str]:
    """Compare with {name: {"sha256", "bytes"}}, or with {name: bytes} where the writer did not hash."""
    problems = []
    for name, expected in files.items():
        file = folder / name
        size, checksum = (expected["bytes"], expected["sha256"]) if isinstance(expected, dict) else (expected, None)
        if not file.is_file():
            problems.append(f"{file}: not found, but {MANIFEST} lists it")
        elif file.stat().st_size != size:
            problems.append(f"{file}: has {file.stat().st_size} bytes, {MANIFEST} says {size}")
        elif checksum is not None and (found := sha256_file(file)) != checksum:
            problems.append(f"{file}: SHA-256 is {found}, {MANIFEST} says {checksum}")
    return problems


def _verify_tensors(folder: Path, report: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """Every tensor readable and finite, with the hash that a manifest gives; those of a model as config.json says."""
    problems = []
    hashes = found if isinstance(found := manifest.get("tensors"), dict) else {}
    with SafetensorsFolder(folder) as tensors:
        report |= {"tensors": len(tensors.names), "tensor_bytes": tensors.total_bytes}
        if _is_model(folder):
            problems += _verify_model(folder, tensors, report)
        problems += [f"{folder}: no tensor {name}, but {MANIFEST} lists it" for name in hashes if name not in tensors]
        for name in tensors.names:
            problems += _verify_tensor(tensors, name, hashes.get(name))
    return problems


def _verify_tensor(tensors: SafetensorsFolder, name: str, expected: Any) -> list[str]:
    dtype = tensors.dtype(name)
    with_aminmax = dtype.is_floating_point and dtype.itemsize > 1  # fp8 has none
    if expected is None and not with_aminmax:
        return []
    digest, finite = hashlib.sha256(), True
    for lo, hi in chunks(tensors.numel(name)):
        values = tensors.read_into(name, lo, torch.empty(hi - lo, dtype=dtype))
        finite = finite and (not with_aminmax or is_finite(values))
        if expected is not None:
            digest.update(values.view(torch.uint8).numpy().data)
    where = f"{tensors.file_of(name)}: {name}"
    problems = [] if finite else [f"{where} holds NaN or Inf"]
    if expected is not None and digest.hexdigest() != expected:
        problems.append(f"{where}: SHA-256 is {digest.hexdigest()}, {MANIFEST} says {expected}")
    return problems


def _verify_model(folder: Path, tensors: SafetensorsFolder, report: dict[str, Any]) -> list[str]:
    problems = []
    values = json.loads((folder / "config.json").read_bytes())
    model_type = values.get("model_type") if isinstance(values, dict) else None
    vocab_size = None
    if model_type in ARCHITECTURES:
        try:
            config = ModelConfig.from_folder(folder)
            vocab_size = config.vocab_size
            with torch.device("meta"):
                check_tensors(Decoder(config), tensors)
            report["config"] = f"{model_type}: names and shapes of all tensors as config.json says"
        except ValueError as error:
            problems.append(str(error))
    else:  # what merging by name passes through
        report["config"] = f"{model_type}: not an architecture that steep computes; tensors not compared with it"
    try:
        tokenizer = load_tokenizer(folder)
        report["tokenizer"] = f"{tokenizer.vocab_size} ids"
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            problems.append(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}")
    except (ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    return problems
