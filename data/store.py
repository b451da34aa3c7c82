"""The token store, read: ranges of documents' tokens by `pread`. May touch one store folder, read only.

`tokenize.py` says what the folder holds. Document boundaries come from the offsets; tokens are never scanned.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .files import MANIFEST, read_manifest, sha256_file
from .tokenize import REJECTS, STORE_KIND, offsets_name


class TokenStore:
    """An opened token store. Safe to share between threads, and to send to another process, which opens it anew.

    Attributes:
        num_docs, num_tokens: of the whole store.
        lengths: i64 [num_docs], tokens per document (at least 1), BOS and EOS included.
        dtype: of the tokens, little-endian u16 or u32.
        vocab_size: ids that the tokenizer has. tokenizer_fingerprint: see `Tokenizer.fingerprint`.
        manifest: `manifest.json` as it was written.
    """

    def __init__(self, path: str | Path) -> None:
        """Open and check structure and sizes, not checksums (`verify` does).

        Raises:
            FileNotFoundError: the manifest is missing (the store was never finished) or a file that it names is.
            ValueError: a file that contradicts the manifest: cut, of another length, offsets that do not ascend.
        """
        self._descriptors: list[int] = []
        self.path = Path(path)
        self.manifest = read_manifest(self.path, STORE_KIND)
        try:
            dtype = self.manifest["dtype"]
            self.vocab_size = int(self.manifest["vocab_size"])
            self.tokenizer_fingerprint = str(self.manifest["tokenizer"]["fingerprint"])
            shards = [(shard["file"], int(shard["docs"]), int(shard["tokens"])) for shard in self.manifest["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path / MANIFEST}: incomplete or malformed ({error!r})") from None
        if dtype not in ("uint16", "uint32"):
            raise ValueError(f"{self.path / MANIFEST}: dtype is {dtype!r}, expected 'uint16' or 'uint32'")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._files = [self.path / name for name, _, _ in shards]
        self._offsets = [self._read_offsets(*shard) for shard in shards]
        self._first_doc = [0]
        for offsets in self._offsets:
            self._first_doc.append(self._first_doc[-1] + len(offsets) - 1)
        self.num_docs = self._first_doc.pop()
        self.num_tokens = sum(tokens for _, _, tokens in shards)
        self.lengths = np.concatenate([np.diff(offsets) for offsets in self._offsets] or [np.empty(0, np.int64)])
        self._descriptors = [os.open(file, os.O_RDONLY) for file in self._files]

    def _read_offsets(self, name: str, docs: int, tokens: int) -> np.ndarray:
        """A shard's offsets as i64 [docs + 1], after checking both of its files against the manifest."""
        file, offsets_file = self.path / name, self.path / offsets_name(name)
        for path in (file, offsets_file):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing, though {MANIFEST} names it")
        size, expected = file.stat().st_size, tokens * self.dtype.itemsize
        if size != expected:
            raise ValueError(f"{file}: {size} bytes, but {MANIFEST} says {tokens} tokens = {expected} bytes")
        try:
            raw = np.load(offsets_file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{offsets_file}: cut or not a .npy file ({error})") from None
        if raw.shape != (docs + 1,) or raw.dtype != np.dtype("<u8"):
            raise ValueError(f"{offsets_file}: {raw.dtype} {raw.shape}, expected uint64 ({docs + 1},)")
        offsets = raw.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != tokens or not (np.diff(offsets) > 0).all():
            raise ValueError(f"{offsets_file}: offsets do not ascend from 0 to {tokens}")
        return offsets

    def read(self, doc: int, start: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [start, start + length) of a document (to its end by default), as an array of the store's dtype.

        Raises:
            IndexError: no such document, or a range beyond its end.
            ValueError: the file became shorter since it was opened.
        """
        if not 0 <= doc < self.num_docs:
            raise IndexError(f"{self.path}: document {doc} of {self.num_docs}")
        shard = bisect_right(self._first_doc, doc) - 1
        offsets = self._offsets[shard]
        index = doc - self._first_doc[shard]
        doc_length = int(offsets[index + 1] - offsets[index])
        length = doc_length - start if length is None else length
        if start < 0 or length < 0 or start + length > doc_length:
            raise IndexError(f"{self.path}: tokens {start}..{start + length} of document {doc}, which has {doc_length}")
        return self._pread(shard, int(offsets[index]) + start, length)

    def _pread(self, shard: int, start: int, length: int) -> np.ndarray:
        tokens = np.empty(length, self.dtype)
        buffer = tokens.view(np.uint8).data
        done = 0
        while done < len(buffer):
            read = os.preadv(self._descriptors[shard], [buffer[done:]], start * self.dtype.itemsize + done)
            if read == 0:
                raise ValueError(f"{self._files[shard]}: ends before token {start + length}; cut since it was opened")
            done += read
        return tokens

    def origin(self, doc: int) -> str:
        """Where a document came from: `path:record` of the input file, records counted from 1.

        Raises:
            IndexError: no such document.
        """
        if not 0 <= doc < self.num_docs:
            raise IndexError(f"{self.path}: document {doc} of {self.num_docs}")
        files = iter(self.manifest["files"])
        file = next(files)
        while doc >= file["docs"]:
            doc -= file["docs"]
            file = next(files)
        record = doc + 1
        for rejected in sorted(self._rejected_records(file["path"])):
            record += rejected <= record
        return f"{file['path']}:{record}"

    def _rejected_records(self, path: str) -> Iterator[int]:
        with open(self.path / REJECTS, encoding="utf-8") as lines:
            for line in lines:
                file, _, record = json.loads(line)["id"].rpartition(":")
                if file == path:
                    yield int(record)

    def check_model(self, vocab_size: int, fingerprint: str | None = None) -> None:
        """Refuse to feed this store to a model that it was not made for.

        Args:
            vocab_size: rows of the model's embedding (they may be more than the tokenizer's ids).
            fingerprint: `Tokenizer.fingerprint` of the model's own tokenizer, if it has one.

        Raises:
            ValueError: the store's tokenizer is another one, or has ids that the model has no row for.
        """
        if fingerprint is not None and fingerprint != self.tokenizer_fingerprint:
            raise ValueError(
                f"{self.path}: was made with another tokenizer than the model's: the store's has fingerprint "
                f"{self.tokenizer_fingerprint[:12]} (from {self.manifest['tokenizer'].get('folder')}), the model's "
                f"{fingerprint[:12]}; tokenize the text again with this model's folder"
            )
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"{self.path}: its tokenizer has {self.vocab_size} ids, the model's vocabulary {vocab_size}; "
                "tokenize the text again with this model's folder, or enlarge its embedding"
            )

    def verify(self) -> None:
        """Read everything: checksums of every shard, and every id within the vocabulary.

        Raises:
            ValueError: naming the first file that is not as it was written.
        """
        for shard, path in zip(self.manifest["shards"], self._files):
            for file, expected in (
                (path, shard["sha256"]),
                (self.path / offsets_name(path.name), shard["offsets_sha256"]),
            ):
                found = sha256_file(file)
                if found != expected:
                    raise ValueError(f"{file}: SHA-256 is {found}, {MANIFEST} says {expected}")
            tokens = np.memmap(path, self.dtype, "r")
            for start in range(0, len(tokens), 1 << 24):
                highest = int(tokens[start : start + (1 << 24)].max())
                if highest >= self.vocab_size:
                    raise ValueError(f"{path}: holds id {highest}, the vocabulary has {self.vocab_size}")

    def close(self) -> None:
        """Close the files. The store is not usable afterwards."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.path,)

    def __del__(self) -> None:
        self.close()
