"""Low-rank adapters (LoRA) of a decoder: made, trained beside frozen weights, read and written as PEFT does, merged.

An adapter adds scale * B A to a matrix [out, in] of the Hugging Face folder: A [R, in] random, B [out, R] zero, so that
training begins at the model itself. The adapters of the matrices in one projection lie one below the other, as those
do. What the forward computes is in kernels/lora.py. Source: Hu et al. 2021, arXiv:2106.09685; rank-stabilised scale:
Kalajdzievski 2023, arXiv:2312.03732. One process: sharded decoders are refused.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.files import atomic_folder, read_json
from .config import ModelConfig
from .model import Adapter, Decoder, Layer, Projection
from .safetensors_io import SafetensorsWriter, is_finite
from .weights import chunks, hf_tensors, write_model_manifest

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."  # PEFT's, of the names that modules have in transformers
# The matrices in a projection, and of which module of a layer transformers has them.
_PARTS: dict[str, tuple[str, tuple[Target, ...]]] = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}
# Keys of adapter_config.json that change what an adapter computes, and the values that mean it does not.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "alora_invocation_tokens": (None,),
    "use_bdlora": (None, False),
}


class LoraConfig(BaseModel):
    """The `lora` section of a training recipe: train adapters and leave the model's own weights as they are.

    rank: R. alpha: the product B A counts alpha / R times, with `rslora` alpha / sqrt(R) times.
    target_modules: matrices that get an adapter, in every layer, by their names in transformers (None: all of them; of
        a mixture of experts those of attention).
    dtype: of the adapters, their moments and their export. Products are computed in the dtype of the weights.
    seed: of the random A.
    start: PEFT folder with an adapter to go on with. Rank, alpha, rslora and target_modules are then its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    rslora: bool = False
    target_modules: tuple[Target, ...] | None = Field(default=None, min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    start: Path | None = None

    @model_validator(mode="after")
    def _check_start(self) -> LoraConfig:
        keys = ("rank", "alpha", "rslora", "target_modules")
        given = [key for key in keys if getattr(self, key) != type(self).model_fields[key].default]
        if self.start is not None and given:
            raise ValueError(f"start: an adapter brings its own {', '.join(given)}; leave them out")
        return self

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def resolved(self) -> LoraConfig:
        """Itself, or with `start` what that adapter says it is. FileNotFoundError, ValueError: see `read_config`."""
        if self.start is None:
            return self
        return read_config(self.start).model_copy(update={"dtype": self.dtype, "seed": self.seed, "start": self.start})

    def targets(self, config: ModelConfig) -> tuple[Target, ...]:
        """The matrices that get an adapter, in the order of the layer.

        Raises:
            ValueError: one that the model does not have, or a rank that is not below what the smallest can use.
        """
        present = [name for module, parts in _PARTS.values() for name in parts
                   if module == "self_attn" or config.num_local_experts is None]  # fmt: skip
        wanted = present if self.target_modules is None else self.target_modules
        for name in wanted:
            if name not in present:
                raise ValueError(
                    f"lora.target_modules: {name} is inside the experts of {config.model_type}; allowed: "
                    f"{', '.join(present)}"
                )
        chosen = tuple(name for name in present if name in wanted)
        smallest = min(min(shape) for name, shape in _shapes(config).items() if name in chosen)
        if self.rank > smallest:
            raise ValueError(
                f"lora.rank: {self.rank}, but the smallest matrix of target_modules has rank {smallest}; allowed: up "
                f"to {smallest}"
            )
        return chosen


def _shapes(config: ModelConfig) -> dict[Target, tuple[int, int]]:
    hidden, width = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, queries),
        "gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width),
    }  # fmt: skip


def add_adapters(decoder: Decoder, config: LoraConfig) -> None:
    """Freeze a decoder that has its weights, and give it adapters in `config.dtype`: new ones, or those of
    `config.start`. A is uniform in +-1 / sqrt(in), as in PEFT, from `config.seed`, whatever the device.

    Raises:
        FileNotFoundError, ValueError: by name, what is missing or does not fit the model.
    """
    if any(hasattr(parameter, "device_mesh") for parameter in decoder.parameters()):
        raise ValueError("lora: works in one process only, the decoder is sharded over several")
    resolved = config.resolved()
    targets = resolved.targets(decoder.config)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    generator = torch.Generator().manual_seed(config.seed)
    device, rank = decoder.norm.weight.device, resolved.rank
    decoder.requires_grad_(False)
    for _, _, matrix, parts in _projections(decoder):
        spans, end = [], 0
        for name in parts:
            begin, end = end, end + _shapes(decoder.config)[name][0]
            if name in targets:
                spans.append((begin, end))
        if not spans:
            continue
        a = torch.empty(len(spans) * rank, matrix.in_features)
        a.uniform_(-(matrix.in_features**-0.5), matrix.in_features**-0.5, generator=generator)
        b = torch.zeros(sum(hi - lo for lo, hi in spans), rank, dtype=dtype, device=device)
        matrix.adapter = Adapter(a.to(device, dtype), b, tuple(spans), resolved.scale)
    if config.start is not None:
        _read_adapters(decoder, config.start)


def _projections(decoder: Decoder) -> Iterator[tuple[int, str, Projection, tuple[Target, ...]]]:
    """(layer, module of transformers that has it, projection, matrices in it) of all that could have adapters."""
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        for name, (module, parts) in _PARTS.items():
            if hasattr(layer, name):
                yield index, module, getattr(layer, name), parts


def adapted(decoder: Decoder) -> bool:
    """Whether a decoder has adapters."""
    return any(matrix.adapter is not None for _, _, matrix, _ in _projections(decoder))


def adapter_tensors(decoder: Decoder) -> dict[str, tuple[Tensor, Tensor, float]]:
    """{name of a matrix as in the Hugging Face folder, without ".weight": (A [R, in], B [out, R], scale)}; views."""
    tensors = {}
    for index, module, matrix, parts in _projections(decoder):
        adapter = matrix.adapter
        if adapter is None:
            continue
        ends = list(itertools.accumulate(_shapes(decoder.config)[name][0] for name in parts))
        rank, row = adapter.b.shape[1], 0
        for number, (lo, hi) in enumerate(adapter.spans):
            a = adapter.a.detach()[number * rank : (number + 1) * rank]
            b = adapter.b.detach()[row : row + hi - lo]
            tensors[f"model.layers.{index}.{module}.{parts[ends.index(hi)]}"] = a, b, adapter.scale
            row += hi - lo
    return tensors


# --- PEFT's files ----------------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> LoraConfig:
    """What adapter_config.json says.

    Raises:
        FileNotFoundError: no such file. ValueError: a setting that these adapters do not have.
    """
    file = Path(folder) / ADAPTER_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; a PEFT folder has {ADAPTER_CONFIG} and {ADAPTER_FILE}")
    values = read_json(file)
    for key, allowed in _PLAIN.items():
        if key in values and values[key] not in allowed:
            raise ValueError(f"{file}: {key} is {values[key]!r}; allowed: {allowed[0]!r}")
    names = {name.rsplit(".", 3)[1] for name in _peft_shapes(Path(folder) / ADAPTER_FILE)}
    for name in sorted(names):
        if name not in get_args(Target):
            raise ValueError(
                f"{file.parent / ADAPTER_FILE}: an adapter of {name}; allowed: {', '.join(get_args(Target))}"
            )
    try:
        return LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            rslora=values.get("use_rslora") or False,
            target_modules=tuple(sorted(names)),  # type: ignore[arg-type]
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def _peft_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; adapters are read from safetensors only")
    try:
        with safe_open(str(file), "pt") as source:
            return {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: {error}") from None


def _peft_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors, by name; views."""
    tensors = {}
    for name, (a, b, _) in adapter_tensors(decoder).items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b
    return tensors


def _read_adapters(decoder: Decoder, folder: Path) -> None:
    file = folder / ADAPTER_FILE
    wanted, found = _peft_tensors(decoder), _peft_shapes(file)
    for problem, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{file}: {len(names)} {problem} tensors, for example {min(names)}")
    for name, tensor in wanted.items():
        if found[name] != tuple(tensor.shape):
            raise ValueError(f"{file}: {name} has shape {list(found[name])}, expected {list(tensor.shape)}")
    with safe_open(str(file), "pt") as source:
        for name, tensor in wanted.items():
            tensor.copy_(source.get_tensor(name))
            if not is_finite(tensor):
                raise ValueError(f"{file}: {name} holds NaN or Inf (as {tensor.dtype})")


def export_adapters(
    decoder: Decoder,
    config: LoraConfig,
    base: str | Path,
    out: str | Path,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Publish the adapters as a folder that peft.PeftModel.from_pretrained opens on the model `base`.

    Raises:
        FileExistsError: `out` is not empty. ValueError: NaN or Inf in an adapter; nothing is published.
    """
    config, tensors = config.resolved(), _peft_tensors(decoder)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.rslora,
        "target_modules": list(config.targets(decoder.config)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_folder(Path(out)) as folder:
        specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
        with SafetensorsWriter(folder, specs, file_of=dict.fromkeys(tensors, ADAPTER_FILE)) as writer:
            for name, tensor in tensors.items():
                if not is_finite(tensor):
                    raise ValueError(f"{name} holds NaN or Inf; nothing was exported")
                writer.write(name, tensor)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_model_manifest(folder, "adapter", inputs={}, provenance=dict(provenance or {}))


# --- merging ---------------------------------------------------------------------------------------------------------


def merged_values(decoder: Decoder) -> Callable[[str, int, Tensor], Tensor]:
    """What `weights.export_model` takes as `change`: flat elements of a matrix with its adapter added, in fp32."""
    tensors = adapter_tensors(decoder)

    def change(name: str, first: int, values: Tensor) -> Tensor:
        if (found := tensors.get(name.removesuffix(".weight"))) is None or not name.endswith(".weight"):
            return values
        a, b, scale = found
        width = a.shape[1]
        row, last = first // width, -(-(first + values.numel()) // width)
        delta = scale * (b[row:last].float() @ a.float())
        return values.float() + delta.view(-1)[first - row * width :][: values.numel()]

    return change


@torch.no_grad()
def merge_adapters(decoder: Decoder) -> None:
    """Add the adapters to the weights in place, in fp32 and rounded once, and take them away: a plain decoder is left,
    whose weights are still frozen. To export a merged model this is not needed: see `merged_values`."""
    change = merged_values(decoder)
    parameters = dict(decoder.named_parameters())
    for name, placement in hf_tensors(decoder).items():
        values = parameters[placement.parameter].view(-1)[placement.offset : placement.offset + placement.numel]
        for lo, hi in chunks(placement.numel):
            values[lo:hi].copy_(change(name, lo, values[lo:hi]))
    for _, _, matrix, _ in _projections(decoder):
        matrix.adapter = None
