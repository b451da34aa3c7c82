"""Weights of a sharded model on 1 to 4 real ranks: the bytes of one process, little memory, faults told to all."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from steep.engine import weights
from steep.engine.config import ModelConfig
from steep.engine.model import Decoder
from steep.engine.ranks import Ranks
from steep.engine.safetensors_io import INDEX_FILE, SafetensorsFolder, SafetensorsWriter
from steep.engine.shards import local_shard
from steep.engine.weights import export_model, hf_tensors, load_weights
from tests.processes import exit_codes, limited_files, meshes, process_group, raises_everywhere, run_ranks

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 41,  # no rank count divides it
    "hidden_size": 6,
    "intermediate_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,  # q_norm and k_norm have 2 rows, fewer than ranks
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


MIXTRAL = {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}


MODELS = ("untied", "tied", "stored_head", "mixtral", "stacked")


def make_model(
    folder: Path, *, max_shard_bytes: int = 1000, stored_head: bool = False, stacked_experts: bool = False, **changes
) -> Path:
    """Random weights in bf16, in several files. `stored_head`: a tied model that stores its head none the less."""
    folder.mkdir()
    config = QWEN3 | changes
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_dict(config))
    shapes = {name: placement.shape for name, placement in hf_tensors(decoder, stacked_experts).items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    if stored_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    specs = [(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(folder, specs, max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    return folder


def sharded_decoder(folder: Path, mesh) -> Decoder:
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        decoder = Decoder(ModelConfig.from_folder(folder))
    for unit in (*decoder.layers, *([] if decoder.lm_head is None else [decoder.lm_head]), decoder):
        fully_shard(unit, mesh=mesh)
    return decoder


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.startswith("model")}


# --- the same bytes on every number of ranks ---


def _round_trips(rank: int, root: Path) -> None:
    weights.CHUNK_ELEMENTS = 13
    for world_size in (1, 2, 3, 4):
        if rank >= world_size:
            continue
        with process_group(root, rank, world_size):
            for kind, mesh in meshes(world_size).items():
                for model in MODELS if world_size == 3 else ("untied", "mixtral"):
                    decoder = sharded_decoder(root / model, mesh)
                    load_weights(decoder, root / model, torch.float32)
                    _check_values(decoder, root / model)
                    for way, parallel in (("parallel", True), ("gathered", False)):
                        out = root / f"{model}-{kind}-{world_size}-{way}"
                        export_model(decoder, root / model, out, parallel_write=parallel, provenance={"step": 1})
                        assert out.is_dir()
                decoder = sharded_decoder(root / "untied", mesh)
                load_weights(decoder, root / "untied", torch.bfloat16)
                _check_values(decoder, root / "untied")
                export_model(decoder, root / "untied", root / f"wide-{kind}-{world_size}", dtype=torch.float32)


def _check_values(decoder: Decoder, folder: Path) -> None:
    """Every element of every local shard, read by the safetensors library."""
    from safetensors.torch import load_file

    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, placement in hf_tensors(decoder, "model.layers.0.mlp.experts.gate_up_proj" in tensors).items():
        shard = local_shard(decoder.get_parameter(placement.parameter))
        first, part = shard.part_of(placement.offset, placement.offset + placement.numel)
        assert torch.equal(part, tensors[name].view(-1)[first : first + part.numel()].to(part.dtype)), name


def test_any_number_of_ranks_writes_the_bytes_of_one_process(tmp_path: Path) -> None:
    make_model(tmp_path / "untied")
    make_model(tmp_path / "tied", tie_word_embeddings=True, max_shard_bytes=1 << 30)
    make_model(tmp_path / "stored_head", tie_word_embeddings=True, stored_head=True)
    make_model(tmp_path / "mixtral", **MIXTRAL)
    make_model(tmp_path / "stacked", stacked_experts=True, **MIXTRAL)
    run_ranks(_round_trips, 4, tmp_path)
    for model in MODELS:
        expected = weight_files(tmp_path / model)
        outs = sorted(tmp_path.glob(f"{model}-*"))
        assert len(outs) == (10 if model in ("untied", "mixtral") else 2)
        for out in outs:
            files = json.loads((out / "manifest.json").read_text())["files"]
            assert sorted(files) == sorted(path.name for path in out.iterdir() if path.name != "manifest.json")
            assert weight_files(out) == expected, out
    assert INDEX_FILE in weight_files(tmp_path / "untied-fsdp-4-parallel")
    assert len({str(weight_files(out)) for out in tmp_path.glob("wide-*")}) == 1
    assert len(list(tmp_path.glob("wide-*"))) == 5


# --- faults of one rank are errors of all ---


def _faults(rank: int, root: Path) -> None:
    with process_group(root, rank, 3):
        mesh = meshes(3)["fsdp"]
        source = root / "untied"

        # one rank does not see a file, or sees another one
        own = root / f"own-{rank}"
        shutil.copytree(source, own)
        if rank == 1:
            sorted(own.glob("*.safetensors"))[1].unlink()
        with raises_everywhere(FileNotFoundError, "not found, but model.safetensors.index.json names it", 1):
            load_weights(sharded_decoder(source, mesh), own, torch.float32)

        # NaN in rows that the last rank alone reads
        with raises_everywhere(ValueError, r"model.embed_tokens.weight holds NaN or Inf \(as float32\)", 2):
            load_weights(sharded_decoder(source, mesh), root / "nan", torch.float32)
        with raises_everywhere(ValueError, "lm_head.weight differs from model.embed_tokens.weight", 2):
            load_weights(sharded_decoder(root / "other_head", mesh), root / "other_head", torch.float32)

        decoder = sharded_decoder(source, mesh)
        load_weights(decoder, source, torch.float32)
        full = 1 if rank == 1 else None
        with limited_files(full), raises_everywhere(OSError, "File too large: .*model-0", 1):
            export_model(decoder, source, root / "out")
        with _no_space_after(3 if rank == 0 else None), raises_everywhere(OSError, "No space left.*model-0", 0):
            export_model(decoder, source, root / "out", parallel_write=False)
        shard = local_shard(decoder.embed_tokens.weight).values
        kept = shard[-1].item()
        if rank == 1:
            shard[-1] = float("inf")
        for parallel in (True, False):
            with raises_everywhere(ValueError, r"model.embed_tokens.weight holds NaN or Inf \(as bfloat16\)", 1):
                export_model(decoder, source, root / "out", parallel_write=parallel)
        shard[-1] = kept
        with raises_everywhere(FileExistsError, "untied: already exists and is not empty", 0):
            export_model(decoder, source, source)
        if rank == 0:
            assert not [path for path in root.iterdir() if "out" in path.name]
        export_model(decoder, source, root / "out")  # and nothing is stuck


@contextlib.contextmanager
def _no_space_after(ranges: int | None):
    """The disk is full in the middle of writing, though blocks were reserved (a quota, say)."""
    left = [ranges]
    write_range = SafetensorsWriter.write_range

    def limited(writer: SafetensorsWriter, name: str, lo: int, values: torch.Tensor) -> None:
        if left[0] == 0:
            raise OSError(28, os.strerror(28), str(writer._entry(name).file))
        left[0] = left[0] and left[0] - 1
        write_range(writer, name, lo, values)

    SafetensorsWriter.write_range = limited
    try:
        yield
    finally:
        SafetensorsWriter.write_range = write_range


def test_a_fault_of_one_rank_stops_all_with_its_error(tmp_path: Path) -> None:
    make_model(tmp_path / "untied")
    for name, tensor in (("nan", "model.embed_tokens.weight"), ("other_head", "lm_head.weight")):
        changes = {"tie_word_embeddings": True, "stored_head": True} if name == "other_head" else {}
        folder = make_model(tmp_path / name, **changes)
        with SafetensorsFolder(folder) as tensors:
            file, offset = tensors.file_of(tensor), tensors._entries[tensor].offset
        data = bytearray(file.read_bytes())
        last = offset + 41 * 6 * 2 - 2  # the last element
        data[last : last + 2] = b"\xc0\x7f" if name == "nan" else b"\x01\x01"
        file.write_bytes(data)
    run_ranks(_faults, 3, tmp_path)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "untied")


def _one_dies(rank: int, root: Path, parallel: bool) -> None:
    with contextlib.suppress(RuntimeError), process_group(root, rank, 3):
        decoder = sharded_decoder(root / "untied", meshes(3)["fsdp"])
        ranks = Ranks.world(timeout_seconds=5)
        load_weights(decoder, root / "untied", torch.float32, ranks=ranks)
        if rank == 1:
            weights.is_finite = lambda values: os.kill(os.getpid(), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="died or is stuck") as caught:
            export_model(decoder, root / "untied", root / "out", parallel_write=parallel, ranks=ranks)
        assert time.monotonic() - started < 30
        (root / f"error-{rank}").write_text(str(caught.value))
    os._exit(0)  # without waiting for the dead rank


@pytest.mark.parametrize("parallel", [True, False])
def test_a_dead_rank_is_named_in_bounded_time_and_nothing_is_published(tmp_path: Path, parallel: bool) -> None:
    make_model(tmp_path / "untied")
    assert exit_codes(_one_dies, 3, tmp_path, parallel) == [0, -signal.SIGKILL, 0]
    assert re.search(r"[Rr]anks? 1\b", (tmp_path / "error-0").read_text())
    assert not (tmp_path / "out").exists()


# --- memory ---


def _peak_memory(rank: int, root: Path) -> None:
    with process_group(root, rank, 2):
        decoder = sharded_decoder(root / "large", meshes(2)["fsdp"])
        held = sum(local_shard(p).values.numel() for p in decoder.parameters()) * 2
        for action, allowed in (
            (lambda: load_weights(decoder, root / "large", torch.bfloat16), held),
            (lambda: export_model(decoder, root / "large", root / "out"), 0),
            (lambda: export_model(decoder, root / "large", root / "gathered", parallel_write=False), 0),
        ):
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            action()
            grown = _resident("VmHWM") - before
            assert grown < allowed + 48e6, f"{grown / 1e6:.0f} MB more for {allowed / 1e6:.0f} MB of weights"


def _resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status).group(1)) * 1024


def test_no_rank_ever_holds_more_than_its_shard_and_a_few_megabytes(tmp_path: Path) -> None:
    sizes = {"vocab_size": 80_001, "hidden_size": 512, "intermediate_size": 4096}
    make_model(tmp_path / "large", max_shard_bytes=1 << 30, **sizes)
    size = sum(len(data) for data in weight_files(tmp_path / "large").values())
    assert size > 180e6
    run_ranks(_peak_memory, 2, tmp_path)
