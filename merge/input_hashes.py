"""SHA-256 of input files beside their reading, so that every byte comes from the disk once. Opens files for reading."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HASH_BYTES = 1 << 20


class TrailingHashes:
    """SHA-256 of safetensors files that others read: it follows them closely, so that the bytes are still in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self._states = {file: _HashState(file) for file in files}

    def advance(self, file: Path, begin: int, end: int) -> None:
        """The bytes of a tensor have been read: hash on through all that follows without a gap."""
        if file in self._states:  # else its model is known by a manifest
            self._states[file].advance(begin, end)

    def finish(self, file: Path) -> None:
        """Hash what is left."""
        with self._states[file].hashing:
            self._states[file].read(None)

    def of(self, file: Path) -> dict[str, Any]:
        """As `hash_inputs` gives it, after `finish`."""
        state = self._states[file]
        return {"sha256": state.digest.hexdigest(), "bytes": state.position}

    def __enter__(self) -> TrailingHashes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for state in self._states.values():
            os.close(state.descriptor)


class _HashState:
    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDONLY)
        self.digest, self.position = hashlib.sha256(), 0
        self.hashing, self._lock = threading.Lock(), threading.Lock()
        self._ready = 8 + int.from_bytes(os.pread(self.descriptor, 8, 0), "little")  # the header
        self._beyond: dict[int, int] = {}  # where tensors begin and end that were read ahead of a gap

    def advance(self, begin: int, end: int) -> None:
        with self._lock:
            if end > begin:
                self._beyond[begin] = end
            while self._ready in self._beyond:
                self._ready = self._beyond.pop(self._ready)
        if self.hashing.acquire(blocking=False):  # who comes while another hashes goes on with his work
            try:
                self.read(self._ready)
            finally:
                self.hashing.release()

    def read(self, end: int | None) -> None:
        buffer = memoryview(bytearray(HASH_BYTES))
        while end is None or self.position < end:
            wanted = HASH_BYTES if end is None else min(HASH_BYTES, end - self.position)
            count = os.preadv(self.descriptor, [buffer[:wanted]], self.position)
            if count == 0:
                return
            self.digest.update(buffer[:count])
            self.position += count
