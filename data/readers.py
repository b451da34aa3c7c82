"""Readers: text files -> documents, streamed, every record accounted for. May touch the input files and nothing else.

A file is read as *blocks* (a few MB of raw bytes, cheap to cut and to send to another process), a block is decoded into
documents (JSON, UTF-8: the expensive half). Whoever reads alone uses `read_documents`.

What counts as one record, and so yields exactly one Document or one Reject:
- .jsonl, .jsonl.gz, .jsonl.zst: every line, ended by a line feed or by the end of the file;
- .parquet: every row;
- .txt: the whole file, kept as it is (line ends included).
A byte-order mark at the start of a file is not part of its text. Rejected: invalid UTF-8 (a lone surrogate escape in
JSON included), a line that is not a JSON object, a missing or non-string text field, text that is empty or only white
space, and text holding a NUL character (never text: it betrays binary or UTF-16 data, and tokenizers disagree on it).
Everything else is kept unchanged. A file that cannot be read to its end (cut gzip, not parquet) is a ValueError.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
BLOCK_BYTES = 1 << 18  # raw bytes per block of lines: a fraction of a second of tokenising
BLOCK_ROWS = 64  # rows per block of parquet

UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One text. `id` is where it came from: `path:record`, records counted from 1."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Reject:
    """One record that is not a usable text. `reason` is one of few fixed strings, so that it can be counted."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive raw records of one file, the first being number `first` (from 1). `is_json`: lines, not texts."""

    path: str
    first: int
    records: list[bytes | None]
    is_json: bool


def file_suffix(path: str | Path) -> str:
    """The supported suffix that the file's name ends in.

    Raises:
        ValueError: an unsupported name, with the supported ones.
    """
    for suffix in SUFFIXES:
        if Path(path).name.endswith(suffix):
            return suffix
    raise ValueError(f"{path}: unsupported file type; supported are {', '.join(SUFFIXES)}")


def read_documents(path: str | Path, text_field: str = "text") -> Iterator[Document | Reject]:
    """All records of a file in order.

    Raises:
        FileNotFoundError, ValueError: the file is missing, unsupported, damaged, or parquet without the field.
    """
    for block in read_blocks(path, text_field):
        yield from block_documents(block, text_field)


def read_blocks(path: str | Path, text_field: str = "text") -> Iterator[Block]:
    """The raw records of a file in order, in blocks. Raises as `read_documents`."""
    suffix = file_suffix(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix == ".parquet":
        return _parquet_blocks(path, text_field)
    if suffix == ".txt":
        return iter([Block(str(path), 1, [Path(path).read_bytes().removeprefix(UTF8_BOM)], is_json=False)])
    return _line_blocks(path, suffix)


def block_documents(block: Block, text_field: str = "text") -> Iterator[Document | Reject]:
    """Decode a block: one Document or Reject per record."""
    for number, record in enumerate(block.records, block.first):
        location = f"{block.path}:{number}"
        text, reason = _decode_line(record, text_field) if block.is_json else _decode_text(record)
        yield Reject(location, reason) if reason else Document(location, text)


def _decode_text(record: bytes | None) -> tuple[str, str]:
    """(text, "") or ("", reason) of a raw text."""
    if record is None:
        return "", "text is not a string"
    try:
        text = record.decode()
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    return _check_text(text)


def _decode_line(record: bytes | None, text_field: str) -> tuple[str, str]:
    """(text, "") or ("", reason) of a line of JSON."""
    try:
        line = (record or b"").decode()
    except UnicodeDecodeError:
        return "", "invalid UTF-8"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return "", "invalid JSON" if line.strip() else "blank line"
    if not isinstance(value, dict):
        return "", "not a JSON object"
    if text_field not in value:
        return "", "no text field"
    text = value[text_field]
    if not isinstance(text, str):
        return "", "text is not a string"
    return _check_text(text)


def _check_text(text: str) -> tuple[str, str]:
    if not text or text.isspace():
        return "", "empty text"
    if "\0" in text:
        return "", "NUL character"
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON's "\ud800" is a legal escape for something that is not a character
            return "", "invalid UTF-8"
    return text, ""


def _line_blocks(path: str | Path, suffix: str) -> Iterator[Block]:
    """Complete lines, about BLOCK_BYTES per block; a longer line is a block of its own."""
    number = 1
    pending: list[bytes] = []  # parts of a line whose end has not come
    for chunk in _checked_chunks(path, suffix):
        pending.append(chunk)
        if b"\n" in chunk:
            lines = b"".join(pending).split(b"\n")
            pending = [lines.pop()]
            yield Block(str(path), number, _without_bom(lines, number), is_json=True)
            number += len(lines)
    if any(pending):
        yield Block(str(path), number, _without_bom([b"".join(pending)], number), is_json=True)


def _without_bom(lines: list[bytes], number: int) -> list[bytes | None]:
    if number == 1:
        lines[0] = lines[0].removeprefix(UTF8_BOM)
    return list(lines)


def _checked_chunks(path: str | Path, suffix: str) -> Iterator[bytes]:
    """Decompressed bytes of a file; damage is a ValueError that names it."""
    import zstandard

    chunks = {".jsonl": _plain_chunks, ".jsonl.gz": _gzip_chunks, ".jsonl.zst": _zstd_chunks}[suffix]
    try:
        yield from chunks(path)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged or cut {suffix} file ({error})") from None


def _plain_chunks(path: str | Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk


def _gzip_chunks(path: str | Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as file:
        while chunk := file.read(BLOCK_BYTES):
            yield chunk


def _zstd_chunks(path: str | Path) -> Iterator[bytes]:
    """All frames of the file. The library's own stream reader ends silently in the middle of a cut frame."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # also what `zstd --long=31` wrote
    frame = None
    with open(path, "rb") as file:
        while data := file.read(BLOCK_BYTES // 4):
            while data:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
    if frame is not None:
        raise EOFError("the last frame is incomplete")


def _parquet_blocks(path: str | Path, text_field: str) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            field = _parquet_field(path, file.schema_arrow, text_field)
            number = 1
            for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=[field]):
                # Arrow does not promise that a string column is valid UTF-8: decode as all other texts are.
                column = batch.column(0)
                binary = pyarrow.large_binary() if "large" in str(column.type) else pyarrow.binary()
                records = column.cast(binary).to_pylist()
                yield Block(str(path), number, records, is_json=False)
                number += len(records)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged or not a parquet file ({error})") from None


def _parquet_field(path: str | Path, schema: Any, text_field: str) -> str:
    names = list(schema.names)
    if text_field not in names:
        raise ValueError(f"{path}: no column {text_field!r}; the file has {', '.join(map(repr, names))}")
    kind = str(schema.field(text_field).type)
    if kind not in ("string", "large_string", "binary", "large_binary"):
        raise ValueError(f"{path}: column {text_field!r} has type {kind}, expected string or binary")
    return text_field


def check_inputs(files: Iterable[str | Path]) -> list[Path]:
    """The input files, checked before any work: given, present, of a supported type, none twice.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("no input files given")
    seen: set[Path] = set()
    for path in paths:
        file_suffix(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.resolve() in seen:
            raise ValueError(f"{path}: given twice; its documents would be counted twice")
        seen.add(path.resolve())
    return paths
