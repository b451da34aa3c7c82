"""How well a model predicts text: rolling log-likelihoods of whole documents, perplexities and bits per byte.

Every token of a document is predicted exactly once. Windows are those of lm-evaluation-harness 0.4.13; perplexities are
ratios over the whole corpus (never means over documents), with intervals from the delta method over documents.
Touches a Scorer and an Encoder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .encoding import Encoder, Request
from .scorer import Scorer
from .stats import normal_interval, ratio_stderr


def rolling_windows(tokens: list[int], prefix_id: int, max_length: int) -> list[Request]:
    """Cut a document into requests that predict each of its tokens once.

    The first window predicts max_length tokens after `prefix_id`; each further full window predicts max_length tokens
    after the one before them; the last, partial one is given as much real context as fits. No token, no window.
    """
    windows = [Request([prefix_id], tokens[:max_length])] if tokens else []
    for start in range(max_length, len(tokens), max_length):
        end = min(start + max_length, len(tokens))
        windows.append(Request(tokens[end - max_length - 1 : start], tokens[start:end]))
    return windows


def rolling_loglikelihood(
    scorer: Scorer,
    encoder: Encoder,
    texts: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[float], list[int]]:
    """Log-likelihood in nats and number of predicted tokens of each text; 0 and 0 for a text without tokens."""
    windows: list[Request] = []
    owners: list[int] = []
    for number, text in enumerate(texts):
        own = rolling_windows(encoder.rolling(text), encoder.prefix_id, encoder.max_length)
        windows += own
        owners += [number] * len(own)
    scores = scorer.loglikelihood(windows, progress) if windows else []
    logprobs, tokens = [0.0] * len(texts), [0] * len(texts)
    for number, window, score in zip(owners, windows, scores):
        logprobs[number] += score.logprob
        tokens[number] += len(window.continuation)
    return logprobs, tokens


def perplexity(
    scorer: Scorer,
    encoder: Encoder,
    documents: Sequence[tuple[str, str]],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Perplexities of a corpus of (id, text).

    word_perplexity = exp(-sum log p / sum words) with words = pieces between runs of whitespace, as the harness counts
    them; byte_perplexity the same with UTF-8 bytes; bits_per_byte = -sum log p / (sum bytes * ln 2); token_perplexity
    depends on the tokenizer and compares only models that share one.

    Returns: metrics {name: {value, low, high, stderr where it is symmetric}}, n, counts, items (one row per document).
    """
    logprobs, tokens = rolling_loglikelihood(scorer, encoder, [text for _, text in documents], progress)
    items = [
        {
            "id": id,
            "logprob": logprob,
            "tokens": count,
            "words": len(re.split(r"\s+", text)),
            "bytes": len(text.encode()),
        }
        for (id, text), logprob, count in zip(documents, logprobs, tokens)
    ]
    return {
        "metrics": {
            "bits_per_byte": _bits_per_byte(items),
            "byte_perplexity": _perplexity(items, "bytes"),
            "word_perplexity": _perplexity(items, "words"),
            "token_perplexity": _perplexity(items, "tokens"),
        },
        "n": len(items),
        "counts": {
            "empty_documents": sum(count == 0 for count in tokens),
            "windows": sum(-(-count // encoder.max_length) for count in tokens),
            "tokens": sum(tokens),
        },
        "items": items,
    }


def _nats_per(items: Sequence[dict[str, Any]], unit: str) -> tuple[float, float]:
    """Negative log-likelihood per unit over the corpus, and its standard error."""
    nats = np.array([-item["logprob"] for item in items])
    units = np.array([item[unit] for item in items], dtype=np.float64)
    total = units.sum()
    return (float(nats.sum() / total) if total else math.nan), ratio_stderr(nats, units)


def _bits_per_byte(items: Sequence[dict[str, Any]]) -> dict[str, float]:
    nats, stderr = _nats_per(items, "bytes")
    bits, stderr = nats / math.log(2), stderr / math.log(2)
    low, high = normal_interval(bits, stderr)
    return {"value": bits, "stderr": stderr, "low": low, "high": high}


def _perplexity(items: Sequence[dict[str, Any]], unit: str) -> dict[str, float]:
    """The interval is that of the log, hence not symmetric and without a standard error of its own."""
    nats, stderr = _nats_per(items, unit)
    low, high = normal_interval(nats, stderr)
    return {"value": exp_or_inf(nats), "low": exp_or_inf(low), "high": exp_or_inf(high)}


def exp_or_inf(nats: float) -> float:
    """exp, and infinity where it overflows: the word perplexity of an untrained model does."""
    return math.exp(nats) if not nats > 709 else math.inf
