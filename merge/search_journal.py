"""The journal of a search: every evaluation is a line that outlives the process; the same search goes on from it.

The first line says what is searched. A journal of another search is refused, not dropped: evaluations are dear.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..data.files import check_absent, fsync_folder
from .journal import whole_lines
from .search_config import Point

JOURNAL = "evaluations.jsonl"


class SearchJournal:
    """What has been measured, by evaluation set ("search", "held_out") and point (None: the reference)."""

    def __init__(self, file: IO[bytes], lines: list[dict[str, Any]]) -> None:
        self._file = file
        self._found = {_key(line["set"], line["point"]): line for line in lines}
        self.taken_over = len(lines)

    def get(self, data: str, point: Point | None) -> dict[str, Any] | None:
        return self._found.get(_key(data, point))

    def add(self, data: str, point: Point | None, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write a line, durably, and return it."""
        line = {"set": data, "point": point, **figures}
        write_line(self._file, line)
        self._found[_key(data, point)] = line
        return line


def write_line(file: IO[bytes], line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _key(data: str, point: Point | None) -> str:
    return json.dumps([data, point], sort_keys=True)


@contextmanager
def open_journal(out: Path, identity: Mapping[str, Any]) -> Iterator[SearchJournal]:
    """The journal in `out`, new or gone on with, for this process alone.

    Args:
        identity: all that the evaluations depend on, as JSON; names of its parts are used in messages.

    Raises:
        FileExistsError: `out` holds something else, or another process is searching.
        ValueError: `out` holds the journal of another search; naming what differs.
    """
    path = out / JOURNAL
    if not path.is_file():
        check_absent(out)
        out.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{out}: another process is searching (it holds {path})") from None
        lines, end = whole_lines(file)
        wanted = json.loads(json.dumps(identity))
        if lines and lines[0] != wanted:
            differ = sorted(key for key in wanted.keys() | lines[0].keys() if wanted.get(key) != lines[0].get(key))
            raise ValueError(
                f"{path}: is of another search: {', '.join(differ)} differ; choose another output, or remove {out}"
            )
        file.truncate(end)  # a line that a killed process left half-written goes
        if not lines:
            write_line(file, wanted)
            fsync_folder(out)
        yield SearchJournal(file, lines[1:])
