"""Rolling windows and corpus perplexities."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steep.eval import Encoder, Scorer, load_model, perplexity
from steep.eval.perplexity import rolling_windows

# What lm-evaluation-harness 0.4.13 cuts tokens 1..n into, prefix 0 (get_rolling_token_windows, make_disjoint_window).
WINDOWS = {
    (0, 4): [],
    (1, 4): [([0], [1])],
    (4, 4): [([0], [1, 2, 3, 4])],
    (5, 4): [([0], [1, 2, 3, 4]), ([1, 2, 3, 4], [5])],
    (8, 4): [([0], [1, 2, 3, 4]), ([4], [5, 6, 7, 8])],
    (10, 4): [([0], [1, 2, 3, 4]), ([4], [5, 6, 7, 8]), ([6, 7, 8], [9, 10])],
    (17, 8): [([0], [1, 2, 3, 4, 5, 6, 7, 8]), ([8], list(range(9, 17))), (list(range(9, 17)), [17])],
}


@pytest.mark.parametrize(("case", "expected"), WINDOWS.items())
def test_windows(case: tuple[int, int], expected: list) -> None:
    n, max_length = case
    assert [window[:2] for window in rolling_windows(list(range(1, n + 1)), 0, max_length)] == expected


@given(st.integers(0, 70), st.integers(1, 20))
def test_windows_predict_every_token_once(n: int, max_length: int) -> None:
    tokens = list(range(1, n + 1))
    windows = rolling_windows(tokens, 0, max_length)
    assert [token for window in windows for token in window.continuation] == tokens
    for context, continuation, _ in windows:
        assert len(context) >= 1
        assert len(context) + len(continuation) - 1 <= max_length
        assert context[-1] == continuation[0] - 1


@given(st.integers(0, 70), st.integers(1, 20))
def test_windows_are_the_harness_own(n: int, max_length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(1, n + 1))
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 0, max_length, 1))
    assert [tuple(window[:2]) for window in rolling_windows(tokens, 0, max_length)] == list(theirs)


@pytest.fixture(scope="module")
def ready(tiny: Path) -> tuple[Scorer, Encoder]:
    decoder, tokenizer, _ = load_model(tiny)
    return Scorer(decoder, tokenizer), Encoder(tokenizer, 64)


DOCUMENTS = [("a", "Der Patient hat Fieber."), ("b", "Le foie est\n\nun organe élevé."), ("c", ""), ("d", "Kurz")]


def test_figures_follow_from_the_rows(ready: tuple[Scorer, Encoder]) -> None:
    result = perplexity(*ready, DOCUMENTS)
    rows = result["items"]
    assert [row["id"] for row in rows] == ["a", "b", "c", "d"]
    assert [row["bytes"] for row in rows] == [23, 31, 0, 4]
    assert [row["words"] for row in rows] == [4, 6, 1, 1]  # the harness counts the empty text as one word
    assert rows[2]["logprob"] == 0
    assert result["counts"] == {"empty_documents": 1, "windows": 3, "tokens": sum(row["tokens"] for row in rows)}
    nats = -sum(row["logprob"] for row in rows)
    metrics = result["metrics"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2) / 58)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(nats / 58))
    assert metrics["word_perplexity"]["value"] == pytest.approx(math.exp(nats / 12))
    for figures in metrics.values():
        assert figures["low"] < figures["value"] < figures["high"]
    assert math.log(metrics["byte_perplexity"]["high"]) / math.log(2) == pytest.approx(metrics["bits_per_byte"]["high"])


def test_clean_mode_predicts_each_token_after_one_bos(tiny: Path, ready: tuple[Scorer, Encoder]) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    tokens = ready[1].tokenizer.encode(DOCUMENTS[0][1])
    with torch.no_grad():
        logprobs = model(torch.tensor([[0, *tokens[:-1]]])).logits[0].log_softmax(-1)
    expected = sum(float(logprobs[i, token]) for i, token in enumerate(tokens))
    assert perplexity(*ready, DOCUMENTS[:1])["items"][0]["logprob"] == pytest.approx(expected, abs=1e-4)


def test_one_document_has_no_interval(ready: tuple[Scorer, Encoder]) -> None:
    figures = perplexity(*ready, DOCUMENTS[:1])["metrics"]["bits_per_byte"]
    assert math.isfinite(figures["value"])
    assert math.isnan(figures["stderr"])


def test_untrained_words_do_not_overflow(ready: tuple[Scorer, Encoder]) -> None:
    assert perplexity(*ready, [("a", "x" * 400), ("b", "y" * 400)])["metrics"]["word_perplexity"]["value"] == math.inf
