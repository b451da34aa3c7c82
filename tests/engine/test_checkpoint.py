"""Checkpoints: round trip, thinning, damage, interruption at any point."""

import subprocess
import sys

import pytest
import torch

from steep.engine.checkpoint import list_checkpoints, load_state, read_progress, remove_unfinished, save_checkpoint


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(4, 3, generator=generator).to(torch.bfloat16),
        "optimizer.remainder.a": torch.arange(-6, 6, dtype=torch.int16).view(4, 3),
        "optimizer.exp_avg.a": torch.randn(4, 3, generator=generator),
        "optimizer.step": torch.tensor(float(step)),
    }


def save(folder, step, keep=2):
    return save_checkpoint(folder, step, state(step), {"cursor": 10 * step}, keep)


def steps(folder):
    return [read_progress(path)["step"] for path in list_checkpoints(folder)]


def test_round_trip_with_the_random_generator(tmp_path):
    torch.manual_seed(5)
    path = save(tmp_path, 3)
    expected = torch.rand(4)
    torch.manual_seed(6)
    loaded = load_state(path)
    assert torch.equal(torch.rand(4), expected)
    assert loaded.keys() == state(3).keys()
    for name, tensor in state(3).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert read_progress(path) == {"cursor": 30, "step": 3}


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert steps(tmp_path) == [15, 10]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_a_damaged_one_is_not_listed_nor_counted_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    shard = tmp_path / "step-00000002" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert steps(tmp_path) == [1]
    save(tmp_path, 3)
    assert steps(tmp_path) == [3, 1]
    save(tmp_path, 2, keep=3)  # written again in place of the damaged one
    assert steps(tmp_path) == [3, 2, 1]
    assert torch.equal(load_state(tmp_path / "step-00000002")["model.a"], state(2)["model.a"])


def test_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    tensors = state(2)
    tensors["optimizer.exp_avg.a"] = tensors["optimizer.exp_avg.a"].to(torch.complex64)  # no such type in safetensors
    with pytest.raises(ValueError, match="complex64"):
        save_checkpoint(tmp_path, 2, tensors, {}, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_killed_while_writing_or_deleting(tmp_path):
    save(tmp_path, 1)
    code = (
        "import os, sys; from steep.data.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder: (folder / 'half').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "step-00000002"], check=False)
    (tmp_path / "step-00000001" / "manifest.json").unlink()  # deleted first, so that the rest is no checkpoint
    assert len(list(tmp_path.iterdir())) == 2
    assert steps(tmp_path) == []
    remove_unfinished(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    save(tmp_path, 1)
    assert steps(tmp_path) == [1]
