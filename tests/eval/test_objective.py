"""An objective gives the numbers of `evaluate`, again and again, and refuses what it cannot measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steep.eval import evaluate, load_model, task_objective

TEXTS = ["Der Patient hat Fieber. Das Herz pumpt Blut.", "The liver is an organ. Der Muskelschmerz ist stark."]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "text.txt").write_text("\n".join(TEXTS))
    (folder / "text-as.jsonl").write_text(json.dumps({"text": "\n".join(TEXTS)}) + "\n")
    questions = [{"q": "Was pumpt Blut?", "c": ["Herz", "Leber"], "a": number} for number in (0, 1, 0)]
    (folder / "test.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (folder / "mine.yaml").write_text(
        "task: mine\noutput_type: multiple_choice\ndata_files: {test: test.jsonl}\n"
        "doc_to_text: q\ndoc_to_choice: c\ndoc_to_target: a\n"
    )
    return folder


def test_the_numbers_of_evaluate(tiny: Path, data: Path) -> None:
    decoder, tokenizer, stop_ids = load_model(tiny)
    figures = evaluate(tiny, [f"perplexity:{data}/text.jsonl", f"{data}/mine.yaml"])["figures"]
    perplexity = task_objective("perplexity:text.jsonl", folder=data)
    accuracy = task_objective("mine.yaml", "acc_norm", folder=data)
    for _ in range(2):
        assert perplexity(decoder, tokenizer) == figures["perplexity"]["bits_per_byte"]
        assert accuracy(decoder, tokenizer, stop_ids) == figures["mine"]["acc_norm"]
    assert perplexity.minimised
    assert not accuracy.minimised
    with torch.no_grad():
        decoder.norm.weight.mul_(0.5)
    assert perplexity(decoder, tokenizer) != figures["perplexity"]["bits_per_byte"]


def test_a_text_is_one_document(tiny: Path, data: Path) -> None:
    decoder, tokenizer, _ = load_model(tiny)
    as_task = task_objective(f"perplexity:{data}/text-as.jsonl", "token_perplexity")
    assert task_objective("text.txt", "token_perplexity", folder=data)(decoder, tokenizer) == as_task(
        decoder, tokenizer
    )


def test_identity_is_that_of_the_data(data: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.jsonl").write_bytes((data / "text.jsonl").read_bytes())
    here, copy = (task_objective(f"perplexity:{path}") for path in (data / "text.jsonl", tmp_path / "copy.jsonl"))
    assert here.identity == copy.identity
    assert here.identity != task_objective(f"perplexity:{data}/text.jsonl", limit=1).identity


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("perplexity:text.jsonl", {"metric": "acc"}, "metric 'acc'; allowed: bits_per_byte, byte_perplexity"),
        ("mine.yaml", {"limit": 0}, "limit: 0; allowed: 1 and more"),
        ("text.txt", {"limit": 3}, "is one document and has neither limit"),
        ("nothing.txt", {}, "nothing.txt: no such text"),
        ("perplexity:nothing.jsonl", {}, "nothing.jsonl"),
        ("perplexity", {}, "where is its data"),
    ],
)
def test_what_cannot_be_measured_is_refused(data: Path, source: str, options: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        task_objective(source, folder=data, **options)
