"""`steep merge search` as a user runs it: tasks of `steep eval`, a folder, a table; and the model it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from steep.cli.app import app
from steep.eval import evaluate
from tests.eval.conftest import TEXT, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a sibling with another tokenizer file, two texts in two halves each."""
    folder = tmp_path_factory.mktemp("merge_search")
    for name in ("base", "tuned"):
        save_model(folder / name)
    tensors = load_file(folder / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tuned = {name: x + 0.05 * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}
    save_file(tuned, folder / "tuned" / "model.safetensors", metadata={"format": "pt"})
    lines = TEXT.splitlines()
    for number, line in enumerate(lines[:4]):
        (folder / f"{number}.jsonl").write_text(json.dumps({"text": line}) + "\n")
    (folder / "merge.yml").write_text(
        yaml.safe_dump(
            {
                "merge_method": "dare_ties",
                "base_model": "base",
                "models": [{"model": "tuned", "parameters": {"weight": 1, "density": 0.5}}],
                "dtype": "bfloat16",
            }
        )
    )
    sets = {"domain": ("perplexity:0.jsonl", "perplexity:1.jsonl"), "general": ("perplexity:2.jsonl", "3.txt")}
    (folder / "3.txt").write_text(lines[3])
    (folder / "search.yml").write_text(
        yaml.safe_dump(
            {
                "merge": "merge.yml",
                "space": {"lambda": {"range": [0.1, 1], "points": 3}},
                "strategy": "grid",
                "objectives": {name: {"task": seen, "held_out": other} for name, (seen, other) in sets.items()},
                "choose": {"max_general_loss": "50%"},
            }
        )
    )
    return folder


def test_a_search_by_tasks(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["merge", "search", str(folder / "search.yml"), str(out)])
    assert result.exit_code == 0, result.output
    assert "3/3 lambda = 1: domain" in result.output
    assert "3 evaluations, 0 failed" in result.output
    record = json.loads((out / "search.json").read_text())
    chosen = record["evaluations"][record["chosen"] - 1]
    figures = evaluate(out / "model", [f"perplexity:{folder}/0.jsonl"])["figures"]
    assert figures["perplexity"]["bits_per_byte"] == chosen["domain"]
    figures = evaluate(folder / "base", [f"perplexity:{folder}/1.jsonl"])["figures"]
    assert figures["perplexity"]["bits_per_byte"] == record["confirmation"]["reference"]["domain"]
    assert len(record["inputs"]) > 3


def test_held_out_documents_that_the_search_sees_are_counted(folder: Path, tmp_path: Path) -> None:
    both = [(folder / f"{number}.jsonl").read_text() for number in (0, 1)]
    (folder / "both.jsonl").write_text("".join(both))
    config = yaml.safe_load((folder / "search.yml").read_text())
    config["objectives"]["domain"]["held_out"] = "perplexity:both.jsonl"
    (folder / "overlap.yml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["merge", "search", str(folder / "overlap.yml"), str(tmp_path / "out")])
    assert "warning: domain: 1 of 2 held-out documents are the search's too" in result.output
    config["objectives"]["domain"]["held_out"] = "perplexity:copy.jsonl"
    (folder / "copy.jsonl").write_text(both[0])
    (folder / "overlap.yml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["merge", "search", str(folder / "overlap.yml"), str(tmp_path / "out2")])
    assert "objectives.domain.held_out: is the data that the search sees" in str(result.exception)


def test_the_budget_of_the_command_line(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["merge", "search", str(folder / "search.yml"), str(tmp_path), "--budget", "2"])
    assert "budget: 2, but the grid has 3 points" in str(result.exception)
