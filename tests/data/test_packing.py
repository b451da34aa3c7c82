"""Packing: equal to a brute-force best fit piece by piece, every token in exactly one piece."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steep.data import PackingIndex, pack_best_fit, pack_concat

LENGTHS = st.lists(st.integers(1, 40), max_size=80).map(lambda values: np.array(values, np.int64))


def brute_force(lengths: np.ndarray, seq_len: int) -> list[list[tuple[int, int, int]]]:
    """Best-fit decreasing as its definition reads: one piece at a time, looking at every sequence."""
    pieces = [
        (doc, start, min(seq_len, length - start))
        for doc, length in enumerate(lengths.tolist())
        for start in range(0, length, seq_len)
    ]
    pieces.sort(key=lambda piece: -piece[2])
    sequences: list[list[tuple[int, int, int]]] = []
    free: list[int] = []
    free_since: list[int] = []
    for time, piece in enumerate(pieces):
        fitting = [s for s in range(len(sequences)) if free[s] >= piece[2]]
        if fitting:
            best = min(fitting, key=lambda s: (free[s], free_since[s]))
        else:
            best = len(sequences)
            sequences.append([])
            free.append(seq_len)
            free_since.append(time)
        sequences[best].append(piece)
        free[best] -= piece[2]
        free_since[best] = time
    return sequences


def as_lists(index: PackingIndex) -> list[list[tuple[int, int, int]]]:
    rows = list(zip(index.doc.tolist(), index.start.tolist(), index.length.tolist()))
    return [rows[a:b] for a, b in zip(index.seq_ptr, index.seq_ptr[1:])]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_best_fit_equals_brute_force(lengths: np.ndarray, seq_len: int) -> None:
    index = pack_best_fit(lengths, seq_len)
    if len(lengths):
        index.check(lengths)
    # Sequences are numbered in the order in which they are opened, by both.
    assert as_lists(index) == brute_force(lengths, seq_len)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_concat_is_the_stream_in_order(lengths: np.ndarray, seq_len: int) -> None:
    index = pack_concat(lengths, seq_len)
    if len(lengths):
        index.check(lengths)
    stream = [(doc, position) for doc, length in enumerate(lengths.tolist()) for position in range(length)]
    packed = [
        [(doc, start + i) for doc, start, length in rows for i in range(length)] for rows in as_lists(index)
    ]
    assert packed == [stream[at : at + seq_len] for at in range(0, len(stream), seq_len)]
    assert index.padding < seq_len


def test_types_and_stats() -> None:
    lengths = np.array([5, 10, 3, 25, 10, 7])
    best, concat = pack_best_fit(lengths, 10), pack_concat(lengths, 10)
    for index in (best, concat):
        assert (index.seq_ptr.dtype, index.doc.dtype, index.start.dtype, index.length.dtype) == (
            np.int64,
            np.int64,
            np.int64,
            np.int32,
        )
        assert index.stats()["tokens"] == 60
        assert index.stats()["docs"] == 6
    # Full: documents 1, 4, and two fragments of 3. Then 7 + 3, and 5 + 5.
    assert as_lists(best)[4:] == [[(5, 0, 7), (2, 0, 3)], [(0, 0, 5), (3, 20, 5)]]
    assert best.num_seqs == 6
    assert best.padding == 0
    assert best.stats()["docs_cut_necessarily"] == 1
    assert best.stats()["docs_cut_unnecessarily"] == 0
    # 0:5 1:10 2:3 3:25 4:10 5:7 -> cuts at 10, 20, 30, 40, 50 go through documents 1, 3 (at 18..43), 4 (43..53)
    assert concat.stats()["docs_cut_necessarily"] == 1
    assert concat.stats()["docs_cut_unnecessarily"] == 2
    assert concat.stats()["pieces_per_sequence_max"] == 3


def test_a_hundred_thousand_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 100_000).astype(np.int64) + 1
    for seq_len in (1024, 4096, 100_000):
        index = pack_best_fit(lengths, seq_len)
        index.check(lengths)
        assert index.stats()["docs_cut_unnecessarily"] == 0
        # No packing can do with fewer sequences than its tokens fill; best fit comes this close on such lengths.
        assert index.stats()["padding_percent"] < 0.1


def test_best_fit_does_not_depend_on_the_integer_type() -> None:
    lengths = np.array([3, 1, 4, 1, 5, 9, 2, 6] * 5)
    expected = as_lists(pack_best_fit(lengths, 10))
    assert as_lists(pack_best_fit(lengths.astype(np.uint16), 10)) == expected
    assert as_lists(pack_best_fit(lengths.astype(np.int32), 10)) == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        pack_best_fit(np.array([3, 0]), 10)
    with pytest.raises(ValueError, match="seq_len is 0"):
        pack_concat(np.array([3]), 0)
    assert pack_best_fit(np.array([], np.int64), 8).num_seqs == 0
    assert pack_concat(np.array([], np.int64), 8).num_seqs == 0
