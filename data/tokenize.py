"""Tokenising: text files -> a token store, in parallel. May touch the input files, the tokenizer and the output folder.

The parent reads raw blocks, worker processes decode and encode them, the parent writes what comes back in input order:
the bytes written are those of one long loop over the documents, whatever the number of workers. The store is built
under a temporary name and published by one rename (`files.atomic_folder`); its manifest is written last.

A store folder holds
- `tokens-00000.bin`: ids, little-endian u16 if the vocabulary has at most 65,536 ids, else u32; whole documents only;
- `tokens-00000.offsets.npy`: u64 [documents + 1], document i of the shard is tokens [offsets[i], offsets[i+1]);
- `rejects.jsonl`: every rejected record as {"id", "reason"};
- `manifest.json`.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .files import atomic_folder, check_absent, hash_inputs, make_manifest, usable_cores, write_manifest
from .readers import Block, Reject, block_documents, check_inputs, read_blocks
from .tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer

STORE_KIND = "token_store"
REJECTS = "rejects.jsonl"
SHARD_TOKENS = 1 << 28  # half a GiB of u16, one GiB of u32
REJECT_EXAMPLES = 5  # per reason in the manifest; all of them are in rejects.jsonl
BATCH_DOCUMENTS = 64  # texts per call of the library

Progress = Callable[[int, int], None]


def tokenize_files(
    files: Sequence[str | Path],
    tokenizer_folder: str | Path,
    out: str | Path,
    *,
    text_field: str = "text",
    bos: bool | str = "auto",
    eos: bool | str = True,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build a token store from text files and return its manifest.

    Args:
        files: input files, in the order in which their documents are stored (suffixes: `readers.SUFFIXES`).
        tokenizer_folder: a model folder; its tokenizer encodes plain text, literal special tokens stay text.
        out: the store's folder; must not exist or be empty.
        text_field: key or column that holds the text; not used for .txt.
        bos: put BOS before each document: True, False, or "auto" = as the tokenizer's own default does.
        eos: put EOS after each document: True, False, or the string of another token to use in its place (an instruct
            model's EOS may end a turn, not a document).
        workers: processes that encode, default one per usable core; 1 encodes in this process. Other numbers start
            processes by `spawn`: a script that calls this needs the usual `if __name__ == "__main__":`.
        shard_tokens: a shard is closed before the document that would exceed this. A longer document gets its own.
        progress: called with the documents and tokens written so far, now and then.

    Raises:
        FileNotFoundError, ValueError: missing, damaged or unsupported input; no usable document; a token that the
            tokenizer does not have. Nothing is left at `out`.
        FileExistsError: `out` holds something already.
        OSError: writing failed (disk full, ...), naming `out`. Nothing is left at `out`.
    """
    paths = check_inputs(files)
    check_absent(out)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens is {shard_tokens}, must be at least 1")
    workers = usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}, must be at least 1")
    tokenizer = load_tokenizer(tokenizer_folder)
    bos_id, eos_id = _document_marks(tokenizer, bos, eos)
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 1 << 16 else np.dtype("<u4")
    job = _Job(str(tokenizer_folder), text_field, bos_id, eos_id, dtype.str)

    try:
        with atomic_folder(out) as folder, _ShardWriter(folder, dtype, shard_tokens) as writer:
            tallies = [_FileTally(str(path)) for path in paths]
            blocks = ((index, block) for index, path in enumerate(paths) for block in read_blocks(path, text_field))
            with contextlib.closing(_encode_in_order(blocks, job, tokenizer, workers)) as results:
                for index, encoded in results:
                    writer.add(encoded)
                    tallies[index].add(encoded)
                    if progress is not None:
                        progress(writer.num_docs, writer.num_tokens)
            shards = writer.close()
            manifest = _make_manifest(tokenizer, job, shard_tokens, tallies, shards, writer)
            if writer.num_docs == 0:
                raise ValueError(f"{out}: not one usable document in the input; rejected: {manifest['rejects']}")
            write_manifest(folder, manifest)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"{out}: a tokenising process died; the store was not written. Was it killed for lack of memory, or does "
            "the script that called this lack `if __name__ == '__main__':`?"
        ) from error
    except OSError as error:
        if error.filename is None:  # a failed write does not know what it was writing
            raise OSError(error.errno, f"writing the token store failed: {error.strerror}", str(out)) from error
        raise
    return manifest


def _document_marks(tokenizer: Tokenizer, bos: bool | str, eos: bool | str) -> tuple[int | None, int | None]:
    """The ids to put before and after each document, None for none."""
    if bos not in (True, False, "auto"):
        raise ValueError(f"bos is {bos!r}, must be True, False or 'auto'")
    with_bos = tokenizer.adds_bos if bos == "auto" else bos
    if with_bos and tokenizer.bos_id is None:
        raise ValueError(f"{tokenizer.folder}: bos=True, but the tokenizer has no BOS token")
    if isinstance(eos, str):
        eos_id: int | None = tokenizer.token_id(eos)
    else:
        eos_id = tokenizer.eos_id if eos else None
        if eos and eos_id is None:
            raise ValueError(f"{tokenizer.folder}: eos=True, but the tokenizer has no EOS token; name one or use False")
    return (tokenizer.bos_id if with_bos else None), eos_id


# ---- encoding ----


@dataclass(frozen=True, slots=True)
class _Job:
    """All that an encoding process must know."""

    tokenizer_folder: str
    text_field: str
    bos_id: int | None
    eos_id: int | None
    dtype: str


@dataclass(slots=True)
class _Encoded:
    """A block's documents as ids: `tokens` (raw bytes of the store's dtype), `lengths` i64, and its rejects."""

    tokens: bytes
    lengths: np.ndarray
    rejects: list[Reject]
    num_records: int
    text_bytes: int
    max_token: int


def _encode_block(block: Block, job: _Job, tokenizer: Tokenizer) -> _Encoded:
    texts: list[str] = []
    ids_of: list[str] = []
    rejects: list[Reject] = []
    for item in block_documents(block, job.text_field):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            texts.append(item.text)
            ids_of.append(item.id)
    before = [] if job.bos_id is None else [job.bos_id]
    after = [] if job.eos_id is None else [job.eos_id]
    flat: list[int] = []
    lengths: list[int] = []
    arrays: list[np.ndarray] = []
    text_bytes = 0
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[start : start + BATCH_DOCUMENTS]
        for id, text, ids in zip(ids_of[start:], batch, tokenizer.encode_batch(batch)):
            if not ids:  # a text of nothing but characters that the tokenizer's normaliser removes
                rejects.append(Reject(id, "no tokens"))
                continue
            flat += before
            flat += ids
            flat += after
            lengths.append(len(before) + len(ids) + len(after))
            text_bytes += len(text) if text.isascii() else len(text.encode())
        arrays.append(np.array(flat, job.dtype))
        flat.clear()
    tokens = np.concatenate(arrays) if arrays else np.empty(0, job.dtype)
    max_token = int(tokens.max(initial=0))
    assert max_token < tokenizer.vocab_size
    return _Encoded(
        tokens.tobytes(),
        np.array(lengths, np.int64),
        rejects,
        len(block.records),
        text_bytes,
        max_token,
    )


def _encode_in_order(
    blocks: Iterator[tuple[int, Block]], job: _Job, tokenizer: Tokenizer, workers: int
) -> Generator[tuple[int, _Encoded]]:
    """(file index, encoded block) in the order of `blocks`, with at most a few blocks per worker in flight."""
    if workers == 1:
        for index, block in blocks:
            yield index, _encode_block(block, job, tokenizer)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (job,))
    waiting: collections.deque[tuple[int, Future[_Encoded]]] = collections.deque()
    try:
        for index, block in blocks:
            waiting.append((index, pool.submit(_work, block)))
            if len(waiting) > 3 * workers:
                index, future = waiting.popleft()
                yield index, future.result()
        while waiting:
            index, future = waiting.popleft()
            yield index, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_job: _Job
_worker_tokenizer: Tokenizer


def _start_worker(job: _Job) -> None:
    """Runs once in each worker: one core per process, Ctrl-C is the parent's affair, and no life after the parent's."""
    global _worker_job, _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker_job = job
    _worker_tokenizer = load_tokenizer(job.tokenizer_folder)


def _die_with_parent() -> None:
    # A killed parent closes no queue: its workers would wait for work for ever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _work(block: Block) -> _Encoded:
    return _encode_block(block, _worker_job, _worker_tokenizer)


# ---- writing ----


class _ShardWriter:
    """Writes documents to shards in order, hashing as it goes. A context manager, so that no file stays open."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int) -> None:
        self.folder = folder
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.num_docs = 0
        self.num_tokens = 0
        self.max_token = 0
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._lengths: list[np.ndarray] = []
        self._shard_size = 0
        self._hash = hashlib.sha256()
        self._rejects = open(folder / REJECTS, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._rejects):
            if file is not None and not file.closed:
                with contextlib.suppress(OSError):  # a full disk again; the first error is on its way already
                    file.close()

    def add(self, encoded: _Encoded) -> None:
        for reject in encoded.rejects:
            self._rejects.write(json.dumps({"id": reject.id, "reason": reject.reason}, ensure_ascii=False) + "\n")
        data = memoryview(encoded.tokens)
        ends = np.cumsum(encoded.lengths)
        first = 0
        while first < len(ends):
            base = int(ends[first - 1]) if first else 0
            # As many whole documents as the open shard takes; an empty shard takes at least one.
            last = int(np.searchsorted(ends, base + self.shard_tokens - self._shard_size, side="right"))
            if self._shard_size == 0:
                last = max(last, first + 1)
            if last > first:
                self._write(data[base * self.dtype.itemsize : int(ends[last - 1]) * self.dtype.itemsize])
                self._lengths.append(encoded.lengths[first:last])
                self._shard_size += int(ends[last - 1]) - base
                first = last
            if first < len(ends):
                self._finish_shard()
        self.num_docs += len(encoded.lengths)
        self.num_tokens += int(encoded.lengths.sum())
        self.max_token = max(self.max_token, encoded.max_token)

    def _write(self, data: memoryview) -> None:
        if self._file is None:
            self._file = open(self.folder / shard_name(len(self._shards)), "wb")  # noqa: SIM115
        self._file.write(data)
        self._hash.update(data)

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        offsets = np.zeros(sum(map(len, self._lengths)) + 1, np.uint64)
        np.cumsum(np.concatenate(self._lengths), out=offsets[1:])
        name = shard_name(len(self._shards))
        npy = io.BytesIO()
        np.save(npy, offsets)
        (self.folder / offsets_name(name)).write_bytes(npy.getbuffer())
        self._shards.append(
            {
                "file": name,
                "docs": len(offsets) - 1,
                "tokens": self._shard_size,
                "sha256": self._hash.hexdigest(),
                "offsets_sha256": hashlib.sha256(npy.getbuffer()).hexdigest(),
            }
        )
        self._file, self._lengths, self._shard_size, self._hash = None, [], 0, hashlib.sha256()

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; the shards' entries for the manifest."""
        self._finish_shard()
        self._rejects.close()
        return self._shards


def shard_name(index: int) -> str:
    return f"tokens-{index:05d}.bin"


def offsets_name(shard: str) -> str:
    return shard.removesuffix(".bin") + ".offsets.npy"


@dataclass(slots=True)
class _FileTally:
    """What became of one input file's records."""

    path: str
    records: int = 0
    docs: int = 0
    tokens: int = 0
    text_bytes: int = 0
    rejects: collections.Counter[str] = field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, encoded: _Encoded) -> None:
        self.records += encoded.num_records
        self.docs += len(encoded.lengths)
        self.tokens += int(encoded.lengths.sum())
        self.text_bytes += encoded.text_bytes
        for reject in encoded.rejects:
            self.rejects[reject.reason] += 1
            examples = self.examples.setdefault(reject.reason, [])
            if len(examples) < REJECT_EXAMPLES:
                examples.append(reject.id)


def _make_manifest(
    tokenizer: Tokenizer,
    job: _Job,
    shard_tokens: int,
    tallies: list[_FileTally],
    shards: list[dict[str, Any]],
    writer: _ShardWriter,
) -> dict[str, Any]:
    rejects: dict[str, dict[str, Any]] = {}
    for tally in tallies:
        for reason, count in tally.rejects.items():
            entry = rejects.setdefault(reason, {"count": 0, "examples": []})
            entry["count"] += count
            entry["examples"] = (entry["examples"] + tally.examples[reason])[:REJECT_EXAMPLES]
    num_records = sum(tally.records for tally in tallies)
    num_rejects = sum(entry["count"] for entry in rejects.values())
    assert num_records == writer.num_docs + num_rejects, "a document was lost"
    hashes = hash_inputs(tally.path for tally in tallies)
    tokenizer_files = [Path(job.tokenizer_folder) / name for name in TOKENIZER_FILES]
    return make_manifest(
        STORE_KIND,
        inputs={**hashes, **hash_inputs(path for path in tokenizer_files if path.is_file())},
        config={"text_field": job.text_field, "shard_tokens": shard_tokens},
        figures={
            "records": num_records,
            "docs": writer.num_docs,
            "rejects": num_rejects,
            "tokens": writer.num_tokens,
            "text_bytes": sum(tally.text_bytes for tally in tallies),
        },
        dtype={"<u2": "uint16", "<u4": "uint32"}[job.dtype],
        vocab_size=tokenizer.vocab_size,
        max_token=writer.max_token,
        tokenizer={
            "folder": job.tokenizer_folder,
            "fingerprint": tokenizer.fingerprint,
            "library": tokenizer.library,
            "bos_id": job.bos_id,
            "eos_id": job.eos_id,
        },
        shards=shards,
        files=[
            {"path": tally.path, "records": tally.records, "docs": tally.docs, "tokens": tally.tokens}
            for tally in tallies
        ],
        rejects=rejects,
    )
