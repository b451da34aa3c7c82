"""Publishing files: everything steep writes goes through here, so a reader never sees half of anything.

A file is written beside its place, fsynced and renamed over it; a folder is built under a hidden name beside its place
and renamed as a whole. A killed process leaves only a hidden `.NAME.tmp-HOST-PID-...`, which the next writer of NAME
removes. Manifests, the record of where an artefact came from, are written here too. Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Publish `data` (text is written as UTF-8) at `path`: the old content or the new, never a mixture."""
    path = Path(path)
    remove_stale_temporaries(path)
    temporary = _temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends without an error, else vanishes.

    Every file in it is fsynced before the rename. `path` must not exist, or be empty, unless `replace` is set; it is
    then moved aside first and deleted once the new one is in place.

    Raises:
        FileExistsError: `path` exists, is not empty, and `replace` is False. Raised before the block runs.
    """
    path = Path(path)
    check_absent(path, replace=replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(path)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if path.exists() and any(path.iterdir()):
            retired = _temporary_name(path)
            os.rename(path, retired)
            os.rename(temporary, path)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def check_absent(path: str | Path, *, replace: bool = False) -> None:
    """Refuse an output folder that already holds something.

    Raises:
        FileExistsError: naming the path.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path}: is a file, where an output folder was expected")
    if not replace and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path}: already exists and is not empty; remove it or choose another output")


def remove_stale_temporaries(path: Path) -> None:
    """Delete what dead processes of this host left half-written beside `path`; what may still be in use stays."""
    prefix = f".{path.name}.tmp-{_host()}-"
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        if not entry.name.startswith(prefix):
            continue
        pid = entry.name.removeprefix(prefix).split("-")[0]
        if not pid.isdigit() or _alive(int(pid)):
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _host() -> str:
    return socket.gethostname().replace("-", "_") or "host"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def fsync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """fsync every file and folder below `root`, then `root` itself."""
    for folder, _, files in os.walk(root):
        for name in files:
            fsync_folder(Path(folder) / name)
        fsync_folder(Path(folder))


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hexadecimal SHA-256 of a JSON value in canonical form (sorted keys, no spaces): a configuration's identity."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def hash_inputs(paths: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """{path: {"sha256", "bytes"}} of files; a folder stands for its manifest if it has one, else for its files."""
    inputs: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        if path.is_dir() and (path / MANIFEST).is_file():
            files = [path / MANIFEST]
        elif path.is_dir():
            files = sorted(entry for entry in path.iterdir() if entry.is_file())
        else:
            files = [path]
        for file in files:
            inputs[str(file)] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}
    return inputs


def make_manifest(
    kind: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The record that stands beside every artefact: what it is, from which inputs, by which command and versions."""
    return {
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "versions": versions(),
        "inputs": dict(inputs or {}),
        "config": dict(config or {}),
        "figures": dict(figures or {}),
        **extra,
    }


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is not JSON, or holds anything but an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is a JSON {type(value).__name__}; allowed: an object")
    return value


def write_manifest(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Publish `manifest.json` in a folder. In a folder built by `atomic_folder` it is written last."""
    atomic_write(Path(folder) / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an artefact, checked to be of a kind.

    Raises:
        FileNotFoundError: no manifest: the folder was never finished, or is not steep's.
        ValueError: not JSON, or of another kind.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; the folder is not a finished artefact of steep")
    manifest = read_json(path)
    if kind is not None and manifest.get("kind") != kind:
        raise ValueError(f"{path}: kind is {manifest.get('kind')!r}, expected {kind!r}")
    return manifest


def versions(*others: str) -> dict[str, str]:
    """Versions of what can change a result: Python, steep, its libraries and `others`. Imports none of them."""
    found = {"python": platform.python_version()}
    for name in ("steep", "torch", "triton", "numpy", "safetensors", "tokenizers", "sentencepiece", "gguf", *others):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
