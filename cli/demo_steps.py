"""Steps that remember what they have done, for `steep demo`: run it again and it goes on where it was left.

A step is done if its record says so, its inputs and settings are what they were, and its output is what it wrote. The
record of a step is OUT/steps/NAME.json. Knows files only; what a step does is the caller's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.files import MANIFEST, atomic_write, hash_inputs, sha256_json

RECORDS = "steps"


class Steps:
    """The steps of one run in one folder. `say` prints a line; `memory` gives the process's peak memory in bytes."""

    def __init__(self, out: Path, total: int, say: Callable[[str], None], memory: Callable[[], int]) -> None:
        """
        Raises:
            FileExistsError: `out` holds something that is not such a run: nothing in it is touched.
        """
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out}: is a file, where an output folder was expected")
        if out.is_dir() and any(out.iterdir()) and not (out / RECORDS).is_dir():
            raise FileExistsError(f"{out}: holds something else than an earlier run; choose another folder")
        (out / RECORDS).mkdir(parents=True, exist_ok=True)
        self.out = out
        self.total = total
        self.say = say
        self.memory = memory
        self.records: list[dict[str, Any]] = []

    def run(
        self,
        name: str,
        action: Callable[[], object],
        *,
        inputs: Sequence[Path],
        output: Path,
        settings: Mapping[str, Any],
        resumes: bool = False,
    ) -> None:
        """Carry out `action`, which publishes the file or folder `output`, unless that was done before.

        `inputs` count by content. What stands at `output` from other inputs or settings, or from an action that did not
        finish, is removed first; with `resumes`, an unfinished output of the same inputs and settings is left to
        `action`, which goes on from it.
        """
        number = len(self.records) + 1
        record_path = self.out / RECORDS / f"{name}.json"
        contents = _contents(inputs)
        assert len(contents) == len(inputs), f"{name}: an input is not finished: {inputs}"
        key = sha256_json({"step": name, "settings": settings, "inputs": contents})
        old = _read(record_path)
        if old.get("key") == key and old.get("output") and old["output"] == _contents([output]):
            self.records.append(old)
            self.say(f"[{number}/{self.total}] {name}: done before, in {old['seconds']:.1f} s")
            return
        if not (resumes and old.get("key") == key and "output" not in old):
            _remove(output)
        self._record(record_path, {"step": name, "key": key})
        self.say(f"[{number}/{self.total}] {name} ...")
        started = time.perf_counter()
        action()
        _release_memory()
        seconds = time.perf_counter() - started
        record = {
            "step": name,
            "key": key,
            "seconds": round(seconds, 2),
            "peak_memory_bytes": self.memory(),
            "output": _contents([output]),
        }
        self._record(record_path, record)
        self.records.append(record)
        self.say(f"[{number}/{self.total}] {name}: {seconds:.1f} s")

    def _record(self, path: Path, record: Mapping[str, Any]) -> None:
        atomic_write(path, json.dumps(record, indent=2) + "\n")


def _contents(paths: Sequence[Path]) -> list[list[str]]:
    """Hashes of files, and of folders by their manifest; empty for what is not there or not finished."""
    finished = [path.is_file() or (path / MANIFEST).is_file() for path in paths]
    if not all(finished):
        return []
    return [[entry["sha256"] for entry in hash_inputs([path]).values()] for path in paths]


def _release_memory() -> None:
    """Give freed memory back to the system, which glibc does not do by itself: else it adds to the next step's peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _read(path: Path) -> dict[str, Any]:
    """A record; none if there is none or a person has damaged it."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
