"""Everything a merge will do, settled from headers and JSON files alone: no weight is read and nothing is written.

All errors are collected and raised together, so a configuration is corrected once. Reads safetensors headers,
config.json and tokenizer files.

What the executor gets, a `MergePlan`:

- `tensors`, in the order of the output. Each `TensorPlan` has the output's name, shape and dtype; the `sources`; which
  of them is the base; the method (`operation`), or "equal" for integers that are copied if all inputs agree; and the
  parameters, resolved for this tensor: one value for what belongs to the merge, a list with one value per source that
  is not the base for what belongs to the models.
- `models`, what the sources' numbers count. Of source s the values are
  `models[s.model].read_into(s.name, lo, buffer)`, with `buffer` of `models[s.model].dtype(s.name)`, for any range of
  flat elements and from any thread. A model is a `SafetensorsFolder`, or reads like one (`arranged.TensorReader`):
  under an adapter it gives weight + scale * B @ A in float32 (`adapters.AdaptedModel`), and of embedding and head
  under a tokenizer rule the rows in the order of the result's vocabulary (`arranged.ArrangedModel`; `s.rows` has the
  map, for reports). So every source has the shape of the output, and the executor knows neither adapters nor tokens.
- `model_names`, what tells models apart in random bits: the same folder under two adapters is two models.
- For the folder: `config_json`; `written`, {file name: text} to write; `carried`, files to copy. For the record:
  `input_files`, whose hashes say what was merged; donors, notes, warnings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..engine.safetensors_io import dtype_name
from .arranged import ArrangedModel, RowMap, TensorReader
from .arrangement import Arranger
from .compat import promoted
from .config import InputModel, MergeConfig, OutputSlice, Parameters
from .findings import Findings
from .inputs import Inputs, check_output
from .layers import (
    Stack,
    count_layers,
    depth,
    has_vocabulary,
    is_before_layers,
    is_head,
    layer_index,
    part_of,
    split_layer,
)
from .method_table import METHODS
from .parameters import Resolver
from .result_config import set_dtype, set_layers, set_value, set_vocabulary, text_config
from .result_files import result_files
from .vocabulary import OutputVocabulary

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SPARE_BYTES = 64 << 20  # of disk space, for headers and what the manifest holds


@dataclass(frozen=True)
class Source:
    """One input of an output tensor: which model, and the tensor's name there (a tied head is its embedding).

    rows: where a vocabulary is arranged, which rows it is made of; `name` is then the output's, and the model knows it.
    """

    model: int
    name: str
    rows: RowMap | None = field(default=None, compare=False, repr=False)


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
    """A merge that is ready to run; the first lines of this file say what is what."""

    config: MergeConfig
    models: tuple[TensorReader, ...]
    model_names: tuple[str, ...]  # as the configuration first writes them
    model_labels: tuple[str, ...]  # folders, with adapters
    tensors: tuple[TensorPlan, ...]
    config_donor: Path
    tokenizer_donor: Path
    template_donor: str
    config_json: dict[str, Any]
    carried: tuple[tuple[Path, Path], ...]  # (donor, file in it) of what is copied
    written: dict[str, str]
    input_files: tuple[Path, ...]
    vocabulary: OutputVocabulary | None  # None: rows are merged by number
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        """Of all output tensors."""
        return sum(tensor.numel * tensor.dtype.itemsize for tensor in self.tensors)

    def summary(self) -> list[str]:
        """Lines for a person: what is merged, from where, and what to look at."""
        values = sum(tensor.numel for tensor in self.tensors)
        method = self.config.merge_method
        lines = [f"{method}: {len(self.tensors)} tensors, {values:,} values, {self.total_bytes / 1e9:.2f} GB"]
        lines += [f"model {index}: {label}" for index, label in enumerate(self.model_labels)]
        lines += [f"config.json from {self.config_donor}", f"tokenizer from {self.tokenizer_donor}"]
        lines += [f"chat template from {self.template_donor}"]
        return lines + [f"note: {note}" for note in self.notes] + [f"warning: {text}" for text in self.warnings]


def plan_merge(config: MergeConfig, folder: Path | None = None, *, out: str | Path | None = None) -> MergePlan:
    """Resolve a configuration against the model folders it names.

    Args:
        config: the parsed YAML.
        folder: where the YAML lies, for relative model paths; None: only the current folder counts.
        out: where the result shall lie; it is looked at, not made.

    Raises:
        PlanError: a ValueError with everything that is wrong, one problem per line.
    """
    return _Planner(config, folder).plan(None if out is None else Path(out))


@dataclass(frozen=True)
class _Part:
    """A part of the model (all of it, without `modules`) and the stacks of its layers; `owns` is None for all names."""

    name: str | None
    stacks: tuple[Stack, ...]
    sliced: bool


class _Planner:
    def __init__(self, config: MergeConfig, folder: Path | None) -> None:
        self.config, self.exact = config, config.compat is None
        self.findings = Findings()
        self.inputs = Inputs(folder, self.findings)
        self.method = METHODS[config.merge_method]
        self.origins: list[list[tuple[int, int]]] = []  # of the layers of the text model under slices

    def plan(self, out: Path | None) -> MergePlan:
        parts = self._parts()
        models, findings = self.inputs.models, self.findings
        self.readers = [model.reader for model in models]
        self.inputs.compare(same_depth=not any(part.sliced for part in parts))
        self._check_layer_counts()
        labels = [model.label for model in models]
        self.resolver = Resolver(self.config.merge_method, labels, findings, compat=not self.exact)
        donor = self._donor(parts[0].stacks[0])

        rule = self.config.tokenizer_rule
        compute = torch.float32 if self.exact else FLOATS.get(self.config.dtype or "")
        vocabulary_base = self._number(self.config.base_model)
        self.arranger = None
        if rule is not None:
            first = vocabulary_base if vocabulary_base is not None else parts[0].stacks[0].models[0]
            self.arranger = Arranger(rule, self.inputs, first, findings, compute)
        else:
            self._compare_tokenizers(donor)

        self._find_heads(parts)
        tensors = [tensor for part in parts for tensor in self._part_tensors(part, parts, donor)]
        names = [name for reader in self.readers if reader for name in reader.names] + [t.name for t in tensors]
        self.resolver.note_unread((stack for part in parts for stack in part.stacks), list(dict.fromkeys(names)))
        config_json = self._config_json(donor)
        tokenizer_donor = self._tokenizer_donor(donor)
        carried, written, template_donor = result_files(
            models[donor].path,
            tokenizer_donor,
            self.arranger.vocabulary if self.arranger else None,
            self.config.chat_template,
            [model.path for model in models],
            findings,
        )
        if out is not None:
            sizes = [file.stat().st_size for _, file in carried] + [len(text.encode()) for text in written.values()]
            needed = sum(tensor.numel * tensor.dtype.itemsize for tensor in tensors) + sum(sizes) + SPARE_BYTES
            check_output(out, models, needed, findings)
        if not tensors and not findings.errors:
            findings.error("nothing to merge: the models hold no tensors in common")
        findings.raise_errors()
        return MergePlan(
            config=self.config,
            models=self._arranged_models(),
            model_names=tuple(model.written for model in models),
            model_labels=tuple(model.label for model in models),
            tensors=tuple(tensors),
            config_donor=models[donor].path,
            tokenizer_donor=tokenizer_donor,
            template_donor=template_donor,
            config_json=config_json,
            carried=tuple(carried),
            written=written,
            input_files=tuple(dict.fromkeys(file for model in models for file in model.identity)),
            vocabulary=self.arranger.vocabulary if self.arranger else None,
            notes=findings.notes,
            warnings=findings.warnings,
        )

    def _number(self, written: str | None) -> int | None:
        return None if written is None else self.inputs.number(written)

    # what is merged with what

    def _parts(self) -> list[_Part]:
        config, top = self.config, self.config.parameters
        if config.models:
            return [self._whole("models", None, config.models, (top,))]
        if config.slices:
            return [self._sliced("slices", None, config.slices, (top,))]
        parts = []
        for name, module in config.modules.items():
            where, scopes = f"modules.{name}", (module.parameters, top)
            if module.models:
                parts.append(self._whole(f"{where}.models", name, module.models, scopes))
            else:
                parts.append(self._sliced(f"{where}.slices", name, module.slices, scopes))
        return parts

    def _whole(
        self, where: str, name: str | None, entries: Sequence[InputModel], scopes: tuple[Parameters, ...]
    ) -> _Part:
        sources = [(entry.model, (entry.parameters, *scopes)) for entry in entries]
        known = [self._number(entry.model) for entry in entries]
        base = self._number(self.config.base_model)
        if self.config.base_model is not None and base is not None and base not in known:
            sources.append((self.config.base_model, ({}, *scopes)))
        stack = self._stack(where, sources, self.config.base_model, 0, None, [0] * len(sources), scopes)
        return _Part(name, (stack,), False)

    def _sliced(
        self, where: str, name: str | None, slices: Sequence[OutputSlice], scopes: tuple[Parameters, ...]
    ) -> _Part:
        stacks, first = [], 0
        for number, output in enumerate(slices):
            own = (output.parameters, *scopes)
            sources = [(source.model, (source.parameters, *own)) for source in output.sources]
            begins = [source.layer_range[0] for source in output.sources]
            count = output.sources[0].layer_range[1] - begins[0]
            base = output.base_model or self.config.base_model
            stack = self._stack(f"{where}.{number}", sources, base, first, count, begins, own)
            first += count
            stacks.append(stack)
        return _Part(name, tuple(stacks), True)

    def _stack(
        self,
        where: str,
        sources: Sequence[tuple[str, tuple[Parameters, ...]]],
        base: str | None,
        first: int,
        count: int | None,
        begins: Sequence[int],
        scopes: tuple[Parameters, ...],
    ) -> Stack:
        base_number = self._number(base)
        models = [self.inputs.number(written) for written, _ in sources]
        for model, times in Counter(models).items():
            if times > 1:
                self.findings.error(f"{where}: {self.inputs.models[model].label} is listed {times} times")
        based = self.method.has_base(base is not None)
        position = None
        if based and base_number is not None and base_number not in models:
            self.findings.error(f"{where}: base_model {self.inputs.models[base_number].label} is not among the sources")
        elif based and base_number is not None:
            position = models.index(base_number)
        self._check_count(where, len(models) - based, based)
        configured = base_number if base_number in models else None
        model_scopes = tuple(written for _, written in sources)
        return Stack(where, tuple(models), position, configured, first, count, tuple(begins), scopes, model_scopes)

    def _check_count(self, where: str, found: int, based: bool) -> None:
        least, most = self.method.models
        if found < least or (most is not None and found > most):
            wanted = (
                f"exactly {least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            )
            besides = " besides the base" if based else ""
            method = self.config.merge_method
            plural = "s" * (least > 1)
            self.findings.error(f"{where}: {method} needs {wanted} model{plural}{besides}, found {found}")

    def _donor(self, stack: Stack) -> int:
        """The model whose configuration the result has: the base, else the first listed."""
        base = self._number(self.config.base_model)
        if self.method.donor == "first":
            return next((model for model in stack.models if model != base), stack.models[0])
        return stack.models[0] if base is None else base

    def _check_layer_counts(self) -> None:
        for model in self.inputs.models:
            if model.reader is None or not model.config:
                continue
            declared = text_config(model.config).get("num_hidden_layers")
            counts = count_layers(model.reader.names)
            found = max(counts.values(), default=0)
            if declared is not None and counts and found < declared:
                self.findings.error(
                    f"{model.path}: config.json has num_hidden_layers {declared}, the weights hold {found} layers"
                )
            elif declared is not None and len(counts) == 1 and found > declared:
                self.findings.note(f"{model.path}: {found} layers, num_hidden_layers is {declared}")

    # names and shapes

    def _find_heads(self, parts: Sequence[_Part]) -> None:
        """Per model {name in the output: name in the model} of tied heads, and the heads that the output lacks."""
        self.aliases: list[dict[str, str]] = [{} for _ in self.inputs.models]
        self.left_out: set[str] = set()
        self.untied = False
        models = [(number, model) for number, model in enumerate(self.inputs.models) if model.reader]
        tied = [(number, model) for number, model in models if model.is_tied]
        if not tied:
            return
        if len(tied) == len(models):
            for _, model in tied:
                if model.head is not None:
                    self.left_out.add(model.head)
                    self.findings.note(
                        f"{model.path}: {model.head} is stored but tied to the embedding; the result stores none"
                    )
            return
        names = ", ".join(model.label for _, model in tied)
        self.findings.note(f"the head is tied in some models ({names}), not in others; the result has one of its own")
        self.untied = True
        head = next((model.head for _, model in models if not model.is_tied and model.head), None)
        for number, model in tied:
            if head and model.embedding:
                self.aliases[number][head] = model.embedding

    def _names(self, model: int, part: _Part, parts: Sequence[_Part]) -> list[str]:
        """Of a model's tensors those that the part owns and the result shall have."""
        reader = self.readers[model]
        found = [] if reader is None else [name for name in reader.names if name not in self.left_out]
        found += [name for name in self.aliases[model] if name not in found]
        if part.name is not None:
            owners = [each.name for each in parts if each.name]
            found = [name for name in found if part_of(name, owners) == part.name]
        derived = [name for name in found if name.endswith("rotary_emb.inv_freq")]
        if derived:
            self.findings.note(f"{len(derived)} tables '*rotary_emb.inv_freq' follow from config.json and are left out")
        return [name for name in found if name not in derived]

    def _union(self, models: Iterable[int], part: _Part, parts: Sequence[_Part], donor: int) -> list[str]:
        """Names of all the models, the donor's first, the head last."""
        ordered = sorted(models, key=lambda model: model != donor)
        found = dict.fromkeys(name for model in ordered for name in self._names(model, part, parts))
        return sorted(found, key=is_head)

    def _part_tensors(self, part: _Part, parts: Sequence[_Part], donor: int) -> list[TensorPlan]:
        if part.sliced:
            found = self._slices(part, parts, donor)
        else:
            (stack,) = part.stacks
            names = self._union(stack.models, part, parts, donor)
            counts = count_layers(names)
            found = []
            for name in names:
                layer = split_layer(name)
                position = depth(layer[1], counts[layer[0]]) if layer else 0.0
                found.append(self._tensor(name, [name] * len(stack.models), stack, position, donor))
        if part.name is not None and not found:
            owned = sorted(
                {".".join(name.split(".")[:2]) for reader in self.readers if reader for name in reader.names}
            )
            self.findings.error(f"modules.{part.name}: no tensor belongs to it; names begin with {', '.join(owned)}")
        return [tensor for tensor in found if tensor is not None]

    def _slices(self, part: _Part, parts: Sequence[_Part], donor: int) -> list[TensorPlan | None]:
        models = dict.fromkeys(model for stack in part.stacks for model in stack.models)
        all_names = {model: self._names(model, part, parts) for model in models}
        lists = {layers for names in all_names.values() for layers in count_layers(names)}
        if len(lists) != 1:
            if any(self.readers[model] for model in models):
                what = f"layers in {', '.join(sorted(lists))}; name the parts in 'modules'" if lists else "no layers"
                self.findings.error(f"{part.stacks[0].where}: the models have {what}")
            return []
        (layers,) = lists
        first, last = part.stacks[0], part.stacks[-1]
        outside = [name for name in self._union(first.models, part, parts, donor) if layer_index(name) is None]
        found = [self._tensor(n, [n] * len(first.models), first, 0.0, donor) for n in outside if is_before_layers(n)]
        for stack in part.stacks:
            found += self._layers(stack, layers, all_names, part, donor)
        outside = [name for name in self._union(last.models, part, parts, donor) if layer_index(name) is None]
        found += [self._tensor(n, [n] * len(last.models), last, 0.0, donor) for n in outside if not is_before_layers(n)]
        return found

    def _layers(
        self, stack: Stack, layers: str, all_names: Mapping[int, Sequence[str]], part: _Part, donor: int
    ) -> list[TensorPlan | None]:
        """The layers of one slice, each merged from one layer of every source."""
        assert stack.count is not None
        for model, begin in zip(stack.models, stack.begins):
            held = count_layers(all_names[model]).get(layers, 0)
            if begin + stack.count > held and self.readers[model] is not None:
                end = begin + stack.count
                label = self.inputs.models[model].label
                self.findings.error(f"{stack.where}: layer_range [{begin}, {end}] of {label}, which has {held} layers")
                return []
        found = []
        for position in range(stack.count):
            number = stack.first + position
            origin = [(model, begin + position) for model, begin in zip(stack.models, stack.begins)]
            if part.name in (None, "default", "text_decoder"):
                self.origins.append(origin)
            rests: dict[str, None] = {}
            for model, layer in sorted(origin, key=lambda entry: entry[0] != donor):
                prefix = f"{layers}.{layer}."
                rests |= dict.fromkeys(n.removeprefix(prefix) for n in all_names[model] if n.startswith(prefix))
            for rest in rests:
                names = [f"{layers}.{layer}.{rest}" for _, layer in origin]
                found.append(
                    self._tensor(f"{layers}.{number}.{rest}", names, stack, depth(position, stack.count), donor)
                )
        return found

    def _tensor(self, name: str, names: Sequence[str], stack: Stack, position: float, donor: int) -> TensorPlan | None:
        """One output tensor; `names` are those of the sources, `position` the depth of gradients."""
        findings, models = self.findings, self.inputs.models
        stored = {model: self.aliases[model].get(n, n) for model, n in zip(stack.models, names)}
        parameters = self.resolver.values(stack, name, names, position)
        present = {}
        for model, n in stored.items():
            reader = self.readers[model]
            if reader is not None and n in reader:
                present[model] = reader
            elif reader is not None:
                moved = f" (as {n})" if n != name else ""
                findings.error(f"not in {models[model].label}{moved}", name)
        if len(present) < len(stack.models):
            return None
        shapes = {model: present[model].shape(stored[model]) for model in stack.models}
        dtypes = {model: present[model].dtype(stored[model]) for model in stack.models}
        maps = None
        if self.arranger and has_vocabulary(name) and len({shape[1:] for shape in shapes.values()}) == 1:
            maps = self.arranger.arrange(name, stack, stored)
        if maps is None and len(set(shapes.values())) > 1:
            if not (self.arranger and has_vocabulary(name) and self.arranger.vocabulary is None):
                self._shape_error(name, shapes)
            return None
        shape = next(iter(shapes.values()))
        sources = tuple(Source(model, n) for model, n in stored.items())
        if maps is not None:
            shape = (len(next(iter(maps.values())).models), *shape[1:])
            sources = tuple(Source(model, name, maps[model]) for model in stored)
        reference = donor if donor in stack.models else stack.models[stack.base or 0]
        folder = models[reference].stored
        assert folder is not None
        kept = folder.dtype(stored[reference]) if self.exact else promoted(list(dtypes.values()))
        floating = [dtype.is_floating_point for dtype in dtypes.values()]
        if any(floating) and not all(dtype in FLOATS.values() for dtype in dtypes.values()):
            found = ", ".join(sorted({dtype_name(dtype) for dtype in dtypes.values()}))
            findings.error(f"dtype {found}; only {', '.join(FLOATS)} can be merged", name)
            return None
        layer = layer_index(name)
        if not any(floating):
            if len(set(dtypes.values())) > 1:
                findings.error(f"integer tensor with different dtypes {sorted(map(str, dtypes.values()))}", name)
            return TensorPlan(name, shape, kept, sources, stack.base, layer, "equal", {})
        wanted = self.config.out_dtype or self.config.dtype
        return TensorPlan(
            name=name,
            shape=shape,
            dtype=FLOATS[wanted] if wanted else kept,
            sources=sources,
            base=stack.base,
            layer=layer,
            operation=self.config.merge_method,
            parameters=parameters,
        )

    def _shape_error(self, name: str, shapes: Mapping[int, tuple[int, ...]]) -> None:
        models = self.inputs.models
        if has_vocabulary(name) and len({shape[1:] for shape in shapes.values()}) == 1:
            rows = ", ".join(f"{shape[0]} in {models[model].label}" for model, shape in shapes.items())
            text = f"vocabularies differ: rows {rows}; give 'tokenizer_source' (base, union or a model) or 'tokenizer'"
            self.findings.error(text, name)
        else:
            found = "; ".join(f"{list(shape)} in {models[model].label}" for model, shape in shapes.items())
            self.findings.error(f"shapes differ: {found}", name)

    # what goes beside the weights

    def _arranged_models(self) -> tuple[TensorReader, ...]:
        readers = tuple(reader for reader in self.readers if reader is not None)
        arranged = self.arranger.arranged if self.arranger else {}
        return tuple(
            ArrangedModel(reader, readers, arranged[number], self.exact) if number in arranged else reader
            for number, reader in enumerate(readers)
        )

    def _compare_tokenizers(self, donor: int) -> None:
        """Without a rule, rows must mean the same tokens; models that only add tokens at new ids are fine."""
        models = self.inputs.models
        try:
            vocabularies = [model.tokens for model in models]
        except ValueError as error:
            self.findings.error(str(error))
            return
        expected = vocabularies[donor]
        if expected is None:
            return
        names = {index: token for token, index in expected.ids.items()}
        for found in vocabularies:
            if found is None or found is expected:
                continue
            differing = sorted(index for token, index in found.ids.items() if names.get(index, token) != token)
            if differing:
                self.findings.warn(
                    f"tokenizers: {len(differing)} ids (first: {differing[0]}) mean other tokens in {found.folder} "
                    f"than {expected.folder}; rows are merged by id, for want of 'tokenizer_source'"
                )

    def _tokenizer_donor(self, donor: int) -> Path:
        return self.arranger.donor if self.arranger else self.inputs.models[donor].path

    def _config_json(self, donor: int) -> dict[str, Any]:
        config = deepcopy(self.inputs.models[donor].config)
        wanted = self.config.out_dtype or self.config.dtype
        if wanted:
            set_dtype(config, wanted)
        if self.untied:
            set_value(config, "tie_word_embeddings", False)
            config["tie_word_embeddings"] = False
        if self.origins:
            configs = {number: model.config for number, model in enumerate(self.inputs.models)}
            set_layers(config, self.origins, configs, self.findings)
        if self.arranger and self.arranger.vocabulary:
            tokens = self.inputs.models[donor].tokens
            set_vocabulary(config, self.arranger.vocabulary, tokens, self.findings)
        return config
