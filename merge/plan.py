"""Everything a merge will do, settled from headers and JSON files alone: no weight is read and nothing is written.

For every output tensor: its inputs, dtype and parameters; for the folder: who donates configuration and tokenizer. All
errors are collected and raised together, so a configuration is corrected once. Reads safetensors headers, config.json
and tokenizer files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.files import read_json
from ..engine.model_files import carried_files
from ..engine.safetensors_io import SafetensorsFolder
from .config import MergeConfig, Parameters, resolve_model_path
from .method_table import METHODS, Scalar
from .methods import SMALL_WEIGHT_SUM

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LICENCES = ("LICEN", "NOTICE", "USE_POLICY")  # how the names of such files begin
MUST_AGREE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window", "hidden_act")
MAX_ERRORS_SHOWN = 20


@dataclass(frozen=True)
class Source:
    """One input of an output tensor: which model, and the tensor's name there (a tied head is its embedding)."""

    model: int
    name: str


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor. `parameters` holds resolved values: `t`, `normalize`, `lambda`, and `weight` and `density` as
    lists with one value per source that is not `base` (linear: per source)."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[Source, ...]
    base: int | None  # index into sources
    layer: int | None
    operation: str  # a merge method, or "equal": an integer tensor, copied if all inputs agree
    parameters: dict[str, Any]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class MergePlan:
    """A merge that is ready to run. `config_json` is what the output's config.json will hold."""

    config: MergeConfig
    models: tuple[SafetensorsFolder, ...]
    model_names: tuple[str, ...]  # as the configuration first writes them
    tensors: tuple[TensorPlan, ...]
    config_donor: Path
    tokenizer_donor: Path
    config_json: dict[str, Any]
    carried: tuple[tuple[Path, Path], ...]  # (donor, file in it) of what is copied
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def summary(self) -> list[str]:
        """Lines for a person: what is merged, from where, and what to look at."""
        numbers = sum(tensor.numel for tensor in self.tensors)
        size = sum(tensor.numel * tensor.dtype.itemsize for tensor in self.tensors)
        lines = [f"{self.config.merge_method}: {len(self.tensors)} tensors, {numbers:,} values, {size / 1e9:.2f} GB"]
        lines += [f"model {index}: {model.path}" for index, model in enumerate(self.models)]
        lines += [f"config.json from {self.config_donor}", f"tokenizer from {self.tokenizer_donor}"]
        return lines + [f"note: {note}" for note in self.notes] + [f"warning: {text}" for text in self.warnings]


def plan_merge(config: MergeConfig, folder: Path | None = None) -> MergePlan:
    """Resolve a configuration against the model folders it names.

    Args:
        config: the parsed YAML.
        folder: where the YAML lies, for relative model paths; None: only the current folder counts.

    Raises:
        FileNotFoundError: a model's folder, or its config.json, safetensors or shards are not there.
        ValueError: everything else that is wrong, one problem per line.
    """
    return _Planner(config, folder).plan()


@dataclass(frozen=True)
class _Stack:
    """Consecutive layers merged with one set of sources: a slice, or the whole model for the `models` form."""

    first: int
    last: int  # exclusive
    models: tuple[int, ...]
    base: int | None  # index into models
    shared_scopes: tuple[Parameters, ...]  # highest precedence first
    model_scopes: tuple[tuple[Parameters, ...], ...]  # per entry of models

    def depth(self, layer: int) -> float:
        """t of gradients: 0 at the first layer, 1 at the last; 1 for a single layer, as in mergekit."""
        return (layer - self.first) / (self.last - self.first - 1) if self.last - self.first > 1 else 1.0


class _Planner:
    def __init__(self, config: MergeConfig, folder: Path | None) -> None:
        self.config = config
        self.folder = folder
        self.errors: list[str] = []
        self.unresolved: set[tuple[str, str]] = set()
        self.notes: list[str] = []
        self.warnings: Counter[str] = Counter()
        self.paths: list[Path] = []
        self.folders: list[SafetensorsFolder] = []
        self.model_configs: list[dict[str, Any]] = []

    def plan(self) -> MergePlan:
        base = None if self.config.base_model is None else self._path(self.config.base_model)
        listed = [self._path(entry.model) for entry in self.config.models]
        listed += [self._path(source.model) for output in self.config.slices for source in output.sources]
        self.paths = list(dict.fromkeys(listed + ([base] if base else [])))
        donor = self._donor(base, listed)
        self.folders = [SafetensorsFolder(path) for path in self.paths]
        self.model_configs = [read_json(path / "config.json") for path in self.paths]
        self._check_model_configs()
        self._raise()

        stacks = self._stacks(base)
        self._raise()
        tied = self._tied_heads()
        aliases, head_in_output = self._head(tied)
        tensors = self._tensors(stacks, aliases, head_in_output, self.paths.index(donor))
        tokenizer_donor = self._tokenizer_donor(donor)
        self._check_tokenizers(tokenizer_donor)
        self._raise()
        return MergePlan(
            config=self.config,
            models=tuple(self.folders),
            model_names=self._names_as_written(),
            tensors=tuple(tensors),
            config_donor=donor,
            tokenizer_donor=tokenizer_donor,
            config_json=self._config_json(donor, head_in_output and any(tied)),
            carried=tuple(_carried(donor, tokenizer_donor)),
            notes=tuple(self.notes),
            warnings=tuple(text + (f" ({count} times)" if count > 1 else "") for text, count in self.warnings.items()),
        )

    def _error(self, text: str) -> None:
        if text not in self.errors:
            self.errors.append(text)

    def _raise(self) -> None:
        if self.errors:
            shown = self.errors[:MAX_ERRORS_SHOWN]
            if len(self.errors) > len(shown):
                shown.append(f"... and {len(self.errors) - len(shown)} more")
            raise ValueError("this merge cannot be done:\n  " + "\n  ".join(shown))

    def _path(self, model: str) -> Path:
        return resolve_model_path(model, self.folder)

    def _donor(self, base: Path | None, listed: Sequence[Path]) -> Path:
        if METHODS[self.config.merge_method].donor == "first":
            return next((path for path in listed if path != base), listed[0])
        return base or listed[0]

    def _names_as_written(self) -> tuple[str, ...]:
        written = [entry.model for entry in self.config.models]
        written += [source.model for output in self.config.slices for source in output.sources]
        written += [self.config.base_model] if self.config.base_model else []
        names = {self._path(model): model for model in reversed(written)}  # the first of several counts
        return tuple(names[path] for path in self.paths)

    # models against each other

    def _check_model_configs(self) -> None:
        first = self.model_configs[0]
        for path, found in zip(self.paths, self.model_configs):
            if found.get("quantization_config"):
                self._error(f"{path}: quantization_config: quantised weights cannot be merged")
            for key in MUST_AGREE:
                if found.get(key) != first.get(key):
                    self._error(
                        f"config.json: {key} is {first.get(key)!r} in {self.paths[0]} and {found.get(key)!r} in {path}"
                    )
            for key in SHOULD_AGREE:
                if found.get(key) != first.get(key):
                    self.warnings[
                        f"config.json: {key} is {first.get(key)!r} in {self.paths[0]} and {found.get(key)!r} in {path}"
                        "; the result takes the donor's"
                    ] += 1

    def _stacks(self, base: Path | None) -> list[_Stack]:
        """The `models` form is one stack; `slices` must put every layer where it was."""
        layers = self._num_layers()
        top = self.config.parameters
        if self.config.models:
            models = [self.paths.index(self._path(entry.model)) for entry in self.config.models]
            scopes: list[tuple[Parameters, ...]] = [(entry.parameters, top) for entry in self.config.models]
            if base is not None and self.paths.index(base) not in models:
                models.append(self.paths.index(base))
                scopes.append(({}, top))
            stacks = [self._stack(0, layers, models, base, (top,), scopes, "models")]
        else:
            stacks = []
            for number, output in enumerate(self.config.slices):
                models = [self.paths.index(self._path(source.model)) for source in output.sources]
                scopes = [(source.parameters, output.parameters, top) for source in output.sources]
                first, last = output.sources[0].layer_range
                where = f"slices.{number}"
                if first != (stacks[-1].last if stacks else 0) or not first < last <= layers:
                    self._error(
                        f"{where}: layer_range [{first}, {last}]; slices must cover the {layers} layers once and in "
                        "order (moving or repeating layers is not supported yet)"
                    )
                stacks.append(self._stack(first, last, models, base, (output.parameters, top), scopes, where))
            if stacks[-1].last != layers:
                self._error(f"slices: end at layer {stacks[-1].last}, the models have {layers}")
        for stack in stacks:
            self._check_count(stack)
        self._note_unread_parameters(stacks)
        return stacks

    def _check_count(self, stack: _Stack) -> None:
        method = METHODS[self.config.merge_method]
        least, most = method.models
        based = method.has_base(self.config.base_model is not None)
        found = len(stack.models) - based
        if found < least or (most is not None and found > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            )
            besides = " besides the base" if based else ""
            self._error(f"{self.config.merge_method}: needs {wanted} model{'s' * (least > 1)}{besides}, found {found}")

    def _stack(
        self,
        first: int,
        last: int,
        models: list[int],
        base: Path | None,
        shared: tuple[Parameters, ...],
        scopes: Sequence[tuple[Parameters, ...]],
        where: str,
    ) -> _Stack:
        for model, count in Counter(models).items():
            if count > 1:
                self._error(f"{where}: {self.paths[model]} is listed {count} times")
        position = None
        if METHODS[self.config.merge_method].has_base(base is not None):
            if base is None or self.paths.index(base) not in models:
                self._error(f"{where}: base_model {base} is not among the sources")
            else:
                position = models.index(self.paths.index(base))
        return _Stack(first, last, tuple(models), position, shared, tuple(scopes))

    def _num_layers(self) -> int:
        """From config.json; every layer must be there, which the comparison of names checks between models."""
        layers = {layer_index(name) for name in self.folders[0].names} - {None}
        found = max((layer for layer in layers if layer is not None), default=-1) + 1
        declared = self.model_configs[0].get("num_hidden_layers", found)
        if declared != found:
            self._error(
                f"{self.paths[0]}: config.json has num_hidden_layers {declared}, the weights hold {found} layers"
            )
        return found

    def _note_unread_parameters(self, stacks: Sequence[_Stack]) -> None:
        """mergekit accepts parameters where nothing reads them. They stay without effect, but not without a word."""
        method = self.config.merge_method
        shared, own = METHODS[method].shared, METHODS[method].per_model
        at_models = [entry.parameters for entry in self.config.models]
        at_models += [source.parameters for output in self.config.slices for source in output.sources]
        elsewhere = [self.config.parameters, *(output.parameters for output in self.config.slices)]
        for scope in at_models:
            for name in sorted(scope.keys() - own.keys()):
                where = "; it belongs to the merge as a whole" if name in shared else ""
                self.warnings[f"{method} reads no {name!r} from a model: it has no effect{where}"] += 1
        for scope in elsewhere:
            for name in sorted(scope.keys() - own.keys() - shared.keys()):
                self.warnings[f"{method} reads no {name!r}: it has no effect"] += 1
        for stack in stacks:
            if stack.base is not None and stack.model_scopes[stack.base][0]:
                names = ", ".join(sorted(stack.model_scopes[stack.base][0]))
                self.warnings[f"{method} reads no parameters of the base model: its {names} has no effect"] += 1

    # names and shapes

    def _tied_heads(self) -> list[bool]:
        """Whether each model uses its embedding as head: config.json says so, else the absence of a head does."""
        return [
            bool(config.get("tie_word_embeddings", HEAD not in folder))
            for config, folder in zip(self.model_configs, self.folders)
        ]

    def _head(self, tied: Sequence[bool]) -> tuple[list[dict[str, str]], bool]:
        """Per model {output name: name in the model} where they differ, and whether the output holds a head."""
        if not any(tied):
            return [{} for _ in tied], any(HEAD in folder for folder in self.folders)
        if all(tied):
            for path, folder in zip(self.paths, self.folders):
                if HEAD in folder:
                    self.notes.append(f"{path}: {HEAD} is stored but tied to the embedding; the result stores none")
            return [{} for _ in tied], False
        names = ", ".join(str(path) for path, is_tied in zip(self.paths, tied) if is_tied)
        self.notes.append(f"the head is tied in some models ({names}), not in others; the result has one of its own")
        return [{HEAD: EMBEDDING} if is_tied else {} for is_tied in tied], True

    def _tensors(
        self, stacks: list[_Stack], aliases: list[dict[str, str]], head_in_output: bool, donor: int
    ) -> list[TensorPlan]:
        names = [name for name in self.folders[donor].names if name != HEAD]
        seen = set(names)
        for folder in self.folders:
            names += [name for name in folder.names if name not in seen and name != HEAD]
            seen.update(folder.names)
        if head_in_output:
            names.append(HEAD)
        derived = [name for name in names if name.endswith("rotary_emb.inv_freq")]
        if derived:
            self.notes.append(f"{len(derived)} tables '*rotary_emb.inv_freq' follow from config.json and are left out")
        plans = [self._tensor(name, stacks, aliases, donor) for name in names if name not in derived]
        return [plan for plan in plans if plan is not None]

    def _tensor(self, name: str, stacks: list[_Stack], aliases: list[dict[str, str]], donor: int) -> TensorPlan | None:
        layer = layer_index(name)
        if layer is None:  # embeddings go with the first slice, what follows the layers with the last; depth 0 for both
            stack, depth = (stacks[0] if "embed" in name else stacks[-1]), 0.0
        else:
            stack = next((stack for stack in stacks if stack.first <= layer < stack.last), stacks[-1])
            depth = stack.depth(layer)
        sources = tuple(Source(model, aliases[model].get(name, name)) for model in stack.models)
        missing = [self.paths[source.model] for source in sources if source.name not in self.folders[source.model]]
        if missing:
            self._error(f"{name}: not in {', '.join(map(str, missing))}")
            return None
        shapes = [self.folders[source.model].shape(source.name) for source in sources]
        dtypes = [self.folders[source.model].dtype(source.name) for source in sources]
        if len(set(shapes)) > 1:
            self._shape_error(name, sources, shapes)
            return None
        first_model = stack.models[stack.base or 0]
        reference = donor if donor in stack.models else first_model
        kept_dtype = self.folders[reference].dtype(aliases[reference].get(name, name))
        floating = [dtype.is_floating_point for dtype in dtypes]
        if any(floating) and not all(dtype in FLOATS.values() for dtype in dtypes):
            found = ", ".join(sorted({str(dtype) for dtype in dtypes}))
            self._error(f"{name}: dtype {found}; only {', '.join(FLOATS)} can be merged")
            return None
        if not any(floating):
            if len(set(dtypes)) > 1:
                self._error(f"{name}: integer tensor with different dtypes {dtypes}")
            return TensorPlan(name, shapes[0], kept_dtype, sources, stack.base, layer, "equal", {})
        wanted = self.config.out_dtype or self.config.dtype
        return TensorPlan(
            name=name,
            shape=shapes[0],
            dtype=FLOATS[wanted] if wanted else kept_dtype,
            sources=sources,
            base=stack.base,
            layer=layer,
            operation=self.config.merge_method,
            parameters=self._parameters(name, depth, stack),
        )

    def _shape_error(self, name: str, sources: Sequence[Source], shapes: Sequence[tuple[int, ...]]) -> None:
        found = "; ".join(f"{list(shape)} in {self.paths[source.model]}" for source, shape in zip(sources, shapes))
        is_vocabulary = "embed" in name or name == HEAD
        if is_vocabulary and len({shape[1:] for shape in shapes}) == 1:
            rows = ", ".join(f"{shape[0]} in {self.paths[source.model]}" for source, shape in zip(sources, shapes))
            self._error(
                f"{name}: vocabularies differ: rows {rows}; merging different vocabularies is not supported yet"
            )
        else:
            self._error(f"{name}: shapes differ: {found}")

    # parameters

    def _parameters(self, name: str, depth: float, stack: _Stack) -> dict[str, Any]:
        method = self.config.merge_method
        values: dict[str, Any] = {}
        for key, default in METHODS[method].shared.items():
            values[key] = self._resolve(key, default, stack.shared_scopes, name, depth, "the merge")
        for key, default in METHODS[method].per_model.items():
            values[key] = [
                self._resolve(key, default, scopes, name, depth, str(self.paths[model]))
                for position, (model, scopes) in enumerate(zip(stack.models, stack.model_scopes))
                if position != stack.base
            ]
        if None not in values.values() and None not in values.get("weight", []):
            self._check_values(values)
        values.pop("int8_mask", None)  # in mergekit the dtype of a temporary, without effect on the result
        return values

    def _resolve(
        self, key: str, default: Scalar | None, scopes: Sequence[Parameters], name: str, depth: float, owner: str
    ) -> Scalar | None:
        """The first scope with a filter that matches wins: model, then slice, then the top; then the default."""
        for scope in scopes:
            if key in scope:
                value = scope[key].at(name, depth)
                if value is not None:
                    return value
        if default is None and (owner, key) not in self.unresolved:
            self.unresolved.add((owner, key))
            self._error(f"{owner}: no value for the required parameter {key!r} (first needed for {name})")
        return default

    def _check_values(self, values: Mapping[str, Any]) -> None:
        method = self.config.merge_method
        for problem in METHODS[method].carry_out.check(values):
            self._error(f"{method}: {problem}")
        if method == "slerp" and not 0 <= values["t"] <= 1:
            self.warnings[f"t = {values['t']:g} is outside [0, 1] and extrapolates"] += 1
        if not values.get("normalize"):
            return
        weights = values["weight"]
        total = math.fsum(weights)
        if abs(total) < SMALL_WEIGHT_SUM:
            text = f"weights {weights} sum to {total:g} under normalize: true"
            if method == "linear":
                self._error(text)
            else:
                self.warnings[f"{text}: they are not divided"] += 1
        elif abs(total) < 0.05 * math.fsum(map(abs, weights)):
            self.warnings[f"weights {weights} nearly cancel: normalize multiplies by {1 / total:.3g}"] += 1
        if METHODS[method].shared.get("ties_sign") and min(weights) < 0 < max(weights):
            self.warnings[f"weights {weights} of both signs under normalize: divisors can be near zero"] += 1

    # what goes beside the weights

    def _tokenizer_donor(self, donor: Path) -> Path:
        source = self.config.tokenizer_source
        if source is None or source == "base":
            return donor
        path = self._path(source)
        if path not in self.paths:
            self._error(f"tokenizer_source: {path} is not one of the merged models")
        return path

    def _check_tokenizers(self, donor: Path) -> None:
        """Rows of the embeddings must mean the same tokens; models that only add tokens at new ids are fine."""
        expected = _vocabulary(donor)
        for path in self.paths:
            found = _vocabulary(path)
            if expected is None or found is None or path == donor:
                continue
            ids = {index: token for token, index in expected.items()}
            differing = sorted(index for token, index in found.items() if ids.get(index, token) != token)
            if not differing:
                continue
            text = f"tokenizers: {len(differing)} ids (first: {differing[0]}) mean other tokens in {path} than {donor}"
            if self.config.tokenizer_source is not None:
                self._error(f"{text}; tokenizer_source cannot rearrange rows yet")
            else:
                self.warnings[f"{text}; rows are merged by id"] += 1

    def _config_json(self, donor: Path, untied: bool) -> dict[str, Any]:
        config = dict(self.model_configs[self.paths.index(donor)])
        wanted = self.config.out_dtype or self.config.dtype
        if wanted:
            config["dtype" if "dtype" in config else "torch_dtype"] = wanted
        if untied:
            config["tie_word_embeddings"] = False
        return config


def layer_index(name: str) -> int | None:
    """The first component of a tensor's name that is a number: model.layers.3.mlp.experts.5.w1.weight -> 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _carried(donor: Path, tokenizer_donor: Path) -> list[tuple[Path, Path]]:
    """Licences go with the configuration; generation_config.json with the tokenizer, whose stop tokens it names."""
    licences = [(donor, file) for file in carried_files(donor) if file.name.startswith(LICENCES)]
    return licences + [
        (tokenizer_donor, file)
        for file in carried_files(tokenizer_donor)
        if file.name != "config.json" and not file.name.startswith(LICENCES)
    ]


def _vocabulary(model: Path) -> dict[str, int] | None:
    """{token: id} of a tokenizer.json; None where there is none to compare."""
    path = model / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):  # unigram models list [token, score] by id
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        return None
    return vocabulary | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
