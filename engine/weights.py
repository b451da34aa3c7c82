"""The weights of a Decoder from and to a Hugging Face model folder.

One table, `hf_tensors`, says which flat range of which parameter each tensor of the folder is; loading and exporting
walk it in the order of the files, in chunks, so that beyond the model itself a few megabytes are needed. Reads and
writes model folders; knows no training.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import MANIFEST, hash_inputs
from .config import ModelConfig
from .model import Decoder
from .model_files import carried_files, write_model_manifest
from .ranks import Piece, Ranks
from .safetensors_io import SafetensorsFolder, SafetensorsWriter, dtype_name, is_finite
from .shards import LocalShard, local_shard
from .staging import Staging

CHUNK_ELEMENTS = 4 << 20  # 16 MB of fp32
LOADABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Our name of a layer's module -> Hugging Face's, where the two hold the same tensors.
_RENAMED = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "down": "mlp.down_proj",
}
# Tensors that older transformers stored beside the weights and that are functions of config.json.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_STACKED = ".mlp.experts.gate_up_proj"  # in a folder whose experts are stacked


Change = Callable[[str, int, Tensor], Tensor]


@dataclass(frozen=True)
class Placement:
    """One tensor of the folder is the elements [offset, offset + numel) of a parameter thought of as a flat array."""

    parameter: str
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def hf_tensors(decoder: Decoder, stacked_experts: bool = False) -> dict[str, Placement]:
    """{Hugging Face tensor name: Placement} of all weights; every parameter (adapters aside) is covered exactly, once.

    A mixture's experts have a tensor for each matrix (w1 gate, w3 up, w2 down) in released models and in what
    transformers writes, or with `stacked_experts` two for all of them, as transformers 5 holds them in memory.
    """
    tensors: dict[str, Placement] = {}
    for name, parameter in decoder.named_parameters():
        if ".adapter." in name:
            continue
        shape = tuple(parameter.shape)
        if not name.startswith("layers."):
            tensors[name if name.startswith("lm_head.") else f"model.{name}"] = Placement(name, 0, shape)
            continue
        _, index, module, kind = name.split(".")  # layers.3.qkv.bias
        offset = 0
        for part, part_shape in _parts(decoder.config, module, kind, shape, stacked_experts):
            tensors[f"model.layers.{index}.{part}"] = placement = Placement(name, offset, part_shape)
            offset += placement.numel
        assert offset == parameter.numel(), f"{name}: {offset} of {parameter.numel()} elements placed"
    return tensors


def _parts(
    config: ModelConfig, module: str, kind: str, shape: tuple[int, ...], stacked_experts: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """Names within the layer, and shapes, of the tensors that lie end to end in the parameter `module.kind`."""
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_local_experts or 0
    match module, kind:
        case "experts", "gate_up" if stacked_experts:
            return [("mlp.experts.gate_up_proj", (experts, 2 * width, hidden))]
        case "experts", "down" if stacked_experts:
            return [("mlp.experts.down_proj", (experts, hidden, width))]
        case "experts", "gate_up":
            names = [f"block_sparse_moe.experts.{e}.{matrix}.weight" for e in range(experts) for matrix in ("w1", "w3")]
            return [(name, (width, hidden)) for name in names]
        case "experts", "down":
            return [(f"block_sparse_moe.experts.{e}.w2.weight", (hidden, width)) for e in range(experts)]
        case "qkv", _:
            queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
            rows = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
        case "gate_up", _:
            rows = {"mlp.gate_proj": width, "mlp.up_proj": width}
        case "router", _:
            rows = {"mlp.gate" if stacked_experts else "block_sparse_moe.gate": experts}
        case _:
            rows = {_RENAMED[module]: shape[0]}
    return [(f"{part}.{kind}", (n, *shape[1:])) for part, n in rows.items()]


def check_tensors(decoder: Decoder, folder: SafetensorsFolder) -> dict[str, Placement]:
    """Placements of the folder's tensors, in file order, after checking names, shapes and dtypes both ways.

    A tied model may also store `lm_head.weight`; it gets the embedding's placement. Computed buffers get none.

    Raises:
        ValueError: naming the folder and the tensors that are missing, unexpected, or of another shape or dtype.
    """
    wanted = hf_tensors(decoder, stacked_experts=any(name.endswith(_STACKED) for name in folder.names))
    if decoder.lm_head is None and "lm_head.weight" in folder:
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    present = [name for name in folder.names if name in wanted or not _COMPUTED.search(name)]
    missing, unexpected = sorted(wanted.keys() - set(present)), sorted(set(present) - wanted.keys())
    if missing or unexpected:
        problems = [f"{len(names)} {problem}: {_first_of(names)}"
                    for problem, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        hint = "; config.json does not say tie_word_embeddings: true" if missing == ["lm_head.weight"] else ""
        raise ValueError(f"{folder.path}: tensors do not fit config.json: {'; '.join(problems)}{hint}")
    for name in present:
        if folder.shape(name) != wanted[name].shape:
            raise ValueError(
                f"{folder.file_of(name)}: {name} has shape {list(folder.shape(name))}, "
                f"by config.json it should have {list(wanted[name].shape)}"
            )
        if folder.dtype(name) not in LOADABLE:
            allowed = ", ".join(dtype_name(dtype) for dtype in LOADABLE)
            raise ValueError(f"{folder.file_of(name)}: {name} is {dtype_name(folder.dtype(name))}; allowed: {allowed}")
    return {name: wanted[name] for name in present}


@torch.no_grad()
def load_weights(
    decoder: Decoder,
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> None:
    """Give a decoder, built under `torch.device("meta")`, memory on `device` and the weights of a model folder.

    Of a decoder that is sharded (FSDP2, HSDP) every rank reads what it holds, in the order of the files, and no more.
    All ranks must call this then. Beyond the weights this takes a few megabytes of host memory.

    Values are rounded to `dtype` once. Every shard is written as a whole, exactly once. The vocabulary keeps the size
    it has in the folder, padding included.

    Args:
        ranks: who shares the decoder; None: all ranks if any parameter is a DTensor, else this process alone.

    Raises:
        FileNotFoundError, ValueError: before anything is read, for files and tensors that do not fit (`check_tensors`);
            after reading, naming the first tensor that holds NaN or Inf; for a tied model with another `lm_head`. If
            one rank finds it, all raise it.
    """
    ranks = ranks or Ranks.of(decoder.parameters())
    with contextlib.ExitStack() as stack:
        with ranks.together():
            source = stack.enter_context(SafetensorsFolder(folder))
            placements = check_tensors(decoder, source)
        with ranks.together():
            decoder.to(dtype).to_empty(device=device)
            shards = {name: local_shard(parameter) for name, parameter in decoder.named_parameters()}
            if decoder.lm_head is None and "lm_head.weight" in placements:
                del placements["lm_head.weight"]
                _check_tied_head(source, shards["embed_tokens.weight"])
            _read_shards(source, placements, shards)


def _read_shards(
    source: SafetensorsFolder, placements: Mapping[str, Placement], shards: Mapping[str, LocalShard]
) -> None:
    device, dtype = next((shard.values.device, shard.values.dtype) for shard in shards.values())
    staging = Staging(device, CHUNK_ELEMENTS * max(source.dtype(name).itemsize for name in placements))
    ranges = []
    for name, placement in placements.items():
        first, part = shards[placement.parameter].part_of(placement.offset, placement.offset + placement.numel)
        ranges += [(name, first + lo, first + hi) for lo, hi in chunks(part.numel())]
    written = dict.fromkeys(shards, 0)
    finite: list[tuple[str, Tensor]] = []
    for name, lo, hi in source.read_ahead(ranges):
        placement = placements[name]
        _, values = shards[placement.parameter].part_of(placement.offset + lo, placement.offset + hi)
        if source.dtype(name) == dtype and device.type == "cpu":
            source.read_into(name, lo, values)
        else:
            read = source.read_into(name, lo, staging.next_buffer(hi - lo, source.dtype(name)))
            values.copy_(read.to(device, non_blocking=True))
            staging.mark()
        finite.append((name, _all_finite(values)))
        written[placement.parameter] += values.numel()
    for name, count in written.items():
        held = shards[name].values.numel()
        assert count == held, f"{name}: {count} of {held} elements written"
    if finite:  # asked once, at the end: a GPU is not waited for meanwhile
        for (name, _), is_good in zip(finite, torch.stack([flag for _, flag in finite]).tolist()):
            if not is_good:
                raise ValueError(f"{source.file_of(name)}: {name} holds NaN or Inf (as {dtype_name(dtype)})")


def _check_tied_head(source: SafetensorsFolder, embedding: LocalShard) -> None:
    """Compare the stored head with the embedding, in the range that this rank holds."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    same = source.dtype(names[0]) == source.dtype(names[1])
    for lo, hi in chunks(embedding.values.numel()) if same else ():
        buffers = [torch.empty(hi - lo, dtype=source.dtype(name)) for name in names]
        same = same and torch.equal(
            *(source.read_into(name, embedding.first + lo, buffer) for name, buffer in zip(names, buffers))
        )
    if not same:
        raise ValueError(
            f"{source.path}: config.json says tie_word_embeddings: true, but {names[0]} differs from {names[1]}"
        )


@torch.no_grad()
def export_model(
    decoder: Decoder,
    source_folder: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    *,
    parallel_write: bool = True,
    ranks: Ranks | None = None,
    change: Change | None = None,
) -> None:
    """Publish a decoder as a Hugging Face folder: names, order and shards of the folder it came from, whose config,
    tokenizer, chat template and licence files are carried along.

    A sharded decoder is written by all ranks in parallel, each what it holds; all must call this. The bytes do not
    depend on the number of ranks.

    Args:
        decoder: with weights, of the same shapes as the source.
        source_folder: the model folder it was loaded from.
        out: must not exist, or be empty; complete or not there.
        dtype: of all weights. None: each tensor has the source's dtype, to which weights trained in a wider one are
            rounded once. Weights held in a dtype that cannot hold the source's (bf16 for fp32 or fp16) are stored as
            they are held, and a warning says so. config.json is changed if and only if a dtype is.
        provenance: what the caller knows of how the weights came about, for the manifest.
        parallel_write: False for file systems on which processes cannot write one file side by side: rank 0 collects
            the weights in small pieces and writes alone.
        ranks: who shares the decoder; None: all ranks if any parameter is a DTensor, else this process alone.
        change: what is stored instead of some flat elements of a tensor of the folder, from its name, the number of the
            first of them and their values; in any dtype, and rounded afterwards. What a merge of adapters is made of.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: decoder and source do not fit, or a weight is NaN or Inf; nothing is published.
        OSError: the disk is full; nothing is published. An error of one rank is raised on all.
    """
    source_folder, out = Path(source_folder), Path(out)
    ranks = ranks or Ranks.of(decoder.parameters())
    with contextlib.ExitStack() as stack, ranks.published_folder(out) as folder:
        source = stack.enter_context(SafetensorsFolder(source_folder))
        if (given := ModelConfig.from_folder(source_folder)) != decoder.config:
            keys = [key for key, value in vars(given).items() if value != getattr(decoder.config, key)]
            raise ValueError(f"{source_folder}/config.json: {', '.join(keys)} differ from the decoder that is exported")
        placements = check_tensors(decoder, source)
        shards = {name: local_shard(parameter) for name, parameter in decoder.named_parameters()}
        stored: dict[str, torch.dtype] = {}
        for name, placement in placements.items():
            stored[name] = dtype or _stored_dtype(source.dtype(name), shards[placement.parameter].values.dtype)
        changed = [name for name in placements if stored[name] != source.dtype(name)]
        if changed and dtype is None and ranks.rank == 0:
            held = dtype_name(shards[placements[changed[0]].parameter].values.dtype)
            warnings.warn(
                f"{out}: {len(changed)} tensors that {source_folder} has in {dtype_name(source.dtype(changed[0]))} "
                f"were trained in {held} and are stored so",
                stacklevel=2,
            )
        if ranks.rank == 0:
            for path in carried_files(source_folder):
                target = folder / path.relative_to(source_folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            if changed:
                _set_config_dtype(folder / "config.json", stored["model.embed_tokens.weight"])

        specs = [(name, stored.get(name, source.dtype(name)), source.shape(name)) for name in source.names]
        layout = {name: source.file_of(name).name for name in source.names}
        metadata = {"format": "pt"} | source.metadata
        with SafetensorsWriter(
            folder, specs, metadata=metadata, file_of=layout, ranks=ranks, parallel=parallel_write
        ) as writer:
            if ranks.size == 1:
                shards = {name: replace(shard, writes=True) for name, shard in shards.items()}
            computed = [name for name in source.names if name not in placements]
            if ranks.rank == 0:
                for name in computed:
                    writer.write(name, source.get(name))
            writer.write_pieces(_stored_pieces(placements, shards, stored, change))
        inputs = _hash_model(source) if ranks.rank == 0 else {}
        write_model_manifest(folder, "model", inputs=inputs, provenance=dict(provenance or {}), ranks=ranks)


def _stored_pieces(
    placements: Mapping[str, Placement],
    shards: Mapping[str, LocalShard],
    stored: Mapping[str, torch.dtype],
    change: Change | None,
) -> Iterator[Piece]:
    """What this rank stores of each tensor, in the order of `placements`, in the dtypes of `stored`, on the host."""
    device = next(shard.values.device for shard in shards.values())
    staging = Staging(device, CHUNK_ELEMENTS * max(dtype.itemsize for dtype in stored.values()))
    pieces: list[tuple[str, int, Tensor]] = []  # views: where each piece comes from
    for name, placement in placements.items():
        shard = shards[placement.parameter]
        first, part = shard.part_of(placement.offset, placement.offset + placement.numel)
        if shard.writes:
            pieces += [(name, first + lo, part[lo:hi]) for lo, hi in chunks(part.numel())]
    changed = (part if change is None else change(name, first, part) for name, first, part in pieces)
    on_host = staging.to_host(part.to(stored[name]) for (name, _, _), part in zip(pieces, changed))
    for (name, first, _), values in zip(pieces, on_host):
        if not is_finite(values):
            raise ValueError(f"{name} holds NaN or Inf (as {dtype_name(stored[name])}); nothing was exported")
        yield name, first, values


def _hash_model(source: SafetensorsFolder) -> dict[str, dict[str, Any]]:
    """Hash of the manifest of a source folder, or of its files if it has none."""
    manifest = source.path / MANIFEST
    files = [manifest] if manifest.is_file() else [*source.files, *carried_files(source.path)]
    return _hash_unchanged(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=4)
def _hash_unchanged(files: tuple[tuple[Path, int, int], ...]) -> dict[str, dict[str, Any]]:
    """A run exports from one source many times; what did not change since (size, time) is hashed once."""
    return hash_inputs(file for file, _, _ in files)


def _set_config_dtype(path: Path, dtype: torch.dtype) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name(dtype)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored_dtype(source: torch.dtype, held: torch.dtype) -> torch.dtype:
    """The source's dtype if `held` can represent all its values, so that storing rounds only what training changed."""
    return source if torch.promote_types(source, held) == held else held


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """Ranges [lo, hi) that cut `count` elements into pieces small enough to pass through memory one at a time."""
    return ((lo, min(lo + CHUNK_ELEMENTS, count)) for lo in range(0, count, CHUNK_ELEMENTS))


def _all_finite(values: Tensor) -> Tensor:
    """`is_finite` as a tensor on the device."""
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def _first_of(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
