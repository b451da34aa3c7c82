"""The command line: starts light, and turns a user's mistake into one line."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["demo", "import gguf", "data tokenize", "data inspect", "train", "merge", "merge plan", "merge diff",
            "merge report", "merge verify", "merge search", "eval", "generate", "report", "verify", "bench kernels",
            "bench train", "bench plan", "bench ranks", "bench data", "bench eval", "bench merge"]  # fmt: skip



@pytest.mark.parametrize("module", ["steep.cli", "steep.data"])
def test_nothing_heavy_is_imported_before_it_is_needed(module: str) -> None:
    heavy = ("torch", "triton", "transformers", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_command_has_help() -> None:
    from typer.testing import CliRunner

    from steep.cli.app import app

    for command in COMMANDS:
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, command
        assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "nowhere"], "nowhere"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "nowhere.yaml", "--plan"], "nowhere.yaml"),
        (["train", "nowhere.yaml", "--gpu", "h100"], "give --plan too"),
        (["bench", "train", "--model", "nowhere", "--seq-len", "8"], "nowhere"),
        (["merge", "nowhere.yaml", "out"], "nowhere.yaml"),
        (["import", "gguf", "nowhere.gguf", "out"], "nowhere.gguf"),
        (["data", "inspect", "nowhere"], "nowhere"),
        (["report", "nowhere", "--out", "x.html"], "nowhere"),
        (["eval", "nowhere", "--tasks", "perplexity:nowhere.txt", "--out", "x.json"], "nowhere"),
        (["eval", "nowhere", "--tasks", "perplexity", "--out", "x.json"], "perplexity:PATH"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "steep.cli", *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("steep: ")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_training_imports_no_compiler_and_no_fsdp_before_it_needs_them():
    """Each of them takes seconds."""
    heavy = "{'torch._dynamo', 'torch._inductor', 'torch.distributed.fsdp', 'transformers'}"
    code = f"import sys, steep.engine.trainer; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
