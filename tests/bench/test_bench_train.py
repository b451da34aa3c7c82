"""The three loops of `steep bench train` on a tiny model: the same documents, the same loss, complete figures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from steep.bench import train
from tests.engine.tiny_run import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("bench") / "model")


def test_loops_train_on_the_same_tokens(model, tmp_path):
    packed = train._pack(train._random_documents(model, 64), 64, 9)
    np.savez(tmp_path / "documents.npz", **packed)
    assert len(packed["docs_in_sequence"]) == 9
    assert packed["docs_in_sequence"].sum() == len(packed["length"])
    settings = {"seq_len": 64, "sequences": 3, "warmup": 1, "steps": 2, "threads": torch.get_num_threads()}
    results = {loop: train._measure(loop, model, tmp_path / "documents.npz", settings) for loop in train.LOOPS}
    for loop in ("packed", "padded"):
        assert results[loop]["losses"] == pytest.approx(results["steep"]["losses"], rel=1e-5)
    for figures in results.values():
        assert len(figures["tokens_per_second_each"]) == 2
        assert figures["peak_rss_bytes"] > 100e6


def test_run_compares_in_processes_of_their_own(model):
    figures = train.run(model, seq_len=64, sequences=2, threads=1, warmup=0, steps=1, loops=("steep",))
    assert figures["steep"]["peak_rss_without_imports_bytes"] < figures["steep"]["peak_rss_bytes"]
    assert figures["documents"] >= 2


def test_too_little_text_is_refused(model, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "one short document"}\n')
    with pytest.raises(ValueError, match="the measurement needs 24"):
        train.run(model, tmp_path / "text.jsonl", seq_len=64)
    with pytest.raises(ValueError, match="text needs a model folder"):
        train.run(text=tmp_path / "text.jsonl")
