"""Checkpoints of sharded states on 1 to 4 real ranks: one layout, any number resumes, faults told to all."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from steep.engine import checkpoint
from steep.engine.checkpoint import CheckpointWriter, DamagedCheckpoint, load_newest, load_state
from steep.engine.ranks import Ranks
from steep.engine.shards import local_shard
from tests.processes import (
    exit_codes,
    limited_files,
    meshes,
    process_group,
    raises_everywhere,
    run_ranks,
    same_on_all,
)

SHAPES = {"weight": (41, 6), "bias": (41,), "norm": (2,), "experts": (5, 2, 3)}


def _state(mesh, seed: int | None) -> dict[str, torch.Tensor]:
    """Weights, moments and a step, sharded as the engine has them; zeros without a seed."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(seed or 0)
    placements = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    state = {}
    for name, shape in SHAPES.items():
        for kind, dtype in (("model", torch.bfloat16), ("optimizer.exp_avg", torch.float32)):
            whole = torch.randn(shape, generator=generator).to(dtype)
            state[f"{kind}.{name}"] = distribute_tensor(whole if seed else torch.zeros_like(whole), mesh, placements)
    state["optimizer.step"] = torch.tensor(float(seed or 0))
    return state


def _assert_state(state: dict[str, torch.Tensor], mesh, seed: int) -> None:
    for name, tensor in _state(mesh, seed).items():
        assert torch.equal(local_shard(state[name]).values, local_shard(tensor).values), name


def _checkpoints(rank: int, root: Path) -> None:
    checkpoint._CELL = 16
    for world_size in (1, 2, 3, 4):
        if rank >= world_size:
            continue
        with process_group(root, rank, world_size):
            for kind, mesh in meshes(world_size).items():
                for parallel in (True, False):
                    folder = root / f"{kind}-{world_size}-{parallel}"
                    writer = CheckpointWriter(folder, 2, Ranks.world(), parallel_write=parallel)
                    for step in (1, 2, 3):
                        state = _state(mesh, step)
                        assert writer.save(step, state, {"cursor": step}, healthy=step != 3) is None
                        for tensor in state.values():  # training goes on
                            local_shard(tensor).values.zero_()
                    assert writer.wait() is None
                if world_size == 1:
                    continue
                # what the world before wrote, on this one; its newest is damaged
                before = root / f"fsdp-{world_size - 1}-True"
                dist.barrier()
                state = _state(mesh, None)
                load_state(before / "step-00000003", state)
                _assert_state(state, mesh, 3)
                dist.barrier()
                if rank == 0:
                    _damage(before / "step-00000003" / "model.safetensors", "model.weight", 480)
                dist.barrier()
                with raises_everywhere(DamagedCheckpoint, r"elements \[240, 246\) of model.weight have CRC-32"):
                    load_state(before / "step-00000003", state)
                found = load_newest(before, state)
                assert found is not None
                assert (found.path.name, found.progress, len(found.damaged)) == (
                    "step-00000002",
                    {"cursor": 2, "step": 2},
                    1,
                )
                _assert_state(state, mesh, 2)
                dist.barrier()
                if rank == 0:
                    _damage(before / "step-00000003" / "model.safetensors", "model.weight", 480)  # healed


def _damage(file: Path, name: str, byte: int) -> None:
    data = bytearray(file.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    data[8 + header_bytes + json.loads(data[8 : 8 + header_bytes])[name]["data_offsets"][0] + byte] ^= 1
    file.write_bytes(data)


def test_checkpoints_are_the_same_and_resume_on_any_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(_checkpoints, 4, tmp_path)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 10
    for step in (2, 3):
        paths = [folder / f"step-{step:08d}" for folder in folders]
        assert len({(path / "model.safetensors").read_bytes() for path in paths}) == 1
        manifests = [json.loads((path / "manifest.json").read_text()) for path in paths]
        assert len({str(manifest["checksums"]) for manifest in manifests}) == 1
        assert {manifest["figures"]["healthy"] for manifest in manifests} == {step != 3}
    assert {len(list(folder.iterdir())) for folder in folders} == {2}


def _checkpoint_faults(rank: int, root: Path) -> None:
    with process_group(root, rank, 3):
        mesh = meshes(3)["fsdp"]
        writer = CheckpointWriter(root / "run", 1, Ranks.world())
        assert writer.save(1, _state(mesh, 1), {}) is None
        assert writer.wait() is None
        with limited_files(300 if rank == 1 else None):
            assert writer.save(2, _state(mesh, 2), {}) is None
            failure = writer.wait()
        assert isinstance(failure, OSError)
        same_on_all(str(failure))
        assert "File too large" in str(failure)
        copy = CheckpointWriter._copy
        if rank == 2:  # no memory for the copy, on one rank
            CheckpointWriter._copy = lambda *args: (_ for _ in ()).throw(MemoryError("no host memory"))
        assert writer.save(3, _state(mesh, 3), {}) is None
        CheckpointWriter._copy = copy
        state = _state(mesh, 4)
        failure = writer.save(4, state, {})  # says so at the next call, and training goes on
        assert isinstance(failure, MemoryError)
        same_on_all(str(failure))
        assert writer.wait() is None
        dist.barrier()
        assert [path.name for path in (root / "run").iterdir()] == ["step-00000004"]
        other = _state(mesh, None) | ({"optimizer.step": torch.tensor(0)} if rank == 1 else {})
        with raises_everywhere(ValueError, "optimizer.step is torch.float32", 1):
            load_state(root / "run" / "step-00000004", other)


def test_a_checkpoint_that_one_rank_cannot_write_is_a_value_on_all(tmp_path: Path) -> None:
    run_ranks(_checkpoint_faults, 3, tmp_path)


def _checkpoint_dies(rank: int, root: Path) -> None:
    with contextlib.suppress(RuntimeError), process_group(root, rank, 3):
        mesh = meshes(3)["fsdp"]
        writer = CheckpointWriter(root / "run", 1, Ranks.world(timeout_seconds=5))
        assert writer.save(1, _state(mesh, 1), {}) is None
        assert writer.wait() is None
        dist.barrier()
        if rank == 1:
            checkpoint.is_finite = lambda values: os.kill(os.getpid(), signal.SIGKILL)
        assert writer.save(2, _state(mesh, 2), {}) is None
        failure = writer.wait()
        assert isinstance(failure, RuntimeError)
        (root / f"error-{rank}").write_text(str(failure))
    os._exit(0)


def test_a_rank_killed_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    assert exit_codes(_checkpoint_dies, 3, tmp_path) == [0, -signal.SIGKILL, 0]
    assert re.search(r"[Rr]anks? 1\b", (tmp_path / "error-0").read_text())
    assert "died or is stuck" in (tmp_path / "error-2").read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000001"]
    run_ranks(_resume_alone, 1, tmp_path)


def _resume_alone(rank: int, root: Path) -> None:
    with process_group(root, rank, 1):
        mesh = meshes(1)["fsdp"]
        state = _state(mesh, None)
        assert load_newest(root / "run", state) is not None
        _assert_state(state, mesh, 1)
