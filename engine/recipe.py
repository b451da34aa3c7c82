"""The training recipe: a YAML file, read strictly. Touches only the recipe file.

An unknown or mistyped key, a wrong type and an impossible combination are refused with the key's path, what was given
and what is allowed. `key.path=value` overrides replace single values.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.config import DataConfig
from .lora import LoraConfig
from .optimizer import AdamWConfig
from .parallel import ParallelConfig
from .schedule import ScheduleConfig
from .spikes import SpikeConfig


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BatchConfig(_Section):
    """sequences: packed sequences in one forward and backward, a micro batch. micro_batches: how many of those make one
    optimizer step, over all processes; so a step is the same step however many processes share it."""

    sequences: int = Field(default=1, ge=1)
    micro_batches: int = Field(default=1, ge=1)


class ValidationConfig(_Section):
    """When and how much of `data.validation` is measured.

    every: steps between validations; there is also one before the first step and one after the last.
    sequences: about so many packed sequences of each store, spread evenly over it (None: all).
    """

    every: int = Field(default=100, ge=1)
    sequences: int | None = Field(default=128, ge=1)


class CheckpointConfig(_Section):
    """every: steps between checkpoints; keep: how many are kept, the newest healthy one in any case. background: copy
    the state to host memory and write it while training goes on; false: no memory for a copy, and training waits; null:
    true on a GPU, false on a CPU, whose memory holds the state already."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    background: bool | None = None


class ExportConfig(_Section):
    """every: steps between exports of the model in Hugging Face form (None: only at the end); dtype of their tensors
    (None: that of training). parallel_write: every process writes its part of the files of exports and checkpoints;
    off, for file systems where several machines cannot write to one file: all is sent to rank 0, which writes."""

    every: int | None = Field(default=None, ge=1)
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    parallel_write: bool = True


class LogConfig(_Section):
    """every: steps that one line of metrics sums up (a checkpoint ends a line too); tensorboard: write for it too."""

    every: int = Field(default=10, ge=1)
    tensorboard: bool = False


class TrainRecipe(_Section):
    """A training run.

    model: Hugging Face folder to start from. out: folder for everything that the run writes.
    steps, tokens, epochs: exactly one says how long it runs. tokens counts positions of packed sequences; an epoch is
        as many sequences as all sources have together. Both are rounded up to whole steps.
    precision: of weights and computation. bfloat16 keeps an exact fp32 master of every weight (`optimizer.master`).
    lora: train low-rank adapters and not the model's own weights (None: train these). One process.
    recompute: what backward computes again rather than forward keeping it: nothing, the gate and up projections
        (`selective`: most of the memory, a sixth more FLOPs), or whole layers (`full`). The gradients are the same.
    router_aux_loss_coef: weight of a mixture's load-balancing loss. None: as transformers would train the model, which
        is not at all where its config.json does not say output_router_logits.
    float8: scaling of float8 operands in the layers' projections (None: they are as precise as the weights).
    max_consecutive_skips: the run stops when so many steps in a row were skipped, for a gradient that was not finite or
        a spike.
    """

    model: Path
    out: Path
    data: DataConfig
    schedule: ScheduleConfig
    optimizer: AdamWConfig = AdamWConfig()
    lora: LoraConfig | None = None
    batch: BatchConfig = BatchConfig()
    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"
    router_aux_loss_coef: float | None = Field(default=None, ge=0)
    float8: Literal["rowwise", "blockwise"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_consecutive_skips: int = Field(default=5, ge=1)
    spikes: SpikeConfig = SpikeConfig()
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    export: ExportConfig = ExportConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_length(self) -> TrainRecipe:
        given = [key for key in ("steps", "tokens", "epochs") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of steps, tokens and epochs; given: {', '.join(given) or 'none'}")
        if self.optimizer.in_backward and self.batch.micro_batches > 1:
            raise ValueError(
                "optimizer.in_backward keeps no gradient to add to: batch.micro_batches is "
                f"{self.batch.micro_batches}; allowed: 1"
            )
        if self.optimizer.in_backward and self.spikes.factor is not None:
            raise ValueError(
                "optimizer.in_backward updates before the loss can be judged: spikes.factor is "
                f"{self.spikes.factor:g}; allowed: null"
            )
        return self


# What a resumed run may change: where and how it reports and saves, never the order of data or the mathematics.
# The model and the data are not compared by their keys but by their content (trainer.py).
FREE_KEYS = (
    *("model", "data", "data.validation", "out", "device", "max_consecutive_skips"),
    *("validation", "checkpoint", "export", "log", "parallel", "recompute", "spikes.factor"),
)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> TrainRecipe:
    """Read a recipe file and apply overrides such as `schedule.lr=2e-5` or `data.sources.0.weight=3`.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: every mistake in it, one per line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values, str(path))


def parse_recipe(values: dict[str, Any], source: str = "recipe") -> TrainRecipe:
    """The recipe of already parsed values; `source` begins every line of an error.

    Raises:
        ValueError: every mistake, one per line.
    """
    try:
        return TrainRecipe.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {_explain(dict(mistake))}" for mistake in error.errors(include_url=False)]
        raise ValueError("\n".join(lines)) from None


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys whose values differ between two recipes in JSON form, each with both values; FREE_KEYS are left out."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if path in FREE_KEYS or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changed_keys(before, after, f"{path}.")
        else:
            changed.append(f"{path} (was {before!r}, now {after!r})")
    return changed


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ValueError(f"override {override!r}: expected key=value, for example schedule.lr=1e-5")
    *parents, last = path.split(".")
    node: Any = values
    for depth, key in enumerate(parents):
        if isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        else:
            node = node[_list_index(node, key, ".".join(parents[:depth]), override)]
    if isinstance(node, dict):
        node[last] = yaml.safe_load(text)
    else:
        node[_list_index(node, last, ".".join(parents), override)] = yaml.safe_load(text)


def _list_index(node: Any, key: str, path: str, override: str) -> int:
    if not isinstance(node, list):
        raise ValueError(f"override {override!r}: {path} is {node!r}, which has no key {key!r}")
    if not key.isdecimal() or int(key) >= len(node):
        raise ValueError(f"override {override!r}: {path} is a list of {len(node)}; allowed: 0 to {len(node) - 1}")
    return int(key)


def _explain(mistake: dict[str, Any]) -> str:
    location = mistake["loc"]
    path = ".".join(map(str, location)) or "recipe"
    if mistake["type"] == "extra_forbidden":
        allowed = list(_model_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{path}: unknown key; {hint}allowed: {', '.join(allowed)}"
    if mistake["type"] == "missing":
        return f"{path}: required, not given"
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: given {mistake['input']!r}; {message[0].lower()}{message[1:]}"


def _model_at(location: Sequence[int | str]) -> type[BaseModel]:
    """The section of the recipe at a location of a pydantic error."""
    model: type[BaseModel] = TrainRecipe
    for key in location:
        if isinstance(key, str) and key in model.model_fields:
            model = next(filter(_is_model, _leaves(model.model_fields[key].annotation)), model)
    return model


def _leaves(annotation: Any) -> list[Any]:
    """The plain types inside an annotation such as list[Section] | None."""
    inner = typing.get_args(annotation)
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
