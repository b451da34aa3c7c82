"""The weights of a Decoder from and to a Hugging Face model folder.

One table, `hf_tensors`, says which rows of which parameter each tensor of the folder is; loading and exporting walk it
in the order of the files, in chunks, so that beyond the model itself a few megabytes are needed. Reads and writes model
folders; knows no training.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.files import MANIFEST, atomic_folder, hash_inputs
from .config import ModelConfig
from .model import Decoder
from .model_files import carried_files, write_model_manifest
from .safetensors_io import SafetensorsFolder, SafetensorsWriter

CHUNK_ELEMENTS = 4 << 20  # 16 MB of fp32
LOADABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tensors that older transformers stored beside the weights and that are functions of config.json.
_COMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class Placement:
    """One tensor of the folder is the rows [row, row + shape[0]) of a parameter."""

    parameter: str
    row: int
    shape: tuple[int, ...]


def hf_tensors(decoder: Decoder) -> dict[str, Placement]:
    """{Hugging Face tensor name: Placement} of all weights; the rows of every parameter are covered exactly once."""
    config = decoder.config
    attended, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = {"self_attn.q_proj": attended, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
    gate_up = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), config.intermediate_size)
    fused = {"qkv": qkv, "gate_up": gate_up}
    renamed = {
        "input_norm": "input_layernorm",
        "post_norm": "post_attention_layernorm",
        "o": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "down": "mlp.down_proj",
    }
    tensors: dict[str, Placement] = {}
    for name, parameter in decoder.named_parameters():
        shape = tuple(parameter.shape)
        if not name.startswith("layers."):
            tensors[name if name.startswith("lm_head.") else f"model.{name}"] = Placement(name, 0, shape)
            continue
        _, index, module, kind = name.split(".")  # layers.3.qkv.bias
        row = 0
        for part, rows in (fused[module] if module in fused else {renamed[module]: shape[0]}).items():
            tensors[f"model.layers.{index}.{part}.{kind}"] = Placement(name, row, (rows, *shape[1:]))
            row += rows
        assert row == shape[0], f"{name}: {row} of {shape[0]} rows placed"
    return tensors


def check_tensors(decoder: Decoder, folder: SafetensorsFolder) -> dict[str, Placement]:
    """Placements of the folder's tensors, in file order, after checking names, shapes and dtypes both ways.

    A tied model may also store `lm_head.weight`; it gets the embedding's placement. Computed buffers get none.

    Raises:
        ValueError: naming the folder and the tensors that are missing, unexpected, or of another shape or dtype.
    """
    wanted = hf_tensors(decoder)
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
            allowed = ", ".join(_dtype_name(dtype) for dtype in LOADABLE)
            raise ValueError(f"{folder.file_of(name)}: {name} is {_dtype_name(folder.dtype(name))}; allowed: {allowed}")
    return {name: wanted[name] for name in present}


@torch.no_grad()
def load_weights(decoder: Decoder, folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Give a decoder, built under `torch.device("meta")`, memory on `device` and the weights of a model folder.

    Values are rounded to `dtype` once. Every row of every parameter is written exactly once. The vocabulary keeps the
    size it has in the folder, padding included.

    Raises:
        FileNotFoundError, ValueError: before anything is read, for files and tensors that do not fit (`check_tensors`);
            while reading, naming the first tensor that holds NaN or Inf; for a tied model with another `lm_head`.
    """
    with SafetensorsFolder(folder) as source:
        placements = check_tensors(decoder, source)
        if decoder.lm_head is None and "lm_head.weight" in source:
            _check_tied_head(source)
        decoder.to(dtype).to_empty(device=device)
        parameters = dict(decoder.named_parameters())
        rows_written = dict.fromkeys(parameters, 0)
        for name, placement in placements.items():
            if name == "lm_head.weight" and decoder.lm_head is None:
                continue
            flat = _rows(parameters[placement.parameter], placement)
            for lo, hi in chunks(flat.numel()):
                direct = source.dtype(name) == dtype and flat.device.type == "cpu"
                buffer = flat[lo:hi] if direct else torch.empty(hi - lo, dtype=source.dtype(name))
                values = source.read_into(name, lo, buffer).to(dtype)
                if not is_finite(values):
                    raise ValueError(f"{source.file_of(name)}: {name} holds NaN or Inf (as {_dtype_name(dtype)})")
                if not direct:
                    flat[lo:hi].copy_(values)
            rows_written[placement.parameter] += placement.shape[0]
        for name, rows in rows_written.items():
            assert rows == parameters[name].shape[0], f"{name}: {rows} of {parameters[name].shape[0]} rows written"


def _check_tied_head(source: SafetensorsFolder) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    same = source.dtype(head) == source.dtype(embedding)
    for lo, hi in chunks(math.prod(source.shape(head))):
        same = same and torch.equal(
            *(source.read_into(name, lo, torch.empty(hi - lo, dtype=source.dtype(name))) for name in (head, embedding))
        )
    if not same:
        raise ValueError(
            f"{source.path}: config.json says tie_word_embeddings: true, but {head} differs from {embedding}"
        )


@torch.no_grad()
def export_model(
    decoder: Decoder,
    source_folder: str | Path,
    out: str | Path,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Publish a decoder as a Hugging Face folder: names, order and shards of the folder it came from, whose config,
    tokenizer, chat template and licence files are carried along.

    Args:
        decoder: with weights, of the same shapes as the source.
        source_folder: the model folder it was loaded from.
        out: must not exist, or be empty; complete or not there.
        dtype: of all weights. None: each tensor has the source's dtype, to which weights trained in a wider one are
            rounded once. Weights held in a dtype that cannot hold the source's (bf16 for fp32 or fp16) are stored as
            they are held, and a warning says so. config.json is changed if and only if a dtype is.
        provenance: what the caller knows of how the weights came about, for the manifest.

    Raises:
        FileExistsError: `out` is not empty.
        ValueError: decoder and source do not fit, or a weight is NaN or Inf; nothing is published.
        OSError: the disk is full; nothing is published.
    """
    source_folder, out = Path(source_folder), Path(out)
    parameters = dict(decoder.named_parameters())
    with SafetensorsFolder(source_folder) as source, atomic_folder(out) as folder:
        if (given := ModelConfig.from_folder(source_folder)) != decoder.config:
            keys = [key for key, value in vars(given).items() if value != getattr(decoder.config, key)]
            raise ValueError(f"{source_folder}/config.json: {', '.join(keys)} differ from the decoder that is exported")
        placements = check_tensors(decoder, source)
        stored: dict[str, torch.dtype] = {}
        for name, placement in placements.items():
            stored[name] = dtype or _stored_dtype(source.dtype(name), parameters[placement.parameter].dtype)
        changed = [name for name in placements if stored[name] != source.dtype(name)]
        if changed and dtype is None:
            held = _dtype_name(parameters[placements[changed[0]].parameter].dtype)
            warnings.warn(
                f"{out}: {len(changed)} tensors that {source_folder} has in {_dtype_name(source.dtype(changed[0]))} "
                f"were trained in {held} and are stored so",
                stacklevel=2,
            )
        for path in carried_files(source_folder):
            target = folder / path.relative_to(source_folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        if changed:
            _set_config_dtype(folder / "config.json", stored["model.embed_tokens.weight"])

        specs = [(name, stored.get(name, source.dtype(name)), source.shape(name)) for name in source.names]
        layout = {name: source.file_of(name).name for name in source.names}
        with SafetensorsWriter(folder, specs, metadata={"format": "pt"} | source.metadata, file_of=layout) as writer:
            for name in source.names:
                if name not in placements:  # a computed buffer
                    writer.write(name, source.get(name))
                    continue
                flat = _rows(parameters[placements[name].parameter], placements[name])
                for lo, hi in chunks(flat.numel()):
                    values = flat[lo:hi].to(stored[name]).cpu()
                    if not is_finite(values):
                        raise ValueError(f"{name} holds NaN or Inf (as {_dtype_name(stored[name])}); {out} not written")
                    writer.write_range(name, lo, values)
        write_model_manifest(folder, "model", inputs=_hash_model(source), provenance=dict(provenance or {}))


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
    config["dtype" if "dtype" in config else "torch_dtype"] = _dtype_name(dtype)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stored_dtype(source: torch.dtype, held: torch.dtype) -> torch.dtype:
    """The source's dtype if `held` can represent all its values, so that storing rounds only what training changed."""
    return source if torch.promote_types(source, held) == held else held


def _rows(parameter: Tensor, placement: Placement) -> Tensor:
    """The rows of a parameter that one tensor of the folder is, as a flat view."""
    return parameter.detach()[placement.row : placement.row + placement.shape[0]].view(-1)


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """Ranges [lo, hi) that cut `count` elements into pieces small enough to pass through memory one at a time."""
    return ((lo, min(lo + CHUNK_ELEMENTS, count)) for lo in range(0, count, CHUNK_ELEMENTS))


def is_finite(values: Tensor) -> bool:
    """Whether no element is NaN or Inf. aminmax passes NaN on, and allocates nothing."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_of(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
