"""What `steep data inspect` says of a store."""

import json
from pathlib import Path

import pytest

from steep.data import TokenStore, tokenize_files
from steep.data.inspect import inspect_store
from tests.data.samples import TEXTS, many_texts, write_jsonl


def test_inspect(bpe_folder: Path, spm_folder: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [*TEXTS[:2], "", *many_texts(30)])
    tokenize_files([file], bpe_folder, tmp_path / "store", workers=1)
    store = TokenStore(tmp_path / "store")
    report = inspect_store(tmp_path / "store", seq_len=128, doc=1)
    json.dumps(report)
    assert (report["documents"], report["tokens"]) == (34, store.num_tokens)
    assert report["rejects"]["empty text"]["count"] == 1
    quantiles = report["document_tokens"]
    assert (quantiles["p0"], quantiles["p100"]) == (store.lengths.min(), store.lengths.max())
    assert report["packing"]["best_fit"]["tokens"] == report["packing"]["concat"]["tokens"] == store.num_tokens
    assert report["packing"]["best_fit"]["docs_cut_unnecessarily"] == 0
    assert report["document"]["first_text"] == TEXTS[1] + "<|endoftext|>"
    assert report["document"]["origin"] == f"{file}:2"
    assert report["document"]["first_ids"] == store.read(1).tolist()

    assert "packing" not in inspect_store(tmp_path / "store")
    with pytest.raises(ValueError, match="no document 34; the store has documents 0 to 33"):
        inspect_store(tmp_path / "store", doc=34)
    with pytest.raises(ValueError, match="another tokenizer"):
        inspect_store(tmp_path / "store", doc=0, tokenizer_folder=spm_folder)
