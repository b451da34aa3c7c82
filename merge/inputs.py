"""The models that go into a merge: found, opened, compared; and the place where the result shall lie. Headers only."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.files import MANIFEST, check_absent, read_json
from ..engine.model_files import carried_files
from ..engine.safetensors_io import SafetensorsFolder
from .adapters import AdaptedModel
from .arranged import TensorReader
from .config import resolve_model
from .findings import Findings
from .journal import reserved_bytes
from .layers import is_embedding, is_head
from .result_config import text_config
from .vocabulary import Tokens, read_tokens

MUST_AGREE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
SHOULD_AGREE = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "sliding_window", "hidden_act")


@dataclass(eq=False)
class Input:
    """One model of a merge.

    written: as the configuration first names it. stored: the tensors in its folder. reader: those under its adapter;
    both None if they could not be opened, which is then among the errors.
    """

    written: str
    path: Path
    adapter: Path | None
    config: dict[str, Any]
    stored: SafetensorsFolder | None
    reader: TensorReader | None

    @property
    def label(self) -> str:
        return f"{self.path}+{self.adapter}" if self.adapter else str(self.path)

    @cached_property
    def head(self) -> str | None:
        return next((name for name in self.reader.names if is_head(name)), None) if self.reader else None

    @cached_property
    def embedding(self) -> str | None:
        return next((name for name in self.reader.names if is_embedding(name)), None) if self.reader else None

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return self.reader.shape(self.embedding)[0] if self.reader and self.embedding else 0

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the head too: config.json says so, else the absence of a head does."""
        stated = self.config.get("tie_word_embeddings", text_config(self.config).get("tie_word_embeddings"))
        return bool(self.head is None if stated is None else stated)

    @cached_property
    def tokens(self) -> Tokens | None:
        """Of the tokenizer that lies beside the adapter, else of the model's."""
        return (read_tokens(self.adapter) if self.adapter else None) or read_tokens(self.path)

    @property
    def identity(self) -> list[Path]:
        """The files whose hashes say which model it was: its manifest if it has one, else weights and what goes along;
        and the adapter's."""
        manifest = self.path / MANIFEST
        weights = self.stored.files if self.stored else []
        files = [manifest] if manifest.is_file() else [*weights, *carried_files(self.path)]
        return files + [file for file in (self.reader.files if self.reader else []) if file not in weights]


class Inputs:
    """Models by what the configuration writes; each folder, or folder and adapter, is opened once and numbered."""

    def __init__(self, folder: Path | None, findings: Findings) -> None:
        self.folder, self.findings = folder, findings
        self.models: list[Input] = []
        self._numbers: dict[tuple[Path, Path | None], int] = {}

    def number(self, written: str) -> int:
        """The model's number. One whose folder is not there has a number too, so that all else is looked at."""
        try:
            key = resolve_model(written, self.folder)
        except FileNotFoundError as error:
            self.findings.error(str(error))
            key = (Path(written), None)
            if key not in self._numbers:
                self._numbers[key] = len(self.models)
                self.models.append(Input(written, *key, {}, None, None))
        if key not in self._numbers:
            self._numbers[key] = len(self.models)
            self.models.append(self._open(written, *key))
        return self._numbers[key]

    def known(self, written: str) -> int | None:
        """The number of a model that is among the inputs already; None: it is another, or not there."""
        try:
            return self._numbers.get(resolve_model(written, self.folder))
        except FileNotFoundError:
            return None

    def _open(self, written: str, path: Path, adapter: Path | None) -> Input:
        config: dict[str, Any] = {}
        stored, reader = None, None
        try:
            config = read_json(path / "config.json")
        except (FileNotFoundError, ValueError) as error:
            self.findings.error(str(error))
        if config.get("quantization_config"):
            self.findings.error(f"{path}: quantization_config: quantised weights cannot be merged")
        try:
            stored = SafetensorsFolder(path)
            reader = AdaptedModel(stored, adapter) if adapter else stored
        except (FileNotFoundError, ValueError) as error:
            self.findings.error(str(error))
            if stored is None:
                self._find_more_damage(path)
        return Input(written, path, adapter, config, stored, reader)

    def _find_more_damage(self, path: Path) -> None:
        """A folder is refused for the first damaged file; the others are looked at one by one."""
        for file in sorted(path.glob("*.safetensors")):
            try:
                SafetensorsFolder(path, single_file=file.name).close()
            except ValueError as error:
                self.findings.error(str(error))

    def compare(self, *, same_depth: bool) -> None:
        """config.json against the first model's: what must agree, and what should."""
        models = [model for model in self.models if model.config]
        must = (*MUST_AGREE, "num_hidden_layers") if same_depth else MUST_AGREE
        for model in models[1:]:
            for key in (*must, *SHOULD_AGREE):
                one, other = (_stated(each.config, key) for each in (models[0], model))
                if one != other:
                    text = f"config.json: {key} is {one!r} in {models[0].path} and {other!r} in {model.path}"
                    if key in must:
                        self.findings.error(text)
                    else:
                        self.findings.warn(f"{text}; the result takes the donor's")


def _stated(config: Mapping[str, Any], key: str) -> Any:
    return config.get(key, text_config(config).get(key))


def check_output(out: Path, models: Sequence[Input], needed: int, findings: Findings) -> None:
    """The place of the result: free, apart from the inputs, on a disk with room for `needed` bytes."""
    place = out.resolve()
    for model in models:
        for folder in (model.path, model.adapter):
            if folder is None:
                continue
            if place == folder:
                findings.error(f"{out}: is an input of the merge; choose another output")
                return
            if place.is_relative_to(folder) or folder.is_relative_to(place):
                findings.error(f"{out}: {'lies in' if place.is_relative_to(folder) else 'holds'} the input {folder}")
                return
    try:
        check_absent(out)
    except FileExistsError as error:
        findings.error(str(error))
    parent = next(folder for folder in (place, *place.parents) if folder.is_dir())
    needed -= reserved_bytes(out)  # by an interrupted merge, which this one goes on with
    if (free := shutil.disk_usage(parent).free) < needed:
        findings.error(f"{out}: {needed / 1e9:.2f} GB are needed, the disk of {parent} has {free / 1e9:.2f} GB free")
