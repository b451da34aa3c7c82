"""The benchmark of multiple choice: it runs on made-up questions and finds equal scores."""

from pathlib import Path

import pytest

from steep.bench.eval import run


def test_figures(tiny: Path) -> None:
    pytest.importorskip("lm_eval")
    figures = run(tiny, num_fewshot=0, limit=2, rounds=1)
    assert figures["items"] == 6
    assert figures["data"] == "synthetic"
    assert figures["max_abs_difference"] < 1e-4
    assert figures["items_with_another_choice"] == 0
    assert figures["seconds"].keys() == {"steep", "lm_eval batch_size=1", "lm_eval batch_size=8"}
    assert figures["model_tokens"] == {"steep": 384, "lm_eval": 384}  # prompts cut to 64 tokens have nothing to share
