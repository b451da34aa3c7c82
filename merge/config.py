"""mergekit's YAML, read as it is: pydantic models, parameter resolution and the rule for model paths.

Knows no tensors and opens no weights. What mergekit ignores silently (unknown keys, misspelt parameters) is refused
here with the nearest known name; what mergekit has and steep does not have yet is refused by name.

Paths of models: an absolute path is taken as it is; a relative one is looked up from the folder of the YAML file first,
then from the current folder, and the first that is a folder counts. Nothing is downloaded.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .method_table import KNOWN_PARAMETERS, METHODS, PARAMETERS, Scalar

DType = Literal["float32", "float16", "bfloat16"]


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a mistyped name, or the list of what is allowed."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(known)}"


class Setting(BaseModel):
    """One parameter as written: rules in order, each a substring filter on tensor names and a list of values.

    A scalar is a list of one. A list of numbers is a gradient, interpolated linearly over the layers; a list of
    booleans or words selects the value whose position the layer has reached.
    """

    model_config = ConfigDict(frozen=True)
    rules: tuple[tuple[str | None, tuple[Scalar, ...]], ...]

    @classmethod
    def parse(cls, name: str, written: Any) -> Setting:
        """From YAML: a scalar, a list of scalars, `{filter, value}`, or a list of those."""
        if isinstance(written, Mapping):
            written = [written]
        if not (isinstance(written, list) and any(isinstance(entry, Mapping) for entry in written)):
            return cls(rules=((None, _values(name, written)),))
        rules = []
        for entry in written:
            if not isinstance(entry, Mapping) or "value" not in entry:
                raise ValueError(f"{name}: every entry of a list with filters needs 'value', found {entry!r}")
            for key in entry:
                if key not in ("filter", "value"):
                    raise ValueError(f"{name}: unknown key {key!r}{nearest(key, ['filter', 'value'])}")
            if entry.get("filter") is not None and not isinstance(entry["filter"], str):
                raise ValueError(f"{name}: filter must be text, found {entry['filter']!r}")
            rules.append((entry.get("filter"), _values(name, entry["value"])))
        return cls(rules=tuple(rules))

    def at(self, tensor: str, t: float) -> Scalar | None:
        """The value for a tensor at relative depth t in [0, 1], or None if no filter matches its name."""
        for pattern, values in self.rules:
            if pattern is None or pattern == "*" or pattern in tensor:
                position = t * (len(values) - 1)
                low = int(position)
                here, there = values[low], values[min(len(values) - 1, low + 1)]
                if isinstance(here, bool | str) or isinstance(there, bool | str):
                    return here
                fraction = position - low
                return (1 - fraction) * here + fraction * there
        return None

    @property
    def all_values(self) -> list[Scalar]:
        return [value for _, values in self.rules for value in values]


def _values(name: str, written: Any) -> tuple[Scalar, ...]:
    entries = written if isinstance(written, list) else [written]
    if not entries:
        raise ValueError(f"{name}: an empty list has no value")
    return tuple(PARAMETERS[name].parse(name, entry) for entry in entries)


Parameters = dict[str, Setting]


class _Section(BaseModel):
    """A part of the YAML. Unknown keys are refused with the nearest known one, keys of later storeys by name."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    not_yet: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, written: Any) -> Any:
        if not isinstance(written, Mapping):
            raise ValueError(f"expected a mapping, found {written!r}")
        for key, value in written.items():
            if key in cls.not_yet and value is not None:
                raise ValueError(f"key {key!r} is not supported yet{cls.not_yet[key]}")
            if key not in cls.model_fields and key not in cls.not_yet:
                raise ValueError(f"unknown key {key!r}{nearest(key, cls.model_fields)}")
        return {key: value for key, value in written.items() if key not in cls.not_yet}

    @field_validator("parameters", mode="before", check_fields=False)
    @classmethod
    def _known_parameters(cls, written: Any) -> Parameters:
        if written is None:
            return {}
        if not isinstance(written, Mapping):
            raise ValueError(f"expected a mapping of parameters, found {written!r}")
        for name in written:
            if name not in KNOWN_PARAMETERS:
                raise ValueError(f"unknown parameter {name!r}{nearest(name, KNOWN_PARAMETERS)}")
        return {name: Setting.parse(name, value) for name, value in written.items() if value is not None}


class InputModel(_Section):
    """One entry of `models`."""

    model: str
    parameters: Parameters = {}


class InputSlice(_Section):
    """One source of a slice: layers [first, last) of a model."""

    model: str
    layer_range: tuple[int, int]
    parameters: Parameters = {}


class OutputSlice(_Section):
    """One entry of `slices`: the same layers of several models, merged."""

    not_yet: ClassVar[dict[str, str]] = {"base_model": " on a slice; give it once, at the top", "residual_weight": ""}
    sources: list[InputSlice] = Field(min_length=1)
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _same_layers(self) -> OutputSlice:
        ranges = {source.layer_range for source in self.sources}
        if len(ranges) > 1:
            raise ValueError(
                f"sources have layer ranges {sorted(ranges)}; slices that move or repeat layers are not supported yet, "
                "all sources of a slice must name the same layers"
            )
        return self


class MergeConfig(_Section):
    """A whole mergekit configuration of this storey: `models`, or `slices` that keep every layer in its place.

    random_seed: steep's own key, of the masks of dare and della; in mergekit an option of the command line.
    """

    not_yet: ClassVar[dict[str, str]] = {
        "modules": "; use 'models'",
        "tokenizer": "; use 'tokenizer_source: base' or a model's path",
        "chat_template": "; the template of the tokenizer's model is carried along",
    }
    models: list[InputModel] = []
    slices: list[OutputSlice] = []
    merge_method: str
    base_model: str | None = None
    parameters: Parameters = {}
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer_source: str | None = None
    random_seed: int = Field(0, ge=0, lt=1 << 63, strict=True)

    @field_validator("models", "slices", mode="before")
    @classmethod
    def _absent_is_empty(cls, written: Any) -> Any:
        return [] if written is None else written

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}{nearest(method, METHODS)}")
        return method

    @field_validator("tokenizer_source")
    @classmethod
    def _no_union(cls, source: str | None) -> str | None:
        if source == "union":
            raise ValueError("'union' is not supported yet; use 'base' or a model's path")
        return source

    @model_validator(mode="after")
    def _one_form(self) -> MergeConfig:
        if bool(self.models) == bool(self.slices):
            raise ValueError("exactly one of 'models' and 'slices' must be given, and not empty")
        if METHODS[self.merge_method].base == "required" and self.base_model is None:
            raise ValueError(f"base_model: required by {self.merge_method}")
        if self.tokenizer_source == "base" and self.base_model is None:
            raise ValueError("tokenizer_source: 'base' needs a base_model")
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key given twice is an error: the first value would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, a key given twice, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: merge configuration not found")
    try:
        written = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(written, dict):
        raise ValueError(f"{path}: expected a mapping with 'merge_method' and 'models', found {type(written).__name__}")
    return written


def parse_config(written: Mapping[str, Any], where: str = "merge configuration") -> MergeConfig:
    """Check a configuration given as a mapping.

    Raises:
        ValueError: naming the key's path, what was found and what is allowed.
    """
    try:
        return MergeConfig.model_validate(written)
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            message = detail["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}" if key else message)
        raise ValueError(f"{where}: " + "; ".join(problems)) from None


def resolve_model_path(model: str, folder: Path | None) -> Path:
    """The folder that a model's path means, by the rule in this file's first lines.

    Args:
        model: the path as written.
        folder: where the YAML file lies; None for a configuration that did not come from a file.

    Raises:
        FileNotFoundError: naming every place that was looked at.
    """
    path = Path(model).expanduser()
    roots = [root for root in (folder, Path.cwd()) if root is not None]
    candidates = [path] if path.is_absolute() else list(dict.fromkeys((root / path).resolve() for root in roots))
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
    hint = "; adapters ('model+adapter') are not supported yet" if "+" in model else ""
    looked_at = ", ".join(map(str, candidates))
    raise FileNotFoundError(f"model {model!r}: no such folder (looked at {looked_at}); models are not downloaded{hint}")
