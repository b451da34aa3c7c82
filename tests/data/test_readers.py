"""Readers: every record is a document or a reject, in every format, and damage is never mistaken for the end."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data import Document, Reject, read_documents, readers

BAD_LINES = [
    (b'{"text": "good"}', None),
    (b'{"text": "caf\xe9"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "invalid UTF-8"),
    (b'{"text": "cut', "invalid JSON"),
    (b"[" * 100_000, "invalid JSON"),
    (b"", "blank line"),
    (b"   ", "blank line"),
    (b'["text"]', "not a JSON object"),
    (b'{"body": "x"}', "no text field"),
    (b'{"text": null}', "text is not a string"),
    (b'{"text": 3}', "text is not a string"),
    (b'{"text": ""}', "empty text"),
    (b'{"text": " \\n\\u00a0"}', "empty text"),
    (b'{"text": "a\\u0000b"}', "NUL character"),
    ('{"text": "größer 👍 \\ud83d\\udc4d"}'.encode(), None),
]


def compress(data: bytes, suffix: str) -> bytes:
    if suffix == ".jsonl.gz":
        return gzip.compress(data)
    if suffix == ".jsonl.zst":  # two frames, as concatenated files have
        half = len(data) // 2
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("final_newline", [True, False])
def test_every_line_is_a_document_or_a_reject(tmp_path: Path, suffix: str, final_newline: bool) -> None:
    data = b"\n".join(line for line, _ in BAD_LINES) + (b"\n" if final_newline else b"")
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(compress(data, suffix))
    items = list(read_documents(path))
    assert [item.reason if isinstance(item, Reject) else None for item in items] == [reason for _, reason in BAD_LINES]
    assert [item.id for item in items] == [f"{path}:{line}" for line in range(1, len(BAD_LINES) + 1)]
    assert items[0] == Document(f"{path}:1", "good")
    assert isinstance(items[-1], Document)
    assert items[-1].text == "größer 👍 👍"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_blocks_do_not_show(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {number} " + "word " * (number % 50) for number in range(500)] + ["x" * 5000]
    path = tmp_path / f"many{suffix}"
    path.write_bytes(compress("".join(json.dumps({"text": text}) + "\r\n" for text in texts).encode(), suffix))
    whole = list(read_documents(path))
    assert [item.text for item in whole if isinstance(item, Document)] == texts
    for block_bytes in (7, 100, 4096):
        monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
        assert list(read_documents(path)) == whole


LINE = st.one_of(
    st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
    st.recursive(st.none() | st.text() | st.floats(), lambda inner: st.dictionaries(st.just("text"), inner)).map(
        lambda value: json.dumps(value).encode()
    ),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lines=st.lists(LINE, max_size=20), block_bytes=st.integers(1, 200))
def test_no_line_is_ever_lost(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], block_bytes: int) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", block_bytes)
        items = list(read_documents(path))
    assert [item.id for item in items] == [f"{path}:{number}" for number in range(1, len(lines) + 1)]
    for item in items:
        if isinstance(item, Document):
            assert item.text.strip()
            assert item.text.encode().decode() == item.text


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.99])
def test_a_cut_compressed_file_is_an_error(tmp_path: Path, suffix: str, keep: float) -> None:
    data = compress("".join(json.dumps({"text": f"text {n * n}"}) + "\n" for n in range(5000)).encode(), suffix)
    path = tmp_path / f"cut{suffix}"
    # Not exactly between the two zstd frames: what is left would be a whole file.
    path.write_bytes(data[: int(len(data) * keep) - 3])
    with pytest.raises(ValueError, match=f"cut{suffix}: damaged or cut"):
        list(read_documents(path))


def test_garbage_in_a_compressed_file_is_an_error(tmp_path: Path) -> None:
    for suffix in (".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = tmp_path / f"garbage{suffix}"
        path.write_bytes(b"this is no such format at all " * 10)
        with pytest.raises(ValueError, match="garbage"):
            list(read_documents(path))


def test_txt_is_one_document_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfline one\r\n\r\nline two\n")
    assert list(read_documents(path)) == [Document(f"{path}:1", "line one\r\n\r\nline two\n")]
    path.write_bytes(b"")
    assert list(read_documents(path)) == [Reject(f"{path}:1", "empty text")]
    path.write_bytes("Text".encode("utf-16-le"))
    assert list(read_documents(path)) == [Reject(f"{path}:1", "NUL character")]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n{"text": "second"}\n')
    assert [item.text for item in read_documents(path) if isinstance(item, Document)] == ["first", "second"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    values: list[bytes | None] = [f"row {number} ü".encode() for number in range(200)]
    values[3], values[70], values[71], values[199] = None, b"", b"caf\xe9", b"a\0b"
    # As binary first: Arrow takes invalid UTF-8 for a string column, and so do the files in the wild.
    column = pa.array(values, pa.large_binary() if "large" in str(kind) else pa.binary()).view(kind)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": list(range(200)), "body": column}), path, row_group_size=90)
    items = list(read_documents(path, "body"))
    assert len(items) == 200
    rejects = {item.id: item.reason for item in items if isinstance(item, Reject)}
    assert rejects == {
        f"{path}:4": "text is not a string",
        f"{path}:71": "empty text",
        f"{path}:72": "invalid UTF-8",
        f"{path}:200": "NUL character",
    }
    assert items[100] == Document(f"{path}:101", "row 100 ü")


def test_parquet_without_the_field(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match="no column 'text'; the file has 'body', 'n'"):
        list(read_documents(path))
    with pytest.raises(ValueError, match="column 'n' has type int64"):
        list(read_documents(path, "n"))


def test_inputs_are_checked_first(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    assert readers.check_inputs([path]) == [path]
    with pytest.raises(ValueError, match="no input files"):
        readers.check_inputs([])
    with pytest.raises(FileNotFoundError, match="b.txt"):
        readers.check_inputs([path, tmp_path / "b.txt"])
    with pytest.raises(ValueError, match=r"a.csv: unsupported file type; supported are \.jsonl"):
        readers.check_inputs([tmp_path / "a.csv"])
    with pytest.raises(ValueError, match="given twice"):
        readers.check_inputs([path, tmp_path / ".." / tmp_path.name / "a.txt"])
