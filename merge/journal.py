"""An output folder in the making that outlives its process: what is finished is written down, the next process goes on.

Beside OUT lies the hidden folder `.OUT.merging`. In it `model/` is filled and becomes OUT by one rename, and
`journal.jsonl` says in its first line what is being made and then, line by line, which parts are finished. A journal of
something else is dropped together with its files. Whether a finished part still is what the journal says is for the
caller to check. One process at a time: the journal is locked while it is in use.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..data.files import check_absent, fsync_folder, fsync_tree

JOURNAL, MODEL = "journal.jsonl", "model"


class Journal:
    """The record of an output in the making. Parts may be added from any thread.

    folder: where the output is built. finished: {part: its entry}, of earlier processes and of this one. dropped: the
    folder held the beginning of something else, which is gone.
    """

    def __init__(self, file: IO[bytes], folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._file, self._lock = folder, file, threading.Lock()
        lines, end = whole_lines(file)
        same = bool(lines) and lines[0] == json.loads(json.dumps(identity))
        self.dropped = bool(lines) and not same
        self.finished: dict[str, Any] = {line["part"]: line["entry"] for line in lines[1:]} if same else {}
        if not same:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        file.truncate(end if same else 0)  # a line that a killed process left half-written goes
        file.seek(0, os.SEEK_END)
        if not same:
            self._write(identity)

    def add(self, part: str, entry: Mapping[str, Any]) -> None:
        """A part is finished: what this writes outlives the process."""
        with self._lock:
            self._write({"part": part, "entry": entry})
            self.finished[part] = entry

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()


def workplace(out: str | Path) -> Path:
    """The hidden folder in which `out` is made."""
    return Path(out).parent / f".{Path(out).name}.merging"


def reserved_bytes(out: Path) -> int:
    """What an interrupted merge into `out` holds on the disk already."""
    return sum(path.stat().st_blocks * 512 for path in workplace(out).rglob("*") if path.is_file())


@contextmanager
def journaled_folder(out: str | Path, identity: Mapping[str, Any]) -> Iterator[Journal]:
    """Yield the journal of `out`, whose `folder` becomes `out` when the block ends without an error.

    After a ValueError, which the same command would meet again, or if no part was finished, nothing is left behind;
    after any other error, or a kill, what is finished stays for the next process with the same identity.

    Args:
        out: must not exist, or be an empty folder.
        identity: all that the output depends on, as JSON.

    Raises:
        FileExistsError: `out` is not empty, or another process is writing it. Raised before the block runs.
    """
    out, work = Path(out), workplace(out)
    check_absent(out)
    with _locked(out, work) as file:
        check_absent(out)  # it may have been finished while this process waited to look
        journal = Journal(file, work / MODEL, identity)
        try:
            yield journal
            fsync_tree(journal.folder)
            os.rename(journal.folder, out)
        except BaseException as error:
            if isinstance(error, ValueError) or not journal.finished:
                shutil.rmtree(work, ignore_errors=True)
            raise
        fsync_folder(out.parent)
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(out: Path, work: Path) -> Iterator[IO[bytes]]:
    """The open journal, locked until the block ends or the process dies."""
    path = work / JOURNAL
    while True:
        work.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError), open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileExistsError(f"{out}: another process is writing it (it holds {path})") from None
            if os.fstat(file.fileno()).st_nlink:
                yield file
                return
            # it was removed in between, by the process that held it and has finished


def whole_lines(file: IO[bytes]) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that is not whole, and where they end."""
    file.seek(0)
    lines, end = [], 0
    for line in file:
        try:
            value = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if value is None:
            break
        lines.append(value)
        end += len(line)
    return lines, end
