"""Batches: packed sequences of one or several token stores as numpy arrays that a decoder takes as they are.

`BatchLoader` is for training (mixed, shuffled, endless), `SequentialLoader` for validation (everything once, in order).
Both are random access: `batch_at(first, count)` is a pure function of its arguments, so a rank, a micro-step or a
restart asks for its samples by number and keeps no state. May touch the token stores, read only.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .files import sha256_json
from .order import Order, Phase
from .packing import PackingIndex, pack
from .store import TokenStore

if TYPE_CHECKING:
    from .config import DataConfig

IGNORE = -100  # label of a position without a target

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """`seqs` packed sequences laid end to end, T = seqs * seq_len positions.

    Attributes:
        tokens: i64 [T].
        labels: i64 [T], the next token of the same piece; IGNORE at the last token of every piece and in padding. So no
            target lies in another document, and the first token of a piece is nobody's target.
        positions: i32 [T], from 0 within each piece.
        cu_seqlens: i32 [N + 1], piece i is [cu_seqlens[i], cu_seqlens[i + 1]); the padding of a sequence is a piece of
            its own. Of a length that the loader fixes, filled up by repeating T (pieces of length 0).
        max_seqlen: seq_len; no piece is longer, and a constant compiles once.
        source_ids: i32 [N], the source of each piece; -1 for padding and for pieces of length 0.
        num_valid: how many labels are targets.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    max_seqlen: int
    source_ids: np.ndarray
    num_valid: int


@dataclass(frozen=True)
class Source:
    """A token store in a mixture. `weight` is its share of the sequences, relative to the other sources' weights."""

    name: str
    store: str | Path | TokenStore
    weight: float = 1.0
    max_epochs: float | None = None


class _PackedStore:
    """A store with its packing."""

    def __init__(self, store: str | Path | TokenStore, seq_len: int, packing: str) -> None:
        self.store = store if isinstance(store, TokenStore) else TokenStore(store)
        self.index: PackingIndex = pack(self.store.lengths, seq_len, packing)

    def pieces(self, seq: int) -> Iterator[tuple[int, int, int]]:
        """(document, start, length) of the pieces of a sequence."""
        rows = slice(self.index.seq_ptr[seq], self.index.seq_ptr[seq + 1])
        return zip(self.index.doc[rows].tolist(), self.index.start[rows].tolist(), self.index.length[rows].tolist())

    def num_valid(self, seq: int) -> int:
        """Targets of a sequence: every token of a piece but its first."""
        rows = slice(self.index.seq_ptr[seq], self.index.seq_ptr[seq + 1])
        return int(self.index.length[rows].sum()) - (rows.stop - rows.start)

    def identity(self) -> list[str]:
        """Checksums of the tokens and of the boundaries."""
        return [shard[key] for shard in self.store.manifest["shards"] for key in ("sha256", "offsets_sha256")]


class BatchLoader:
    """Batches of a mixture of sources, in the order of `order.Order`.

    Sample p is one packed sequence, the same for every world size. For global batches of `G = micro_batches *
    world_size * seqs_per_batch` samples, rank r's micro-batch m of step s is
    `batch_at(s * G + (m * world_size + r) * seqs_per_batch)`.

    Attributes:
        seq_len, seqs_per_batch: tokens per sequence, sequences per batch.
        source_names: in the order of `PackedBatch.source_ids`.
        order: the `Order`. stores: the `TokenStore` of each source. packings: the `PackingIndex` of each.
        fingerprint: SHA-256 of everything that decides the samples.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seqs_per_batch: int,
        seed: int = 0,
        packing: str = "best_fit",
        phases: Sequence[Phase] = (),
        skip_samples: Iterable[int] = (),
    ) -> None:
        """Opens the stores and packs them (seconds per million documents).

        Args:
            sources: their weights hold from sample 0 on.
            phases: later changes of the weights, one weight per source.
            skip_samples: numbers of samples that are replaced by padding without targets; all others stay where they
                are.

        Raises:
            FileNotFoundError, ValueError: a store that does not open, stores of different tokenizers, or a mixture that
                `Order` refuses.
        """
        if not sources:
            raise ValueError("no data source given")
        self.seq_len, self.seqs_per_batch, self.seed, self.packing = seq_len, seqs_per_batch, seed, packing
        self.source_names = [source.name for source in sources]
        self._packed = [_PackedStore(source.store, seq_len, packing) for source in sources]
        self.stores = [packed.store for packed in self._packed]
        self.packings = [packed.index for packed in self._packed]
        for store in self.stores[1:]:
            store.check_model(self.stores[0].vocab_size, self.stores[0].tokenizer_fingerprint)
        self.order = Order(
            self.source_names,
            [packed.index.num_seqs for packed in self._packed],
            [Phase(0, tuple(source.weight for source in sources)), *phases],
            seed,
            [source.max_epochs for source in sources],
        )
        self.skip_samples = frozenset(skip_samples)
        self._assembler = _Assembler(self._packed, seq_len)

    @classmethod
    def from_config(cls, config: DataConfig, seqs_per_batch: int) -> BatchLoader:
        """The loader that a recipe's `data` section describes."""
        sources = [Source(source.name, source.store, source.weight, source.max_epochs) for source in config.sources]
        phases = [
            Phase(phase.start, tuple(phase.weights.get(source.name, 0.0) for source in sources))
            for phase in config.phases
        ]
        skipped = (p for first, last in config.skip_samples for p in range(first, last + 1))
        return cls(sources, config.seq_len, seqs_per_batch, config.seed, config.packing, phases, skipped)

    def batch_at(self, first_sample: int, count: int | None = None) -> PackedBatch:
        """Samples first_sample .. first_sample + count - 1; `count` is `seqs_per_batch` by default."""
        count = self.seqs_per_batch if count is None else count
        return self._assembler.assemble([self._sequence(p) for p in range(first_sample, first_sample + count)])

    def num_valid(self, first_sample: int, count: int) -> int:
        """Targets in these samples, from the packing alone: what every rank divides its loss by."""
        sequences = (self._sequence(p) for p in range(first_sample, first_sample + count))
        return sum(self._packed[source].num_valid(seq) for source, seq in filter(None, sequences))

    def _sequence(self, sample: int) -> tuple[int, int] | None:
        """(source, sequence) of a sample; None if it is skipped."""
        if sample in self.skip_samples:
            return None
        source, _, seq = self.order(sample)
        return source, seq

    def check_model(self, vocab_size: int, fingerprint: str | None = None) -> None:
        """`TokenStore.check_model` of every source."""
        for store in self.stores:
            store.check_model(vocab_size, fingerprint)

    @property
    def fingerprint(self) -> str:
        return self.fingerprint_at(None)

    def fingerprint_at(self, num_samples: int | None) -> str:
        """SHA-256 of what decides the first `num_samples` samples (None: all). A checkpoint after p samples may go on
        with any loader of the same `fingerprint_at(p)`, such as one with a phase appended at p or later."""
        phases = [phase for phase in self.order.phases if num_samples is None or phase.start < max(1, num_samples)]
        skipped = sorted(p for p in self.skip_samples if num_samples is None or p < num_samples)
        used = [i for i in range(len(self._packed)) if any(phase.weights[i] > 0 for phase in phases)]
        return sha256_json(
            {
                "seq_len": self.seq_len,
                "seed": self.seed,
                "packing": self.packing,
                "sources": [[self.source_names[i], self._packed[i].identity()] for i in used],
                "phases": [[phase.start, [float(phase.weights[i]) for i in used]] for phase in phases],
                **({"skipped": skipped} if skipped else {}),
            }
        )


class SequentialLoader:
    """Every sequence of one store once, in the packing's order; for validation.

    Attributes:
        num_seqs, num_batches: sequences, and batches of `seqs_per_batch` that hold them all.
    """

    def __init__(
        self,
        store: str | Path | TokenStore,
        seq_len: int,
        seqs_per_batch: int,
        packing: str = "best_fit",
        name: str = "validation",
    ) -> None:
        self.name, self.seq_len, self.seqs_per_batch = name, seq_len, seqs_per_batch
        self._packed = _PackedStore(store, seq_len, packing)
        self.store = self._packed.store
        self.num_seqs = self._packed.index.num_seqs
        self.num_batches = -(-self.num_seqs // seqs_per_batch)
        self._assembler = _Assembler([self._packed], seq_len)

    def batch_at(self, first_seq: int, count: int | None = None) -> PackedBatch:
        """Sequences first_seq ..; places beyond the last sequence are filled with padding that has no targets."""
        count = self.seqs_per_batch if count is None else count
        seqs = range(first_seq, first_seq + count)
        return self._assembler.assemble([(0, seq) if seq < self.num_seqs else None for seq in seqs])

    def __iter__(self) -> Iterator[PackedBatch]:
        return (self.batch_at(batch * self.seqs_per_batch) for batch in range(self.num_batches))


class _Assembler:
    """Sequences of packed stores -> one PackedBatch."""

    def __init__(self, packed: Sequence[_PackedStore], seq_len: int) -> None:
        self.packed, self.seq_len = packed, seq_len
        self.pieces_per_seq = max(store.index.max_pieces for store in packed) + 1  # and one of padding

    def assemble(self, sequences: Sequence[tuple[int, int] | None]) -> PackedBatch:
        """(source, sequence) each; None is a sequence of padding."""
        total = len(sequences) * self.seq_len
        tokens = np.zeros(total, np.int64)
        labels = np.full(total, IGNORE, np.int64)
        starts: list[int] = []
        sources: list[int] = []
        num_valid = 0
        for nth, sequence in enumerate(sequences):
            at, end = nth * self.seq_len, (nth + 1) * self.seq_len
            if sequence is not None:
                source, seq = sequence
                for doc, start, length in self.packed[source].pieces(seq):
                    piece = self.packed[source].store.read(doc, start, length)
                    tokens[at : at + length] = piece
                    labels[at : at + length - 1] = piece[1:]
                    num_valid += length - 1
                    starts.append(at)
                    sources.append(source)
                    at += length
            if at < end:
                starts.append(at)
                sources.append(-1)
        pieces, size = len(starts), len(sequences) * self.pieces_per_seq
        cu_seqlens = np.full(size + 1, total, np.int32)
        cu_seqlens[:pieces] = starts
        source_ids = np.full(size, -1, np.int32)
        source_ids[:pieces] = sources
        lengths = np.diff(cu_seqlens[: pieces + 1])
        positions = np.arange(total, dtype=np.int32) - np.repeat(cu_seqlens[:pieces], lengths)
        return PackedBatch(tokens, labels, positions, cu_seqlens, self.seq_len, source_ids, num_valid)


def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[T]:
    """The same items, computed up to `depth` ahead by a thread. An error comes out where its item would have.

    Stopping early (a `break`, `close()`) stops the thread after the item that it is at.
    """
    ready: queue.Queue[tuple[bool, object]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, object]) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="steep prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if not more:
                if isinstance(value, BaseException):
                    raise value
                return
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def token_shares(loader: BatchLoader, num_samples: int) -> Mapping[str, float]:
    """The expected share of each source's tokens in the first samples: weights count sequences, padding differs."""
    filled = [index.length.sum(dtype=np.int64) / max(1, index.num_seqs) for index in loader.packings]
    tokens = loader.order.draws(num_samples) * np.array(filled)
    return dict(zip(loader.source_names, (tokens / max(1.0, tokens.sum())).tolist()))
