"""Checkpoints of one process: round trip, thinning, damage, interruption and a full disk at any point."""

import json
import os
import signal
import subprocess
import sys
import threading
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from steep.engine import checkpoint
from steep.engine.checkpoint import (
    CheckpointWriter,
    DamagedCheckpoint,
    list_checkpoints,
    load_newest,
    load_state,
    read_progress,
    remove_unfinished,
    verify_checksums,
)
from steep.engine.crc32 import crc32_concat


def state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a": torch.randn(4, 3, generator=generator).to(torch.bfloat16),
        "optimizer.remainder.a": torch.arange(-6, 6, dtype=torch.int16).view(4, 3),
        "optimizer.exp_avg.a": torch.randn(4, 3, generator=generator),
        "optimizer.codes.a": torch.randint(0, 255, (12,), dtype=torch.uint8, generator=generator),
        "optimizer.step": torch.tensor(float(step)),
        "optimizer.nothing": torch.empty(0, 3),
    }


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def save(folder, step, keep=2, **options):
    writer = CheckpointWriter(folder, keep, **options)
    assert writer.save(step, state(step), {"cursor": 10 * step}) is None
    failure = writer.wait()
    if failure is not None:
        raise failure
    return folder / f"step-{step:08d}"


def steps(folder):
    return [read_progress(path)["step"] for path in list_checkpoints(folder)]


@pytest.fixture(params=[1, 5, 1 << 20])
def cell(request, monkeypatch):
    monkeypatch.setattr(checkpoint, "_CELL", request.param)


@pytest.mark.parametrize("background", [True, False])
def test_round_trip(tmp_path, cell, background):
    path = save(tmp_path, 3, background=background)
    loaded = blank()
    load_state(path, loaded)
    assert_equal(loaded, state(3))
    assert_equal(load_file(path / "model.safetensors"), state(3))  # what others read
    assert read_progress(path) == {"cursor": 30, "step": 3}
    assert verify_checksums(path) == []
    restored = load_newest(tmp_path, loaded)
    assert (restored.path, restored.progress, restored.damaged) == (path, {"cursor": 30, "step": 3}, [])
    assert load_newest(tmp_path / "nowhere", loaded) is None


def test_training_goes_on_while_it_is_written(tmp_path, monkeypatch):
    """The values are those of the call, and a second save waits for the first."""
    go_on = threading.Event()
    write_pieces = checkpoint.SafetensorsWriter.write_pieces
    monkeypatch.setattr(
        checkpoint.SafetensorsWriter, "write_pieces", lambda *args: (go_on.wait(20), write_pieces(*args))[-1]
    )
    tensors = state(1)
    writer = CheckpointWriter(tmp_path, keep=5)
    assert writer.save(1, tensors, {}) is None
    for tensor in tensors.values():
        tensor.zero_()
    assert list_checkpoints(tmp_path) == []
    go_on.set()
    assert writer.save(2, state(2), {}) is None
    assert writer.wait() is None
    for step in (1, 2):
        loaded = blank()
        load_state(tmp_path / f"step-{step:08d}", loaded)
        assert_equal(loaded, state(step))


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert steps(tmp_path) == [15, 10]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_the_newest_healthy_one_stays(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    sick = state(4)
    sick["optimizer.exp_avg.a"][1, 1] = float("nan")
    for step, tensors, healthy in ((1, state(1), True), (2, state(2), True), (3, state(3), False), (4, sick, True)):
        writer.save(step, tensors, {}, healthy)
    writer.save(5, sick, {})
    writer.wait()
    assert steps(tmp_path) == [5, 4, 2]
    writer.save(6, state(6), {})
    writer.wait()
    assert steps(tmp_path) == [6, 5]


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
    loaded = blank()
    load_state(tmp_path / "step-00000002", loaded)
    assert_equal(loaded, state(2))


def flip_bit(path, name, byte):
    """Damage one byte of a tensor, which no size shows."""
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    data[8 + header_bytes + json.loads(data[8 : 8 + header_bytes])[name]["data_offsets"][0] + byte] ^= 4
    file.write_bytes(data)


def test_a_flipped_bit_is_found_and_the_one_before_is_used(tmp_path, cell):
    for step in (1, 2):
        save(tmp_path, step)
    newest = tmp_path / "step-00000002"
    flip_bit(newest, "optimizer.exp_avg.a", 47)
    with pytest.raises(
        DamagedCheckpoint, match=r"model.safetensors: elements .*, 12\) of optimizer.exp_avg.a have CRC"
    ):
        load_state(newest, blank())
    assert len(verify_checksums(newest)) == 1
    loaded = blank()
    restored = load_newest(tmp_path, loaded)
    assert restored.path == tmp_path / "step-00000001"
    assert len(restored.damaged) == 1
    assert "optimizer.exp_avg.a" in restored.damaged[0]
    assert_equal(loaded, state(1))
    # the run goes on from step 1: what it saves before step 2 must not be thrown away for the damaged one
    save(tmp_path, 1, keep=1)
    assert steps(tmp_path) == [2, 1]
    save(tmp_path, 2, keep=1)
    assert load_newest(tmp_path, loaded).path == newest
    assert_equal(loaded, state(2))
    flip_bit(newest, "model.a", 0)
    with pytest.raises(DamagedCheckpoint, match="no checkpoint can be read: .*model.a"):
        load_newest(tmp_path, loaded)


def test_a_state_of_another_model_is_refused_before_anything_is_changed(tmp_path):
    path = save(tmp_path, 1)
    for change, message in (
        ({"model.b": torch.zeros(1)}, "1 missing tensors, for example model.b"),
        ({"model.a": torch.zeros(4, 4)}, r"model.a is torch.bfloat16 \[4, 3\], expected torch.float32 \[4, 4\]"),
    ):
        tensors = blank() | change
        with pytest.raises(ValueError, match=message) as caught:
            load_state(path, tensors)
        assert not isinstance(caught.value, DamagedCheckpoint)
        assert_equal(tensors, blank() | change)
    tensors = blank()
    del tensors["optimizer.step"]
    with pytest.raises(ValueError, match="1 unexpected tensors, for example optimizer.step"):
        load_newest(tmp_path, tensors)


def test_a_failure_is_a_value_and_leaves_nothing(tmp_path):
    save(tmp_path, 1)
    tensors = state(2)
    tensors["optimizer.exp_avg.a"] = tensors["optimizer.exp_avg.a"].to(torch.complex64)  # no such type in safetensors
    writer = CheckpointWriter(tmp_path, keep=1)
    assert writer.save(2, tensors, {}) is None
    failure = writer.save(3, state(3) | {"bad": torch.zeros(2, 3).t()}, {})
    assert isinstance(failure, ValueError)
    assert "complex64" in str(failure)
    assert "not contiguous" in str(writer.wait())  # found while copying, told as all others
    assert writer.wait() is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    assert writer.save(4, state(4), {}) is None
    assert writer.wait() is None
    assert steps(tmp_path) == [4]


FULL = """
import resource, sys, torch
from pathlib import Path
from steep.engine.checkpoint import CheckpointWriter, list_checkpoints
writer = CheckpointWriter(sys.argv[1], keep=1)
small, large = {"a": torch.zeros(1000)}, {"a": torch.zeros(100_000)}
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
assert writer.save(1, small, {}) is None
assert writer.save(2, large, {}) is None
failure = writer.save(3, large, {})
assert isinstance(failure, OSError) and "model.safetensors" in str(failure), failure
assert isinstance(writer.wait(), OSError)
print([path.name for path in Path(sys.argv[1]).iterdir()])
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert writer.save(4, large, {}) is None and writer.wait() is None
print([path.name for path in Path(sys.argv[1]).iterdir()])
"""


def test_full_disk_keeps_the_one_before_and_training_goes_on(tmp_path):
    result = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    assert result.stdout == "['step-00000001']\n['step-00000004']\n", result.stderr


KILLED = """
import sys, time, torch
from steep.engine import checkpoint
checkpoint.is_finite = lambda values: (print("piece", flush=True), time.sleep(0.02), True)[-1]
writer = checkpoint.CheckpointWriter(sys.argv[1], keep=1)
state = {f"tensor.{n}": torch.full((10,), float(n)) for n in range(100)}
writer.save(2, state, {})
writer.wait()
"""


def test_killed_while_writing_leaves_the_one_before(tmp_path):
    save(tmp_path, 1)
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline() == b"piece\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.iterdir())) == 2
    loaded = blank()
    load_newest(tmp_path, loaded)
    assert_equal(loaded, state(1))
    remove_unfinished(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_killed_while_deleting(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "manifest.json").unlink()  # deleted first, so that the rest is no checkpoint
    assert steps(tmp_path) == []
    save(tmp_path, 1)
    assert steps(tmp_path) == [1]


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crc32_of_a_whole_from_its_parts(a, b):
    assert crc32_concat(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)
