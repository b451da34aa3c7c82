"""Multiple choice by log-likelihood: each choice is scored as a continuation of the question; the likeliest one wins.

Three readings of "likeliest": the sum of log-probabilities (acc), per character of the choice (acc_norm, the harness'
normalisation), per UTF-8 byte (acc_bytes, what the papers say and what is fair across languages). For one-letter
choices all three agree. Touches a Scorer and an Encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoding import Encoder
from .scorer import Scorer
from .stats import mean_stderr, wilson_interval


@dataclass(frozen=True)
class Item:
    """One question. `continuations` are what is scored after `context` (delimiter + choice), `gold` is an index."""

    id: str
    context: str
    choices: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def multiple_choice(
    scorer: Scorer,
    encoder: Encoder,
    items: Sequence[Item],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score items.

    Returns:
        metrics: acc, acc_norm, acc_bytes: {value, stderr = s/sqrt(n), low, high (Wilson, 95 %)}; gold_margin:
            {value, stderr}, the mean over items of log p(gold) - the best log p of another choice, in nats.
        letters: {predicted, gold}: how often each place (A, B, ...) was chosen and was right.
        counts: truncated_items (prompt cut to max_length).
        items: per item id, gold, logprobs, pred, pred_norm, pred_bytes, margin, is_greedy (of pred), truncated.
    """
    requests, owners = [], []
    for number, item in enumerate(items):
        requests += encoder.choices(item.context, item.continuations)
        owners += [number] * len(item.choices)
    scores = scorer.loglikelihood(requests, progress) if requests else []
    rows = []
    position = 0
    for item in items:
        span = slice(position, position + len(item.choices))
        position = span.stop
        rows.append(_row(item, [s.logprob for s in scores[span]], [s.is_greedy for s in scores[span]]))
        rows[-1]["truncated"] = max(request.truncated for request in requests[span])
    correct = {
        "acc": [row["pred"] == row["gold"] for row in rows],
        "acc_norm": [row["pred_norm"] == row["gold"] for row in rows],
        "acc_bytes": [row["pred_bytes"] == row["gold"] for row in rows],
    }
    margins = [row["margin"] for row in rows]
    return {
        "metrics": {
            **{name: accuracy(values) for name, values in correct.items()},
            "gold_margin": {"value": float(np.mean(margins)), "stderr": mean_stderr(margins)},
        },
        "n": len(rows),
        "letters": {
            "predicted": _letters(row["pred"] for row in rows),
            "gold": _letters(row["gold"] for row in rows),
        },
        "counts": {"truncated_items": sum(row["truncated"] > 0 for row in rows)},
        "items": rows,
    }


def accuracy(correct: Sequence[bool]) -> dict[str, float]:
    """Mean, closed-form standard error and Wilson interval of right/wrong answers."""
    low, high = wilson_interval(sum(correct), len(correct))
    return {
        "value": float(np.mean(correct)),
        "stderr": mean_stderr(np.array(correct, dtype=np.float64)),
        "low": low,
        "high": high,
    }


def _row(item: Item, logprobs: list[float], greedy: list[bool]) -> dict[str, Any]:
    values = np.array(logprobs)
    characters = np.array([len(choice) for choice in item.choices])
    utf8_bytes = np.array([len(choice.encode()) for choice in item.choices])
    pred = int(values.argmax())  # the first of equals wins, as in the harness
    return {
        "id": item.id,
        "gold": item.gold,
        "logprobs": logprobs,
        "pred": pred,
        "pred_norm": int((values / characters).argmax()),
        "pred_bytes": int((values / utf8_bytes).argmax()),
        "margin": float(values[item.gold] - np.delete(values, item.gold).max()),
        "is_greedy": greedy[pred],
    }


def _letters(places: Any) -> dict[str, int]:
    counted = Counter(places)
    return {chr(ord("A") + place): counted[place] for place in range(max(counted, default=-1) + 1)}
