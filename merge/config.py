"""mergekit's YAML, read as it is: pydantic models, parameter resolution and the rule for model paths.

Knows no tensors and opens no weights. What mergekit ignores silently (unknown keys, misspelt parameters) is refused
here with the nearest known name.

Paths of models: an absolute path is taken as it is; a relative one is looked up from the folder of the YAML file first,
then from the current folder, and the first that is a folder counts. Nothing is downloaded. `model+adapter` is a model
with a LoRA adapter applied to it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from .compat import MERGEKIT, method_problems
from .method_table import KNOWN_PARAMETERS, METHODS, PARAMETERS, Scalar

DType = Literal["float32", "float16", "bfloat16"]


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a mistyped name, or the list of what is allowed."""
    known = list(known)
    name = str(name)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.8) or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; allowed: {', '.join(known)}"


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
    """A part of the YAML. Unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, written: Any) -> Any:
        if not isinstance(written, Mapping):
            raise ValueError(f"expected a mapping, found {written!r}")
        return {str(key): value for key, value in written.items() if value is not None}  # null means absent

    @field_validator("parameters", mode="before", check_fields=False)
    @classmethod
    def _known_parameters(cls, written: Any) -> Parameters:
        if not isinstance(written, Mapping):
            raise ValueError(f"expected a mapping of parameters, found {written!r}")
        found, problems = {}, []
        for name, value in written.items():
            if name not in KNOWN_PARAMETERS:
                problems.append(f"unknown parameter {name!r}{nearest(name, KNOWN_PARAMETERS)}")
            elif value is not None:
                try:
                    found[name] = Setting.parse(name, value)
                except ValueError as error:
                    problems.append(str(error))
        if problems:
            raise ValueError("; ".join(problems))
        return found


def _model_reference(written: Any) -> Any:
    """mergekit's other spelling of `model+adapter`: {model: ..., lora: ...}, each a path or {path: ...}."""
    if not isinstance(written, Mapping):
        return written
    parts = {}
    for key, value in written.items():
        if key not in ("model", "lora"):
            raise ValueError(f"unknown key {key!r} of a model{nearest(key, ['model', 'lora'])}")
        if isinstance(value, Mapping):
            if value.get("revision") is not None:
                raise ValueError(f"{key}: revision {value['revision']!r}: models are folders, nothing is downloaded")
            value = value.get("path")
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{key}: expected a path, found {value!r}")
        parts[key] = value
    if not parts.get("model"):
        raise ValueError(f"expected a path or {{model: path, lora: path}}, found {dict(written)!r}")
    return f"{parts['model']}+{parts['lora']}" if parts.get("lora") else parts["model"]


ModelPath = Annotated[str, BeforeValidator(_model_reference)]


class InputModel(_Section):
    """One entry of `models`."""

    model: ModelPath
    parameters: Parameters = {}


class InputSlice(_Section):
    """One source of a slice: layers [first, last) of a model."""

    model: ModelPath
    layer_range: tuple[int, int]
    parameters: Parameters = {}

    @field_validator("layer_range")
    @classmethod
    def _not_empty(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= layers[0] < layers[1]:
            raise ValueError(f"expected [first, last) with 0 <= first < last, found {list(layers)}")
        return layers


class OutputSlice(_Section):
    """One entry of `slices`: as many layers from each source, merged; slices follow one another in the result.

    `base_model` holds for this slice instead of the one at the top. mergekit reads `residual_weight` and makes no use
    of it.
    """

    sources: list[InputSlice] = Field(min_length=1)
    base_model: ModelPath | None = None
    residual_weight: float | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _same_length(self) -> OutputSlice:
        lengths = {source.layer_range[1] - source.layer_range[0] for source in self.sources}
        if len(lengths) > 1:
            ranges = ", ".join(f"{list(source.layer_range)} of {source.model}" for source in self.sources)
            raise ValueError(f"all sources of a slice must have as many layers, found {ranges}")
        return self


class Module(_Section):
    """One entry of `modules`: a part of the model (text_decoder, vision_tower; `default` where there is one part)."""

    models: list[InputModel] = []
    slices: list[OutputSlice] = []
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if bool(self.models) == bool(self.slices):
            raise ValueError("exactly one of 'models' and 'slices' must be given, and not empty")
        return self


class TokenOfModel(_Section):
    """The row of another token: `{kind: model_token, model: ..., token: ...}` or with `token_id`."""

    kind: Literal["model_token"]
    model: ModelPath
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_name(self) -> TokenOfModel:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("exactly one of 'token' and 'token_id' must be given")
        return self


class Zero(_Section):
    """A row of zeros: `{kind: zero}`."""

    kind: Literal["zero"]


def _token_source(written: Any) -> Any:
    """Which of the forms of a token's source it is, so that errors speak of that one."""
    if not isinstance(written, Mapping) or "kind" not in written:
        return TypeAdapter(ModelPath).validate_python(written)
    kinds: dict[Any, type[_Section]] = {"model_token": TokenOfModel, "zero": Zero}
    if written["kind"] not in kinds:
        raise ValueError(f"unknown kind {written['kind']!r}{nearest(written['kind'], kinds)}")
    try:
        return kinds[written["kind"]].model_validate(written)
    except ValidationError as error:
        raise ValueError("; ".join(_problems(error, kinds[written["kind"]]))) from None


class TokenRule(_Section):
    """Where a token's row comes from in models that lack it, or in all of them with `force`."""

    source: Annotated[str | TokenOfModel | Zero, BeforeValidator(_token_source)] | None = None
    force: bool = False

    @model_validator(mode="after")
    def _forced_to_something(self) -> TokenRule:
        if self.force and self.source is None:
            raise ValueError("force: true needs a source: a model's path, {kind: zero} or {kind: model_token, ...}")
        return self


class TokenizerRule(_Section):
    """The tokenizer of the result and how rows are found for its tokens.

    vocab_size: "keep" the rows that pad the donor's embedding beyond its tokens, or write "exact"ly one row a token,
        as mergekit does. steep's own key; `pad_to_multiple_of` implies exact.
    """

    source: ModelPath = "union"
    tokens: dict[str, TokenRule] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None
    vocab_size: Literal["keep", "exact"] = "keep"


class MergeConfig(_Section):
    """A whole mergekit configuration: exactly one of `models`, `slices` and `modules`.

    random_seed: steep's own key, of the masks of dare and della; in mergekit an option of the command line.
    compat: steep's own key: results that are mergekit's bit for bit (compat.py), for a price in time and accuracy.
    """

    models: list[InputModel] = []
    slices: list[OutputSlice] = []
    modules: dict[str, Module] = {}
    merge_method: str
    base_model: ModelPath | None = None
    parameters: Parameters = {}
    dtype: DType | None = None
    out_dtype: DType | None = None
    tokenizer_source: ModelPath | None = None
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    random_seed: int = Field(0, ge=0, lt=1 << 63, strict=True)
    compat: str | None = None

    @field_validator("merge_method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}{nearest(method, METHODS)}")
        return method

    @field_validator("compat")
    @classmethod
    def _known_peer(cls, compat: str | None) -> str | None:
        if compat not in (None, MERGEKIT):
            raise ValueError(f"unknown peer {compat!r}{nearest(compat, [MERGEKIT])}")
        return compat

    @field_validator("dtype", "out_dtype", mode="before")
    @classmethod
    def _without_torch(cls, dtype: Any) -> Any:
        return dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype

    @model_validator(mode="after")
    def _one_form(self) -> MergeConfig:
        if sum(map(bool, (self.models, self.slices, self.modules))) != 1:
            raise ValueError("exactly one of 'models', 'slices' and 'modules' must be given, and not empty")
        slices = [*self.slices, *(output for module in self.modules.values() for output in module.slices)]
        by_models = bool(self.models) or any(module.models for module in self.modules.values())
        lacking = by_models or any(output.base_model is None for output in slices)
        if METHODS[self.merge_method].base == "required" and self.base_model is None and lacking:
            raise ValueError(f"base_model: required by {self.merge_method}")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("only one of 'tokenizer_source' and 'tokenizer' may be given")
        if (rule := self.tokenizer_rule) is not None and rule.source == "base" and self.base_model is None:
            key = "tokenizer_source" if self.tokenizer is None else "tokenizer.source"
            raise ValueError(f"{key}: 'base' needs a base_model")
        if self.compat and (problems := method_problems(self.merge_method)):
            raise ValueError("; ".join(problems))
        return self

    @property
    def tokenizer_rule(self) -> TokenizerRule | None:
        """`tokenizer`, or what `tokenizer_source` stands for; None: rows are merged by number."""
        rule = self.tokenizer or (TokenizerRule(source=self.tokenizer_source) if self.tokenizer_source else None)
        return rule.model_copy(update={"vocab_size": "exact"}) if rule and self.compat else rule


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
        raise ValueError(f"{where}: " + "; ".join(_problems(error, MergeConfig))) from None


_SECTIONS: dict[str, type[_Section]] = {
    "models": InputModel,
    "slices": OutputSlice,
    "sources": InputSlice,
    "modules": Module,
    "tokenizer": TokenizerRule,
    "tokens": TokenRule,
}


def _problems(error: ValidationError, section: type[_Section]) -> list[str]:
    """Every mistake with its key's path; `section` is what was read."""
    found = []
    for detail in error.errors():
        path, message = list(detail["loc"]), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            *path, key = path
            within = next((_SECTIONS[part] for part in reversed(path) if part in _SECTIONS), section)
            message = f"unknown key {key!r}{nearest(str(key), within.model_fields)}"
        where = ".".join(map(str, path))
        found.append(f"{where}: {message}" if where else message)
    return found


def resolve_model(model: str, folder: Path | None) -> tuple[Path, Path | None]:
    """The folders of a model and of its adapter, as `resolve_model_path` finds them.

    Args:
        model: as written: a path, or `model+adapter`. A folder whose own name has a plus is taken as it is.
        folder: where the YAML file lies; None for a configuration that did not come from a file.

    Raises:
        FileNotFoundError: naming every place that was looked at.
    """
    if "+" not in model or _find_folder(model, folder)[0] is not None:
        return resolve_model_path(model, folder), None
    path, adapter = model.rsplit("+", 1)
    return resolve_model_path(path, folder), resolve_model_path(adapter, folder, "adapter")


def resolve_model_path(path: str, folder: Path | None, what: str = "model") -> Path:
    """The folder that a path means, by the rule in this file's first lines.

    Raises:
        FileNotFoundError: naming every place that was looked at.
    """
    found, candidates = _find_folder(path, folder)
    if found is None:
        looked_at = ", ".join(map(str, candidates))
        raise FileNotFoundError(f"{what} {path!r}: no such folder (looked at {looked_at}); nothing is downloaded")
    return found


def _find_folder(written: str, folder: Path | None) -> tuple[Path | None, list[Path]]:
    path = Path(written).expanduser()
    roots = [root for root in (folder, Path.cwd()) if root is not None]
    candidates = [path] if path.is_absolute() else list(dict.fromkeys((root / path).resolve() for root in roots))
    return next((candidate.resolve() for candidate in candidates if candidate.is_dir()), None), candidates
