"""Reading a store: any damage is an error that names the file, and the wrong model is refused."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from steep.data import TokenStore, load_tokenizer, tokenize_files
from tests.data.samples import many_texts, write_jsonl


@pytest.fixture(scope="module")
def built(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    file = write_jsonl(folder / "a.jsonl", many_texts(50))
    tokenize_files([file], bpe_folder, folder / "store", workers=1, shard_tokens=5000)
    return folder / "store"


@pytest.fixture
def store_path(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "store")


def test_ranges(store_path: Path) -> None:
    store = TokenStore(store_path)
    assert len(store.manifest["shards"]) > 2
    assert store.num_docs == len(store.lengths) == 52
    assert store.num_tokens == store.lengths.sum()
    for doc in range(store.num_docs):
        whole = store.read(doc)
        assert whole.dtype == np.dtype("<u2")
        assert len(whole) == store.lengths[doc]
        assert np.array_equal(store.read(doc, 1, 2 if len(whole) > 2 else 0), whole[1 : 3 if len(whole) > 2 else 1])
        assert np.array_equal(store.read(doc, len(whole) - 1), whole[-1:])
        assert len(store.read(doc, len(whole))) == 0
    for doc, start, length in ((-1, 0, 1), (52, 0, 1), (0, -1, 1), (0, 0, 10**6), (0, 10**6, 0)):
        with pytest.raises(IndexError):
            store.read(doc, start, length)


def test_a_store_can_be_sent_to_another_process(store_path: Path) -> None:
    store = TokenStore(store_path)
    again = pickle.loads(pickle.dumps(store))
    assert np.array_equal(again.read(3), store.read(3))


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_damage_is_found_when_opening(store_path: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return shutil.copytree(store_path, tmp_path / name)

    path = damaged("no-manifest")
    (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json: not found; the folder is not a finished artefact"):
        TokenStore(path)

    path = damaged("cut-shard")
    with open(path / "tokens-00001.bin", "r+b") as file:
        file.truncate(1001)
    with pytest.raises(ValueError, match=r"tokens-00001\.bin: 1001 bytes, but manifest\.json says"):
        TokenStore(path)

    path = damaged("no-shard")
    (path / "tokens-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00002\.bin: missing"):
        TokenStore(path)

    path = damaged("no-offsets")
    (path / "tokens-00000.offsets.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00000\.offsets\.npy: missing"):
        TokenStore(path)

    path = damaged("cut-offsets")
    with open(path / "tokens-00000.offsets.npy", "r+b") as file:
        file.truncate(150)
    with pytest.raises(ValueError, match=r"tokens-00000\.offsets\.npy: cut or not a \.npy file"):
        TokenStore(path)

    path = damaged("other-offsets")
    offsets = np.load(path / "tokens-00000.offsets.npy")
    other_end = np.append(offsets[:-1], offsets[-1:] + 1)
    for wrong in (offsets[:-1], offsets.astype(np.int64), offsets[::-1].copy(), other_end):
        np.save(path / "tokens-00000.offsets.npy", wrong)
        with pytest.raises(ValueError, match=r"tokens-00000\.offsets\.npy"):
            TokenStore(path)

    path = damaged("not-json")
    (path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TokenStore(path)
    for changes in ({"kind": "model"}, {"shards": None}, {"dtype": "float32"}, {"tokenizer": {}}):
        path = damaged(f"manifest-{next(iter(changes))}")
        edit_manifest(path, **changes)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            TokenStore(path)


def test_verify_finds_what_sizes_do_not_show(store_path: Path) -> None:
    TokenStore(store_path).verify()
    file = store_path / "tokens-00001.bin"
    tokens = np.fromfile(file, np.uint16)
    tokens[7] ^= 1
    tokens.tofile(file)
    with pytest.raises(ValueError, match=r"tokens-00001\.bin: SHA-256 is"):
        TokenStore(store_path).verify()


def test_verify_finds_ids_beyond_the_vocabulary(store_path: Path) -> None:
    edit_manifest(store_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: holds id \d+, the vocabulary has 300"):
        TokenStore(store_path).verify()


def test_a_file_cut_while_open_is_an_error(store_path: Path) -> None:
    store = TokenStore(store_path)
    with open(store_path / "tokens-00000.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: ends before token"):
        store.read(1)


def test_the_wrong_model_is_refused(store_path: Path, bpe_folder: Path, spm_folder: Path) -> None:
    store = TokenStore(store_path)
    own, other = load_tokenizer(bpe_folder), load_tokenizer(spm_folder)
    store.check_model(own.vocab_size, own.fingerprint)
    store.check_model(own.vocab_size + 61)  # an embedding padded to a round number; no tokenizer to compare with
    with pytest.raises(ValueError, match="store: was made with another tokenizer than the model's"):
        store.check_model(other.vocab_size, other.fingerprint)
    with pytest.raises(ValueError, match=f"has {own.vocab_size} ids, the model's vocabulary {own.vocab_size - 1}"):
        store.check_model(own.vocab_size - 1, own.fingerprint)
