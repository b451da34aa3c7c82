"""The examples of the engine in other loops run as they are printed, learn, and go on where they stopped."""

import importlib.util
import os
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from steep.engine import Engine

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

Run = Callable[..., list[str]]


@pytest.fixture
def run(monkeypatch, capsys) -> Run:
    """Run an example with command-line options; the lines that it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *options: str) -> list[str]:
        monkeypatch.setattr("sys.argv", [name, *options])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def losses(lines: list[str]) -> list[float]:
    return [float(loss) for loss in re.findall(r"(?<!train_)loss'?:? +'?([\d.]+)", "\n".join(lines))]


def test_plain_loop(run, tmp_path):
    whole = run("train_plain_loop.py", "--work", str(tmp_path / "whole"))
    assert losses(whole)[-1] < 0.6 * losses(whole)[0]
    assert Engine.load(tmp_path / "whole" / "model").config == Engine.load(tmp_path / "whole" / "base").config


def test_plain_loop_goes_on_where_it_stopped(run, tmp_path):
    whole = run("train_plain_loop.py", "--lora", "--work", str(tmp_path / "whole"))
    assert losses(whole)[-1] < losses(whole)[0] - 0.2
    checkpoint = max((tmp_path / "whole" / "checkpoints").iterdir())
    assert checkpoint.name == "step-00000030"
    os.rename(checkpoint, tmp_path / "aside")  # as if it had been killed before step 30
    os.rename(tmp_path / "whole" / "model", tmp_path / "model")
    os.rename(tmp_path / "whole" / "adapter", tmp_path / "adapter")
    again = run("train_plain_loop.py", "--lora", "--work", str(tmp_path / "whole"))
    assert again[:-1] == whole[-11:-1]
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_trainer_of_transformers(run, tmp_path):
    lines = run("train_hf_trainer.py", "--out", str(tmp_path / "model"))
    assert len(losses(lines)) == 3
    assert 2.5 < losses(lines)[0] < 4.6  # the mean over targets, not over micro batches, of log 97 and less
    assert losses(lines)[-1] < 0.6 * losses(lines)[0]

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 97


@pytest.mark.parametrize("lightning", [False, True])
def test_lightning_like(run, tmp_path, lightning):
    if lightning and importlib.util.find_spec("lightning") is None:
        pytest.skip("needs lightning")
    whole = run("train_lightning_like.py", *(["--lightning"] if lightning else []))
    if not lightning:
        first = run("train_lightning_like.py", "--steps", "20", "--work", str(tmp_path))
        second = run("train_lightning_like.py", "--work", str(tmp_path))
        assert first + second == whole
        assert losses(whole)[-1] < 0.6 * losses(whole)[0]
    assert losses(whole)[-1] < 2.0
