"""Packing: document lengths -> which pieces of documents share a sequence. Pure functions; touches no files, no tokens.

A document longer than a sequence is split into full sequences and a remainder; nothing is ever truncated or dropped,
and every token of every document is in exactly one piece. Two ways:
- `pack_best_fit`: best-fit decreasing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830): no other
  document is cut, sequences end in a little padding;
- `pack_concat`: documents one after the other, cut wherever a sequence is full: no padding, many documents cut.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class PackingIndex:
    """Sequences as rows of pieces: sequence s holds the pieces seq_ptr[s] .. seq_ptr[s + 1], in this order.

    Attributes:
        seq_len: tokens that a sequence holds.
        seq_ptr: i64 [num_seqs + 1]. doc, start: i64 [pieces]. length: i32 [pieces].
            A piece is tokens [start, start + length) of a document.
    """

    seq_len: int
    seq_ptr: np.ndarray
    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def num_seqs(self) -> int:
        return len(self.seq_ptr) - 1

    @property
    def padding(self) -> int:
        """Positions that hold no token, over all sequences."""
        return self.num_seqs * self.seq_len - int(self.length.sum(dtype=np.int64))

    @property
    def max_pieces(self) -> int:
        """The most pieces in one sequence."""
        return int(np.diff(self.seq_ptr).max(initial=0))

    def stats(self) -> dict[str, Any]:
        """Figures of the packing. A cut is necessary if the document is longer than a sequence."""
        pieces_per_seq = np.diff(self.seq_ptr)
        num_docs = int(self.doc.max(initial=-1)) + 1
        pieces_per_doc = np.bincount(self.doc, minlength=num_docs)
        doc_length = np.bincount(self.doc, weights=self.length, minlength=num_docs)
        cut = pieces_per_doc > 1
        return {
            "seq_len": self.seq_len,
            "sequences": self.num_seqs,
            "tokens": int(self.length.sum(dtype=np.int64)),
            "padding": self.padding,
            "padding_percent": 100 * self.padding / max(1, self.num_seqs * self.seq_len),
            "docs": num_docs,
            "docs_cut_necessarily": int((cut & (doc_length > self.seq_len)).sum()),
            "docs_cut_unnecessarily": int((cut & (doc_length <= self.seq_len)).sum()),
            "pieces": len(self.doc),
            "pieces_per_sequence_mean": float(pieces_per_seq.mean()) if self.num_seqs else 0.0,
            "pieces_per_sequence_max": self.max_pieces,
        }

    def check(self, lengths: np.ndarray) -> None:
        """Assert what every packing promises: each token exactly once, no sequence too full or empty."""
        order = np.lexsort((self.start, self.doc))
        doc, start, length = self.doc[order], self.start[order], self.length[order].astype(np.int64)
        first = np.append(True, doc[1:] != doc[:-1])
        last = np.append(first[1:], True)
        assert (length > 0).all()
        assert np.array_equal(doc[first], np.arange(len(lengths))), "a document is missing"
        assert (start[first] == 0).all()
        assert (start[~first] == (start + length)[~last]).all(), "pieces overlap or leave a gap"
        assert np.array_equal((start + length)[last], lengths), "a document does not end where its last piece ends"
        filled = np.add.reduceat(self.length.astype(np.int64), self.seq_ptr[:-1])
        assert self.seq_ptr[0] == 0
        assert self.seq_ptr[-1] == len(self.doc)
        assert (np.diff(self.seq_ptr) > 0).all()
        assert (filled <= self.seq_len).all()


def pack(lengths: np.ndarray, seq_len: int, method: str) -> PackingIndex:
    """`pack_best_fit` or `pack_concat` by the names that recipes use: "best_fit", "concat"."""
    methods = {"best_fit": pack_best_fit, "concat": pack_concat}
    if method not in methods:
        raise ValueError(f"packing is {method!r}, must be one of {', '.join(methods)}")
    return methods[method](lengths, seq_len)


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> PackingIndex:
    """Best-fit decreasing, exactly: pieces from long to short (equal ones in document order), each into the sequence
    whose free space is the smallest that fits; of equally free ones, into the one that has been so for longest.

    All pieces of one length are placed together. If f is the smallest free space that fits length l, then each sequence
    with f free takes f // l such pieces before any other is touched (what is left of it is smaller than f, so it stays
    the best fit), and the sequences take their turns in order. So the loop runs over distinct lengths and distinct free
    spaces, a few thousand rounds at any number of documents, and numpy does the rest.

    Args:
        lengths: tokens per document, each at least 1.
        seq_len: tokens per sequence.
    """
    lengths = _checked(lengths, seq_len)
    doc, start, length = _split(lengths, seq_len)
    order = np.argsort(_sort_key(seq_len - length, seq_len), kind="stable")  # stable: ties stay in document order
    doc, start, length = doc[order], start[order], length[order]

    distinct, counts = np.unique(length, return_counts=True)
    # Sequences by free space; within one, in the order in which they came to have it, as arrays of sequence numbers.
    by_free: dict[int, deque[np.ndarray]] = {}
    free_spaces = 0  # bit f is set if a sequence has exactly f free
    num_seqs = 0
    placed: list[np.ndarray] = []  # sequence numbers of the pieces, in their sorted order

    for piece, remaining in zip(distinct[::-1].tolist(), counts[::-1].tolist()):
        while remaining:
            fitting = free_spaces >> piece
            if fitting:
                free = piece + (fitting & -fitting).bit_length() - 1
                queue = by_free[free]
                seqs = queue.popleft()
                if not queue:
                    free_spaces &= ~(1 << free)
            else:
                free = seq_len
                seqs = np.arange(num_seqs, num_seqs - (-remaining // (seq_len // piece)))
                num_seqs += len(seqs)
            each = free // piece
            full = min(len(seqs), remaining // each)
            placed.append(np.repeat(seqs[:full], each))
            remaining -= full * each
            changed = [(seqs[:full], free - each * piece)] if full else []
            seqs = seqs[full:]
            if len(seqs) and remaining:  # the pieces run out within this sequence
                placed.append(np.repeat(seqs[:1], remaining))
                changed.append((seqs[:1], free - remaining * piece))
                remaining, seqs = 0, seqs[1:]
            if len(seqs):
                by_free.setdefault(free, deque()).appendleft(seqs)
                free_spaces |= 1 << free
            for group, left in changed:
                if left:
                    by_free.setdefault(left, deque()).append(group)
                    free_spaces |= 1 << left

    seq = np.concatenate(placed) if placed else np.empty(0, np.int64)
    order = np.argsort(seq, kind="stable")
    seq_ptr = np.zeros(num_seqs + 1, np.int64)
    np.cumsum(np.bincount(seq, minlength=num_seqs), out=seq_ptr[1:])
    return PackingIndex(seq_len, seq_ptr, doc[order], start[order], length[order].astype(np.int32))


def pack_concat(lengths: np.ndarray, seq_len: int) -> PackingIndex:
    """Documents one after the other, a new sequence every `seq_len` tokens; only the last may have padding.

    Args:
        lengths: tokens per document, each at least 1.
        seq_len: tokens per sequence.
    """
    lengths = _checked(lengths, seq_len)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    doc_starts = ends - lengths
    piece_starts = np.union1d(doc_starts, np.arange(0, total, seq_len))
    doc = np.searchsorted(ends, piece_starts, side="right")
    length = np.diff(piece_starts, append=total).astype(np.int32)
    num_seqs = -(-total // seq_len)
    seq_ptr = np.searchsorted(piece_starts, np.arange(num_seqs + 1) * seq_len).astype(np.int64)
    return PackingIndex(seq_len, seq_ptr, doc, piece_starts - doc_starts[doc], length)


def _checked(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}, must be at least 1")
    lengths = np.asarray(lengths, np.int64)
    if lengths.ndim != 1 or (lengths < 1).any():
        raise ValueError("document lengths must be one-dimensional and at least 1")
    return lengths


def _split(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(document, start, length) of each document's full sequences and remainder, in document order."""
    pieces = -(-lengths // seq_len)
    doc = np.repeat(np.arange(len(lengths)), pieces)
    nth = np.arange(len(doc)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = nth * seq_len
    return doc, start, np.minimum(seq_len, lengths[doc] - start)


def _sort_key(key: np.ndarray, seq_len: int) -> np.ndarray:
    """The same key in 16 bits where it fits: numpy's stable sort is then a radix sort."""
    return key.astype(np.uint16) if seq_len <= 1 << 16 else key
