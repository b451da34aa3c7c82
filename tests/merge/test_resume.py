"""Interrupted merges: killed, failed, gone on with, never mixed with others, never published in part."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from steep.data.files import sha256_file
from steep.engine.safetensors_io import SafetensorsWriter
from steep.merge import merge, sweep
from steep.merge.journal import journaled_folder, workplace
from tests.merge.models import random_tensors, sibling, write_model, write_yaml

KILLED = """
import os, signal, sys
from steep.merge import merge, sweep
from steep.merge.journal import Journal
calls = []
def killing(add):
    def wrapped(self, part, entry):
        add(self, part, entry)
        calls.append(part)
        if len(calls) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
    return wrapped
Journal.add = killing(Journal.add)
if len(sys.argv) > 4:
    sweep(sys.argv[1], sys.argv[2], "lambda", [0.5, 1.0], max_shard_bytes=60_000)
else:
    merge(sys.argv[1], sys.argv[2], max_shard_bytes=60_000, workers=2)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    base = random_tensors(0)
    for name, tensors in {"base": base, "a": sibling(base, 1), "b": sibling(base, 2)}.items():
        write_model(folder / name, tensors, dtype=torch.bfloat16)
    models = [{"model": name, "parameters": {"weight": 0.5, "density": 0.5}} for name in "ab"]
    return write_yaml(folder / "merge.yml", {"merge_method": "ties", "base_model": "base", "models": models})


def kill_after(path: Path, out: Path, tensors: int, *more: str) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, path, out, str(tensors), *more], env=os.environ, check=False)
    assert run.returncode == -signal.SIGKILL
    assert not any(out.glob("**/config.json"))


def finished(out: Path) -> list[str]:
    lines = (workplace(out) / "journal.jsonl").read_text().splitlines()
    return [json.loads(line)["part"] for line in lines[1:]]


def contents(folder: Path) -> dict[str, str]:
    """Hashes of everything but the two records, which hold times."""
    files = (file for file in folder.iterdir() if file.name not in ("merge.json", "manifest.json"))
    return {file.name: sha256_file(file) for file in files}


def count_merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors of which any part is written, from now on."""
    names: list[str] = []
    write: Callable[..., None] = SafetensorsWriter.write_range

    def counting(self: SafetensorsWriter, name: str, lo: int, values: torch.Tensor) -> None:
        names.append(name)
        write(self, name, lo, values)

    monkeypatch.setattr(SafetensorsWriter, "write_range", counting)
    return names


def test_a_killed_merge_is_gone_on_with(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = merge(path, tmp_path / "expected", max_shard_bytes=60_000)
    out = tmp_path / "out"
    kill_after(path, out, 10)
    done = finished(out)
    assert len(done) == 10
    written, lines = count_merges(monkeypatch), []
    result = merge(path, out, max_shard_bytes=60_000, log=lines.append)
    assert set(written) == set(expected["tensors"]) - set(done)
    assert result["taken_over"] == 10
    assert f"{out}: 10 tensors were finished by an earlier run" in lines
    assert contents(out) == contents(tmp_path / "expected")
    assert result["tensors"] == expected["tensors"]
    assert result["figures"]["layers"] == expected["figures"]["layers"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["expected", "out"]


def test_killed_again_and_again(path: Path, tmp_path: Path) -> None:
    merge(path, tmp_path / "expected", max_shard_bytes=60_000)
    for more in (1, 7):
        kill_after(path, tmp_path / "out", more)
    assert len(finished(tmp_path / "out")) == 8
    merge(path, tmp_path / "out", max_shard_bytes=60_000)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_finished_tensors_are_checked(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge(path, tmp_path / "expected", max_shard_bytes=60_000)
    out = tmp_path / "out"
    kill_after(path, out, 10)
    model, journal = workplace(out) / "model", workplace(out) / "journal.jsonl"
    for file in model.glob("*.safetensors"):  # zeros for all values: none of the finished tensors is what it was
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        file.write_bytes(file.read_bytes()[:header] + bytes(file.stat().st_size - header))
    next(model.glob("*.safetensors")).unlink()
    journal.write_text(journal.read_text()[:-20])  # a line that was not finished
    written = count_merges(monkeypatch)
    result = merge(path, out, max_shard_bytes=60_000)
    assert set(written) == set(result["tensors"])
    assert contents(out) == contents(tmp_path / "expected")


@pytest.mark.parametrize("change", ["shards", "seed", "configuration", "input"])
def test_another_merge_does_not_go_on_with_it(path: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(path.parent, folder)
    path, out, lines = folder / "merge.yml", tmp_path / "out", []
    kill_after(path, out, 5)
    options: dict[str, Any] = {"max_shard_bytes": 60_000}
    if change == "shards":
        options["max_shard_bytes"] = 70_000
    elif change == "seed":
        path.write_text(path.read_text() + "random_seed: 1\n")
    elif change == "configuration":
        path.write_text(path.read_text().replace("0.5", "0.75"))
    else:
        os.utime(folder / "a" / "model.safetensors")
    result = merge(path, out, log=lines.append, **options)
    assert result["taken_over"] == 0
    assert f"{out}: the beginning of another merge lay there and was removed" in lines
    merge(path, tmp_path / "expected", **options)
    assert contents(out) == contents(tmp_path / "expected")


def test_a_killed_sweep_is_gone_on_with(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sweep(path, tmp_path / "expected", "lambda", [0.5, 1.0], max_shard_bytes=60_000)
    out = tmp_path / "out"
    kill_after(path, out, 11, "sweep")
    done = sum(len(finished(out / f"lambda={value}")) for value in (0.5, 1.0))
    assert done == 11
    written = count_merges(monkeypatch)
    results = sweep(path, out, "lambda", [0.5, 1.0], max_shard_bytes=60_000)
    assert len(set(written)) >= len(expected[0]["tensors"]) - 6
    assert sum(result["taken_over"] for result in results) == 11
    for value in (0.5, 1.0):
        assert contents(out / f"lambda={value}") == contents(tmp_path / "expected" / f"lambda={value}")


def test_two_processes_do_not_write_one_output(path: Path, tmp_path: Path) -> None:
    with (
        journaled_folder(tmp_path / "out", {"other": 1}) as journal,
        pytest.raises(FileExistsError, match="out: another process is writing it"),
    ):
        journal.add("x", {})
        merge(path, tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_too_little_space_is_found_before(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"out: .* GB are needed, the disk of .* has 0.00 GB free"):
        merge(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 12])
def test_no_space_in_the_middle(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """What is finished stays for when there is space again; if nothing is, nothing stays."""
    write, calls = SafetensorsWriter.write_range, []

    def failing(self: SafetensorsWriter, name: str, lo: int, values: torch.Tensor) -> None:
        calls.append(name)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "model.safetensors"))
        write(self, name, lo, values)

    monkeypatch.setattr(SafetensorsWriter, "write_range", failing)
    with pytest.raises(OSError, match="No space left on device.*model.safetensors"):
        merge(path, tmp_path / "out", workers=1)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ([".out.merging"] if after else [])
    assert merge(path, tmp_path / "out")["taken_over"] == after
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_input_that_changes_during_the_merge_is_noticed(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(path.parent, folder)
    with pytest.raises(ValueError, match="a/model.safetensors: changed during the merge"):
        merge(folder / "merge.yml", tmp_path / "out", progress=lambda *_: os.utime(folder / "a" / "model.safetensors"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]
