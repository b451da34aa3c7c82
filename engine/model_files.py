"""The files of a Hugging Face model folder beside its weights, and the manifest of a finished one.

Apart from `engine/weights.py` so that whoever only moves files (merging) need not import models and kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..data.files import MANIFEST, make_manifest, sha256_file, write_manifest
from .ranks import Ranks

# What belongs to a model besides its weights. Not README.md: a model card speaks of the weights it was written for.
CARRIED = (
    *("config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model*", "tekken.json", "vocab.json"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*", "additional_chat_templates/*"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
)


def write_model_manifest(
    folder: Path,
    kind: str,
    *,
    inputs: Mapping[str, Any],
    sized: Collection[str] = (),
    ranks: Ranks | None = None,
    **extra: Any,
) -> None:
    """The manifest of a finished model folder; `files` has the checksums that `steep verify` compares.

    Args:
        sized: files of which only the size is recorded, because `tensors` in `extra` has the SHA-256 of each tensor.
        ranks: all of them must call it, and share the work of hashing; rank 0 writes.
    """
    ranks = ranks or Ranks()
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    paths: list[Path] = ranks.exchange(found)[0]  # what rank 0 sees, should a network file system be late elsewhere
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    own = [path for path in paths if names[path] not in sized][ranks.rank :: ranks.size]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(sha256_file, own))
    hashed = {path: digest for each in ranks.exchange(dict(zip(own, hashes))) for path, digest in each.items()}
    if ranks.rank == 0:
        files: dict[str, Any] = {}
        for path, name in names.items():
            size = path.stat().st_size
            files[name] = {"sha256": hashed[path], "bytes": size} if path in hashed else size
        write_manifest(folder, make_manifest(kind, inputs=inputs, files=files, **extra))


def carried_files(folder: str | Path) -> list[Path]:
    """Files of a model folder that a model derived from it takes along: all that says how to use it, no weights."""
    return sorted({path for pattern in CARRIED for path in Path(folder).glob(pattern) if path.is_file()})
