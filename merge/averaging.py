"""Weights for averaging checkpoints of one run, oldest first; `linear` merges with them. No tensors, no files.

Every function gives weights that sum to 1. `average_config` makes the merge configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Decay = Literal["linear", "cosine", "inverse_sqrt"]


def uniform_weights(checkpoints: int, last: int | None = None) -> list[float]:
    """Equal weights for the last `last` of so many checkpoints, 0 for the others: LAWA (arXiv:2306.03241)."""
    last = checkpoints if last is None else last
    _check("last", last, 1, checkpoints)
    return [0.0] * (checkpoints - last) + [1 / last] * last


def ema_weights(checkpoints: int, beta: float) -> list[float]:
    """What an exponential moving average, m <- beta m + (1 - beta) theta from m = theta_0 on, gives each checkpoint."""
    _check("checkpoints", checkpoints, 1, math.inf)
    _check("beta", beta, 0, 1)
    return [beta ** (checkpoints - 1)] + [(1 - beta) * beta**age for age in range(checkpoints - 2, -1, -1)]


def wsm_weights(checkpoints: int, decay: Decay = "inverse_sqrt") -> list[float]:
    """Weights that stand in for the decay of a learning rate that stayed constant: WSM (arXiv:2507.17634).

    The average sum_j c_j theta_j of checkpoints 0 ... k applies the updates between j - 1 and j with the factor
    d_j = c_j + ... + c_k. So c_j = d_j - d_(j+1) with d_0 = 1 and d_(k+1) = 0 acts as a decay along d_1 ... d_k, here
    d_j = f(j / (k + 1)).

    Args:
        checkpoints: k + 1, all from the stretch that shall count as decay.
        decay: f(x) is 1 - x for "linear", which gives equal weights, (1 + cos(pi x)) / 2 for "cosine", 1 - sqrt(x) for
            "inverse_sqrt".
    """
    shapes = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
        "inverse_sqrt": lambda x: 1 - math.sqrt(x),
    }
    if decay not in shapes:
        raise ValueError(f"decay: {decay!r}; allowed: {', '.join(shapes)}")
    _check("checkpoints", checkpoints, 1, math.inf)
    factors = [shapes[decay](j / checkpoints) for j in range(checkpoints)] + [0.0]
    return [factor - later for factor, later in zip(factors, factors[1:])]


def selected_weights(scores: Sequence[float], best: int, higher_is_better: bool = True) -> list[float]:
    """Equal weights for the `best` checkpoints by score, 0 for the others; of equal scores the later one counts."""
    _check("best", best, 1, len(scores))
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"scores: must be finite, found {list(scores)}")
    order = sorted(range(len(scores)), key=lambda i: (scores[i] if higher_is_better else -scores[i], i), reverse=True)
    return [1 / best if i in order[:best] else 0.0 for i in range(len(scores))]


def average_config(checkpoints: Sequence[str | Path], weights: Sequence[float], **keys: Any) -> dict[str, Any]:
    """The configuration of the merge that averages checkpoints; those of weight 0 are left out.

    Args:
        keys: further keys of the configuration, such as dtype.
    """
    if len(checkpoints) != len(weights):
        raise ValueError(f"weights: {len(weights)} for {len(checkpoints)} checkpoints")
    models = [
        {"model": str(path), "parameters": {"weight": weight}}
        for path, weight in zip(checkpoints, weights, strict=True)
        if weight
    ]
    return {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, **keys}


def _check(name: str, found: float, least: float, most: float) -> None:
    if not least <= found <= most:
        raise ValueError(f"{name}: must be from {least} to {most}, found {found!r}")
