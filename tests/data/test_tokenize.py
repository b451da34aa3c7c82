"""Token stores: the ids of one plain loop whatever the number of workers, and published whole or not at all."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from steep.data import TokenStore, load_tokenizer, tokenize_files
from steep.data.files import sha256_file
from tests.data.samples import TEXTS, many_texts, write_jsonl


def documents(store: TokenStore) -> list[list[int]]:
    return [store.read(doc).tolist() for doc in range(store.num_docs)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "manifest.json"}


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_ids_are_those_of_one_plain_loop(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    texts = many_texts(100)
    tokenize_files([write_jsonl(tmp_path / "a.jsonl", texts)], folder, tmp_path / "store", workers=1)
    tokenizer = load_tokenizer(folder)
    bos = [tokenizer.bos_id] if kind == "spm" else []  # "auto": as the tokenizer itself does
    store = TokenStore(tmp_path / "store")
    assert documents(store) == [[*bos, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert store.dtype == np.dtype("<u2")
    store.verify()


def test_bytes_do_not_depend_on_workers(bpe_folder: Path, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", many_texts(1500, seed)) for seed, name in enumerate("ab")]
    (tmp_path / "c.txt").write_text(TEXTS[0])
    with open(files[0], "ab") as file:
        file.write(b'broken\n{"text": ""}\n')
    files.append(tmp_path / "c.txt")
    manifests = {}
    for workers in (1, 2, 3):
        out = tmp_path / f"store-{workers}"
        manifests[workers] = tokenize_files(files, bpe_folder, out, workers=workers, shard_tokens=30_000)
        assert json.loads((out / "manifest.json").read_text()) == manifests[workers]
    assert len(manifests[1]["shards"]) > 5
    for workers in (2, 3):
        assert contents(tmp_path / f"store-{workers}") == contents(tmp_path / "store-1")
        assert {**manifests[workers], "created": ""} == {**manifests[1], "created": ""}
    TokenStore(tmp_path / "store-3").verify()


@pytest.mark.parametrize("shard_tokens", [1, 100, 333, 10**9])
def test_shards_hold_whole_documents(bpe_folder: Path, tmp_path: Path, shard_tokens: int) -> None:
    texts = many_texts(60)
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = tokenize_files([file], bpe_folder, tmp_path / "store", workers=1, shard_tokens=shard_tokens, eos=False)
    tokenizer = load_tokenizer(bpe_folder)
    expected = [tokenizer.encode(text) for text in texts]
    store = TokenStore(tmp_path / "store")
    assert documents(store) == expected
    assert store.lengths.tolist() == [len(ids) for ids in expected]
    for shard in manifest["shards"]:
        assert shard["tokens"] <= shard_tokens or shard["docs"] == 1
    # A shard is closed only when the next document does not fit.
    shards = manifest["shards"]
    first = np.cumsum([0] + [shard["docs"] for shard in shards])
    for shard, following in zip(shards, first[1:-1]):
        assert shard["tokens"] + len(expected[following]) > shard_tokens


def test_every_record_is_accounted_for(bpe_folder: Path, tmp_path: Path) -> None:
    bad = [b"{", b"[]", b'{"text": ""}', b'{"text": "a\\u0000"}', b'{"text": "\xff"}', b"{}"] + [b""] * 7
    good = [json.dumps({"text": text}).encode() for text in TEXTS]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join([*bad, *good]))
    manifest = tokenize_files([path], bpe_folder, tmp_path / "store", workers=1)
    figures = manifest["figures"]
    assert (figures["records"], figures["docs"], figures["rejects"]) == (len(bad) + len(good), len(good), len(bad))
    assert figures["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert {reason: entry["count"] for reason, entry in manifest["rejects"].items()} == {
        "invalid JSON": 1,
        "not a JSON object": 1,
        "empty text": 1,
        "NUL character": 1,
        "invalid UTF-8": 1,
        "no text field": 1,
        "blank line": 7,
    }
    assert manifest["rejects"]["invalid JSON"]["examples"] == [f"{path}:1"]
    assert len(manifest["rejects"]["blank line"]["examples"]) == 5
    lines = (tmp_path / "store" / "rejects.jsonl").read_text().splitlines()
    assert len(lines) == len(bad)
    assert json.loads(lines[0]) == {"id": f"{path}:1", "reason": "invalid JSON"}
    assert manifest["inputs"][str(path)]["sha256"] == sha256_file(path)
    assert TokenStore(tmp_path / "store").origin(0) == f"{path}:{len(bad) + 1}"
    assert manifest["files"] == [
        {"path": str(path), "records": 19, "docs": 6, "tokens": TokenStore(tmp_path / "store").num_tokens}
    ]


def test_the_origin_of_every_document(bpe_folder: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    files = []
    for name in ("a", "b:1", "c"):
        texts = ["" if random.random() < 0.4 else f"{name} line {line}" for line in range(1, 40)]
        files.append(write_jsonl(tmp_path / f"{name}.jsonl", texts))
    tokenize_files(files, bpe_folder, tmp_path / "store", workers=1, eos=False)
    store, tokenizer = TokenStore(tmp_path / "store"), load_tokenizer(bpe_folder)
    for doc in range(store.num_docs):
        name, _, line = tokenizer.decode(store.read(doc).tolist()).split(" ")
        assert store.origin(doc) == f"{tmp_path / name}.jsonl:{line}"
    with pytest.raises(IndexError):
        store.origin(store.num_docs)


def test_text_without_tokens_is_rejected(bpe_folder: Path, tmp_path: Path) -> None:
    from tokenizers import Regex, Tokenizer, normalizers

    folder = tmp_path / "removing"
    folder.mkdir()
    raw = Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    raw.normalizer = normalizers.Replace(Regex("#+"), "")
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text((bpe_folder / "tokenizer_config.json").read_text())
    file = write_jsonl(tmp_path / "a.jsonl", ["one", "###", "two"])
    manifest = tokenize_files([file], folder, tmp_path / "store", workers=1)
    assert manifest["rejects"] == {"no tokens": {"count": 1, "examples": [f"{file}:2"]}}
    assert manifest["figures"]["docs"] == 2


def test_document_marks(bpe_folder: Path, spm_folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["x"])
    bpe, spm = load_tokenizer(bpe_folder), load_tokenizer(spm_folder)

    def build(name: str, folder: Path, **options: bool | str) -> list[int]:
        manifest = tokenize_files([file], folder, tmp_path / name, workers=1, **options)
        ids = documents(TokenStore(tmp_path / name))[0]
        assert manifest["tokenizer"]["bos_id"] == (ids[0] if ids[0] in (bpe.bos_id, spm.bos_id) else None)
        return ids

    x = bpe.encode("x")
    assert build("eos", bpe_folder) == [*x, bpe.eos_id]
    assert build("none", bpe_folder, eos=False) == x  # a document of one token
    assert build("named", bpe_folder, eos="<|im_end|>") == [*x, bpe.token_id("<|im_end|>")]
    assert build("no-bos", spm_folder, bos=False) == [*spm.encode("x"), spm.eos_id]
    assert build("bos", spm_folder, bos=True, eos=False) == [spm.bos_id, *spm.encode("x")]
    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        build("refused", bpe_folder, bos=True)
    with pytest.raises(ValueError, match="no token '<eot>'"):
        build("refused", bpe_folder, eos="<eot>")
    with pytest.raises(ValueError, match="bos is 'yes', must be True, False or 'auto'"):
        build("refused", bpe_folder, bos="yes")
    assert not (tmp_path / "refused").exists()


def test_nothing_is_left_after_an_error(bpe_folder: Path, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n\n")
    cut = tmp_path / "cut.jsonl.zst"
    cut.write_bytes(b"\x28\xb5\x2f\xfd no frame")
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "store"
    for files, error, message in (
        ([empty], ValueError, "not one usable document in the input; rejected: .*'blank line'"),
        ([good, cut], ValueError, "cut.jsonl.zst: damaged"),
        ([good, tmp_path / "absent.txt"], FileNotFoundError, "absent.txt"),
        ([good, good], ValueError, "given twice"),
    ):
        for workers in (1, 2) if files[-1] == cut else (1,):
            with pytest.raises(error, match=message):
                tokenize_files(files, bpe_folder, out, workers=workers)
            assert sorted(tmp_path.iterdir()) == before
    for options in ({"workers": 0}, {"shard_tokens": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            tokenize_files([good], bpe_folder, out, **options)
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="store"):
        tokenize_files([good], bpe_folder, out, workers=1)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


SLOW_BUILD = """
import multiprocessing, sys, time
from steep.data import tokenize_files

def progress(docs, tokens):
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(60)

if __name__ == "__main__":
    file, tokenizer, out, workers = sys.argv[1:]
    tokenize_files([file], tokenizer, out, workers=int(workers), progress=progress)
"""


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGKILL), (2, signal.SIGKILL), (2, signal.SIGINT)])
def test_a_killed_build_leaves_no_store_and_no_processes(
    bpe_folder: Path, tmp_path: Path, workers: int, number: signal.Signals
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", many_texts(2000))
    script = tmp_path / "build.py"
    script.write_text(SLOW_BUILD)
    out = tmp_path / "stores" / "mine"
    command = [sys.executable, str(script), str(file), str(bpe_folder), str(out), str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        children = [int(pid) for pid in process.stdout.readline().split()]
        process.send_signal(number)
    assert len(children) == (workers if workers > 1 else 0)
    assert not out.exists()
    unfinished = list(out.parent.iterdir())
    assert len(unfinished) == (1 if number == signal.SIGKILL else 0)  # an interrupted one cleans up after itself
    for path in (out, *unfinished):
        with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
            TokenStore(path)
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)

    tokenize_files([file], bpe_folder, out, workers=1)
    TokenStore(out).verify()
    assert list(out.parent.iterdir()) == [out]


def test_a_dead_worker_is_an_error(bpe_folder: Path, tmp_path: Path) -> None:
    def kill_one(docs: int, tokens: int) -> None:
        for child in multiprocessing.active_children()[:1]:
            os.kill(child.pid or 0, signal.SIGKILL)

    file = write_jsonl(tmp_path / "a.jsonl", many_texts(8000))
    with pytest.raises(RuntimeError, match="store: a tokenising process died"):
        tokenize_files([file], bpe_folder, tmp_path / "store", workers=2, progress=kill_one)
    assert sorted(tmp_path.iterdir()) == [file]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie has ended; its adopted parent has not asked yet


SMALL_DISK = """
import resource, sys
from steep.data import tokenize_files

if __name__ == "__main__":
    file, tokenizer, out, limit = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    tokenize_files([file], tokenizer, out, workers=1)
"""


@pytest.mark.parametrize("limit", [0, 600, 1200, 20_000])
def test_a_full_disk_leaves_nothing(bpe_folder: Path, tmp_path: Path, limit: int) -> None:
    """No file may grow beyond the limit: depending on it the manifest, the offsets or the tokens do not fit."""
    file = write_jsonl(tmp_path / "a.jsonl", many_texts(2 if limit == 600 else 300))
    script = tmp_path / "build.py"
    script.write_text(SMALL_DISK)
    out = tmp_path / "stores" / "mine"
    command = [sys.executable, str(script), str(file), str(bpe_folder), str(out), str(limit)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 1
    assert "OSError: [Errno 27] writing the token store failed: File too large: " in result.stderr
    assert str(out) in result.stderr.splitlines()[-1]
    assert list(out.parent.iterdir()) == []


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path / "words"
    folder.mkdir()
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(70_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    file = write_jsonl(tmp_path / "a.jsonl", ["w69999 w65536 w1", "w7"])
    tokenize_files([file], folder, tmp_path / "store", workers=1, eos=False)
    store = TokenStore(tmp_path / "store")
    assert store.dtype == np.dtype("<u4")
    assert documents(store) == [[69999, 65536, 1], [7]]
