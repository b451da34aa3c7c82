"""Looking into a token store: what `steep data inspect` prints. May touch the store and its tokenizer, read only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .packing import pack_best_fit, pack_concat
from .store import TokenStore
from .tokenizer import load_tokenizer

QUANTILES = (0, 1, 10, 25, 50, 75, 90, 99, 100)
SHOWN_TOKENS = 200


def inspect_store(
    path: str | Path, seq_len: int | None = None, doc: int | None = None, tokenizer_folder: str | Path | None = None
) -> dict[str, Any]:
    """Figures of a store as a JSON-able dict.

    Args:
        seq_len: also pack at this sequence length, both ways, and report padding and cut documents.
        doc: also decode the first tokens of this document.
        tokenizer_folder: where to find the tokenizer for that; by default where it was when the store was made.

    Raises:
        FileNotFoundError, ValueError: the store does not open, no such document, or the tokenizer is another one.
    """
    store = TokenStore(path)
    manifest = store.manifest
    report: dict[str, Any] = {
        "store": str(path),
        "documents": store.num_docs,
        "tokens": store.num_tokens,
        "bytes_per_token": manifest["figures"]["text_bytes"] / store.num_tokens,
        "dtype": manifest["dtype"],
        "vocab_size": store.vocab_size,
        "tokenizer": manifest["tokenizer"],
        "shards": len(manifest["shards"]),
        "files": manifest["files"],
        "rejects": manifest["rejects"],
        "document_tokens": {
            "mean": store.num_tokens / store.num_docs,
            **{f"p{q}": int(value) for q, value in zip(QUANTILES, np.percentile(store.lengths, QUANTILES))},
        },
    }
    if seq_len is not None:
        packings = {"best_fit": pack_best_fit(store.lengths, seq_len), "concat": pack_concat(store.lengths, seq_len)}
        report["packing"] = {name: index.stats() for name, index in packings.items()}
    if doc is not None:
        if not 0 <= doc < store.num_docs:
            raise ValueError(f"{path}: no document {doc}; the store has documents 0 to {store.num_docs - 1}")
        tokenizer = load_tokenizer(tokenizer_folder or manifest["tokenizer"]["folder"])
        store.check_model(tokenizer.vocab_size, tokenizer.fingerprint)
        tokens = store.read(doc, 0, min(SHOWN_TOKENS, int(store.lengths[doc])))
        report["document"] = {
            "number": doc,
            "origin": store.origin(doc),
            "tokens": int(store.lengths[doc]),
            "first_ids": tokens.tolist(),
            "first_text": tokenizer.decode(tokens.tolist(), skip_special=False),
        }
    return report
