"""Multiple choice figures, from log-probabilities that a scripted scorer returns."""

import math

import pytest

from steep.eval import Item, Request, Score, multiple_choice


class ScriptedScorer:
    """Returns given log-probabilities, in the order of the requests."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def loglikelihood(self, requests: list[Request], progress: object = None) -> list[Score]:
        assert len(requests) == len(self.values)
        return [Score(value, index % 2 == 0) for index, value in enumerate(self.values)]


class PlainEncoder:
    """Characters as tokens; marks one context as truncated."""

    def choices(self, context: str, continuations: tuple[str, ...]) -> list[Request]:
        return [Request([1], list(c.encode()), 3 if context == "long" else 0) for c in continuations]


def run(values: list[float], items: list[Item]) -> dict:
    return multiple_choice(ScriptedScorer(values), PlainEncoder(), items)  # type: ignore[arg-type]


def item(id: str, choices: tuple[str, ...], gold: int, context: str = "q") -> Item:
    return Item(id, context, choices, tuple(f" {choice}" for choice in choices), gold)


def test_figures() -> None:
    items = [
        item("a", ("aa", "bbbb"), 1),  # sum: A; per character: B; per byte: B
        item("b", ("éé", "abc"), 0),  # sum: B; per character (2, 3): B; per byte (4, 3): A
        item("c", ("x", "y", "z"), 2, "long"),  # a tie goes to the first
    ]
    result = run([-2.0, -3.0, -3.0, -2.9, -1.0, -1.0, -4.0], items)
    rows = result["items"]
    assert [(row["pred"], row["pred_norm"], row["pred_bytes"]) for row in rows] == [(0, 1, 1), (1, 1, 0), (0, 0, 0)]
    assert [row["margin"] for row in rows] == pytest.approx([-1.0, -0.1, -3.0])
    assert [row["truncated"] for row in rows] == [0, 0, 3]
    assert [row["is_greedy"] for row in rows] == [True, False, True]
    metrics = result["metrics"]
    assert [metrics[name]["value"] for name in ("acc", "acc_norm", "acc_bytes")] == pytest.approx([0, 1 / 3, 2 / 3])
    assert metrics["acc_norm"]["stderr"] == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 2))
    assert metrics["acc"]["low"] == 0
    assert metrics["acc"]["high"] > 0.5
    assert metrics["gold_margin"]["value"] == pytest.approx(-4.1 / 3)
    assert result["letters"] == {"predicted": {"A": 2, "B": 1}, "gold": {"A": 1, "B": 1, "C": 1}}
    assert result["counts"] == {"truncated_items": 1}
    assert result["n"] == 3
