"""Batches: exactly the documents' tokens, no target across a piece's end, the same samples for any world size."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from steep.data import (
    IGNORE,
    BatchLoader,
    PackedBatch,
    Phase,
    SequentialLoader,
    Source,
    TokenStore,
    prefetch,
    token_shares,
    tokenize_files,
)
from steep.data.config import DataConfig
from tests.data.samples import many_texts, write_jsonl

SEQ_LEN = 64


@pytest.fixture(scope="module")
def stores(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stores, with documents much longer than SEQ_LEN and one of a single token."""
    folder = tmp_path_factory.mktemp("stores")
    for seed, name in enumerate("ab"):
        file = write_jsonl(folder / f"{name}.jsonl", many_texts(40 - 25 * seed, seed))
        tokenize_files([file], bpe_folder, folder / name, workers=1, eos=False, shard_tokens=3000)
    return folder / "a", folder / "b"


def make_loader(stores: tuple[Path, Path], **options: object) -> BatchLoader:
    a, b = stores
    settings = {"seq_len": SEQ_LEN, "seqs_per_batch": 4, "seed": 5, **options}
    return BatchLoader([Source("a", a, 0.75), Source("b", b, 0.25)], **settings)  # type: ignore[arg-type]


def equal(one: PackedBatch, other: PackedBatch) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in PackedBatch.__dataclass_fields__)


def pieces(batch: PackedBatch) -> Iterator[tuple[int, slice]]:
    """(source, positions) of the pieces that are not padding."""
    for source, start, end in zip(batch.source_ids, batch.cu_seqlens, batch.cu_seqlens[1:]):
        if source >= 0:
            yield int(source), slice(int(start), int(end))


def check(batch: PackedBatch, seqs: int) -> None:
    """Everything that PackedBatch promises."""
    total = seqs * SEQ_LEN
    names = ("tokens", "labels", "positions", "cu_seqlens", "source_ids")
    assert [getattr(batch, name).dtype for name in names] == [np.int64, np.int64, np.int32, np.int32, np.int32]
    assert batch.tokens.shape == batch.labels.shape == batch.positions.shape == (total,)
    assert len(batch.cu_seqlens) == len(batch.source_ids) + 1
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, total)
    lengths = np.diff(batch.cu_seqlens)
    assert (lengths >= 0).all()
    assert lengths.max() <= batch.max_seqlen == SEQ_LEN
    assert isinstance(batch.max_seqlen, int)
    # No piece lies in two sequences; the starts of the sequences are starts of pieces.
    assert set(range(0, total, SEQ_LEN)) <= set(batch.cu_seqlens.tolist())
    expected = np.full(total, IGNORE)
    for start, length, source in zip(batch.cu_seqlens, lengths, batch.source_ids):
        piece = slice(start, start + length)
        assert np.array_equal(batch.positions[piece], np.arange(length))
        if source >= 0:
            expected[piece] = np.append(batch.tokens[piece][1:], IGNORE)
        else:
            assert (batch.tokens[piece] == 0).all()
    assert np.array_equal(batch.labels, expected)
    assert batch.num_valid == (expected != IGNORE).sum()


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_sequential_batches_hold_every_token_once(stores: tuple[Path, Path], packing: str) -> None:
    store = TokenStore(stores[0])
    loader = SequentialLoader(store, SEQ_LEN, 5, packing)
    index = loader._packed.index
    batches = list(loader)
    assert len(batches) == loader.num_batches == -(-loader.num_seqs // 5)
    assert len({len(batch.cu_seqlens) for batch in batches}) == 1
    for batch in batches:
        check(batch, 5)
    found = [batch.tokens[piece] for batch in batches for _, piece in pieces(batch)]
    rows = zip(index.doc.tolist(), index.start.tolist(), index.length.tolist())
    for piece, (doc, start, length) in itertools.zip_longest(found, rows):
        assert np.array_equal(piece, store.read(doc, start, length))
    assert sum(map(len, found)) == store.num_tokens
    assert sum(batch.num_valid for batch in batches) == store.num_tokens - len(found)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_mixed_batches(stores: tuple[Path, Path], packing: str) -> None:
    loader = make_loader(stores, packing=packing)
    batches = [loader.batch_at(first) for first in range(0, 200, 4)]
    for batch in batches:
        check(batch, 4)
    assert len({len(batch.cu_seqlens) for batch in batches}) == 1
    # The sequences are those that the order names.
    sequences = {source: list(SequentialLoader(stores[source], SEQ_LEN, 1, packing)) for source in (0, 1)}
    for p in range(200):
        source, _, seq = loader.order(p)
        here = slice(p % 4 * SEQ_LEN, (p % 4 + 1) * SEQ_LEN)
        for name in ("tokens", "labels", "positions"):
            assert np.array_equal(getattr(batches[p // 4], name)[here], getattr(sequences[source][seq], name))
        assert {found for found, piece in pieces(batches[p // 4]) if here.start <= piece.start < here.stop} == {source}
    assert loader.order.draws(200).tolist() == [150, 50]


def test_targets_are_counted_without_reading_tokens(stores: tuple[Path, Path]) -> None:
    loader = make_loader(stores)
    for first in range(0, 100, 4):
        assert loader.num_valid(first, 4) == loader.batch_at(first).num_valid


def test_skipped_samples_are_padding_and_move_no_other(stores: tuple[Path, Path]) -> None:
    loader, skipping = make_loader(stores), make_loader(stores, skip_samples=[5, 6])
    whole, holed = loader.batch_at(4), skipping.batch_at(4)
    check(holed, 4)
    hole, kept = slice(SEQ_LEN, 3 * SEQ_LEN), [*range(SEQ_LEN), *range(3 * SEQ_LEN, 4 * SEQ_LEN)]
    assert (holed.tokens[hole] == 0).all()
    assert (holed.labels[hole] == IGNORE).all()
    assert np.array_equal(holed.tokens[kept], whole.tokens[kept])
    assert np.array_equal(holed.labels[kept], whole.labels[kept])
    assert skipping.num_valid(4, 4) == holed.num_valid < whole.num_valid
    # A run that has not come to the hole yet may still get it.
    assert skipping.fingerprint_at(5) == loader.fingerprint_at(5)
    assert skipping.fingerprint_at(6) != loader.fingerprint_at(6)


def test_the_same_samples_for_every_world_size(stores: tuple[Path, Path]) -> None:
    whole = make_loader(stores).batch_at(24, 12)
    for count in (1, 2, 3, 4, 6, 12):
        loader = make_loader(stores)  # a fresh one: a restart
        parts = [loader.batch_at(first, count) for first in reversed(range(24, 36, count))][::-1]
        for name in ("tokens", "labels", "positions"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        assert sum(part.num_valid for part in parts) == whole.num_valid
        assert [source for part in parts for source, _ in pieces(part)] == [source for source, _ in pieces(whole)]


def test_fingerprint(stores: tuple[Path, Path]) -> None:
    a, b = stores
    first = make_loader(stores)
    assert make_loader(stores, seqs_per_batch=7).fingerprint == first.fingerprint
    for changed in ({"seed": 6}, {"seq_len": 128}, {"packing": "concat"}):
        assert make_loader(stores, **changed).fingerprint != first.fingerprint
    other_store = BatchLoader([Source("a", b, 0.75), Source("b", b, 0.25)], SEQ_LEN, 4, 5)
    assert other_store.fingerprint != first.fingerprint
    # A phase that starts later, with a source that was not there, does not touch what is before it.
    more = [Source("a", a, 0.75), Source("b", b, 0.25), Source("c", b, 0.0)]
    longer = BatchLoader(more, SEQ_LEN, 4, 5, phases=[Phase(100, (0, 0.5, 0.5))])
    assert longer.fingerprint != first.fingerprint
    assert longer.fingerprint_at(100) == first.fingerprint_at(100) == first.fingerprint
    assert longer.fingerprint_at(101) != first.fingerprint_at(101)
    for name in ("tokens", "labels", "positions"):
        assert np.array_equal(getattr(longer.batch_at(96), name), getattr(first.batch_at(96), name))
    assert {source for source, _ in pieces(longer.batch_at(100, 20))} == {1, 2}


def test_from_config(stores: tuple[Path, Path]) -> None:
    a, b = stores
    config = DataConfig.model_validate(
        {
            "sources": [{"name": "a", "store": str(a), "weight": 3}, {"name": "b", "store": str(b), "max_epochs": 2}],
            "seq_len": SEQ_LEN,
            "seed": 5,
            "phases": [{"start": 50, "weights": {"b": 1}}],
        }
    )
    loader = BatchLoader.from_config(config, 4)
    assert equal(loader.batch_at(0), make_loader(stores).batch_at(0))
    assert loader.source_names == ["a", "b"]
    assert {source for source, _ in pieces(loader.batch_at(50, 8))} == {1}
    limit = 2 * loader.packings[1].num_seqs
    with pytest.raises(ValueError, match="source 'b': .* max_epochs"):
        loader.order.check(50 + limit)


def test_token_shares(stores: tuple[Path, Path]) -> None:
    loader = make_loader(stores)
    shares = token_shares(loader, 400)
    assert sum(shares.values()) == pytest.approx(1)
    batch = loader.batch_at(0, 400)
    tokens = dict.fromkeys(loader.source_names, 0)
    for source, piece in pieces(batch):
        tokens[loader.source_names[source]] += piece.stop - piece.start
    assert shares["a"] == pytest.approx(tokens["a"] / sum(tokens.values()), abs=0.01)


def test_refusals(stores: tuple[Path, Path], spm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data source"):
        BatchLoader([], SEQ_LEN, 4)
    with pytest.raises(ValueError, match="packing is 'tight', must be one of best_fit, concat"):
        make_loader(stores, packing="tight")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        BatchLoader([Source("a", tmp_path / "nowhere")], SEQ_LEN, 4)
    tokenize_files([write_jsonl(tmp_path / "a.jsonl", ["one"])], spm_folder, tmp_path / "other", workers=1)
    with pytest.raises(ValueError, match="other: was made with another tokenizer"):
        BatchLoader([Source("a", stores[0]), Source("b", tmp_path / "other")], SEQ_LEN, 4)
    loader = make_loader(stores)
    with pytest.raises(ValueError, match="another tokenizer"):
        loader.check_model(10**6, "0" * 64)


def test_a_store_of_one_token_has_no_target(bpe_folder: Path, tmp_path: Path) -> None:
    tokenize_files([write_jsonl(tmp_path / "a.jsonl", ["x"])], bpe_folder, tmp_path / "one", workers=1, eos=False)
    batch = BatchLoader([Source("one", tmp_path / "one")], SEQ_LEN, 2).batch_at(0)
    check(batch, 2)
    assert batch.num_valid == 0
    assert batch.cu_seqlens.tolist() == [0, 1, 64, 65, 128]


def test_prefetch(stores: tuple[Path, Path]) -> None:
    loader = make_loader(stores)
    ahead = list(prefetch(loader.batch_at(first) for first in range(0, 40, 4)))
    assert len(ahead) == 10
    assert all(equal(batch, loader.batch_at(4 * number)) for number, batch in enumerate(ahead))

    def failing() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    items = prefetch(failing())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(items)

    endless = prefetch(itertools.count())
    assert list(itertools.islice(endless, 100)) == list(range(100))
    endless.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "steep prefetch"]
