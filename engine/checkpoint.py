"""Training checkpoints: published by rename, found by looking, thinned out to the last few.

A checkpoint is a folder `step-NNNNNNNN` with safetensors shards and `manifest.json`, which holds the step, the data
cursor, the fingerprints that a resume compares, and the size of every shard. There is no pointer file that could be
stale: the latest checkpoint is the highest step whose folder is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import (
    atomic_folder,
    fsync_folder,
    make_manifest,
    read_manifest,
    remove_stale_temporaries,
    write_manifest,
)
from .safetensors_io import SafetensorsFolder, SafetensorsWriter

_KIND = "checkpoint"
_SHARD_BYTES = 4 << 30


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Tensor], progress: Mapping[str, Any], keep: int
) -> Path:
    """Publish a checkpoint of `step`, then delete all but the newest `keep` whole ones.

    Tensors are copied to the host one at a time. A checkpoint of the same step that exists already (the run was killed
    after publishing it) is left as it is: it holds the same state.
    """
    path = checkpoint_path(folder, step)
    if not _is_whole(path):
        tensors = {**state, **_random_states()}
        with atomic_folder(path, replace=True) as temporary:
            specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
            writer = SafetensorsWriter(temporary, specs, max_shard_bytes=_SHARD_BYTES, metadata={"format": "pt"})
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            writer.close()
            files = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
            manifest = make_manifest(_KIND, config={**progress, "step": step}, figures={"files": files})
            write_manifest(temporary, manifest)
    for old in list_checkpoints(folder)[keep:]:
        _delete(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, newest first. A damaged one (a shard missing or of another size) is not among them."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.glob("step-*"), reverse=True) if _is_whole(path)]


def read_progress(path: Path) -> dict[str, Any]:
    """Step, cursor and fingerprints as given to `save_checkpoint`."""
    return read_manifest(path, _KIND)["config"]


def load_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, each read when it is asked for; also restores the random generators."""
    tensors = SafetensorsFolder(path)
    torch.set_rng_state(tensors.get("random.cpu"))
    if "random.cuda" in tensors.names and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors.get("random.cuda"))
    return _LazyState(tensors)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes of this host left half-written or half-deleted."""
    for entry in folder.glob(".step-*.tmp-*"):
        remove_stale_temporaries(folder / entry.name[1:].split(".tmp-")[0])


class _LazyState(Mapping[str, Tensor]):
    def __init__(self, tensors: SafetensorsFolder) -> None:
        self._tensors = tensors
        self._names = [name for name in tensors.names if not name.startswith("random.")]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _random_states() -> dict[str, Tensor]:
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states


def _is_whole(path: Path) -> bool:
    try:
        files = read_manifest(path, _KIND)["figures"]["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _delete(path: Path) -> None:
    """Delete without a moment at which a half-deleted folder looks like a checkpoint: its manifest goes first."""
    (path / "manifest.json").unlink()
    fsync_folder(path)
    shutil.rmtree(path)
