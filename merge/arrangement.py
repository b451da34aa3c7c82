"""Arranging vocabularies in a plan: the result's tokens, and for each vocabulary tensor the rows of every model.

`vocabulary.py` has the rules; here they meet the configuration and the tensors' shapes. Reads tokenizers, no weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .arranged import MEAN, PAD, ArrangedTensor, RowMap
from .config import TokenizerRule, TokenOfModel, Zero
from .findings import Findings
from .inputs import Input, Inputs
from .layers import Stack
from .vocabulary import (
    OutputVocabulary,
    ResolvedRule,
    Tokens,
    build_vocabulary,
    is_identity,
    own_rows,
    padding_rows,
    read_tokens,
    row_maps,
)


class Arranger:
    """What `tokenizer` or `tokenizer_source` asks for.

    Args:
        base: number of the base model, or of the first one without.
        compute: dtype in which means are formed, None for the widest of the models'.

    Attributes:
        vocabulary: of the result; None if it could not be made, and the errors say why.
        donor: the folder the tokenizer's files come from.
        arranged: by model, the tensors whose rows are arranged.
    """

    def __init__(
        self, rule: TokenizerRule, inputs: Inputs, base: int, findings: Findings, compute: torch.dtype | None
    ) -> None:
        self.models, self.findings, self.compute = inputs.models, findings, compute
        self.arranged: dict[int, dict[str, ArrangedTensor]] = {}
        self._base, self._source = base, base
        self.donor = inputs.models[base].path
        self.vocabulary: OutputVocabulary | None = None
        self._tokens = self._read_all(base)
        if self._tokens is not None:
            self._build(rule, inputs)

    def _read_all(self, base: int) -> list[Tokens] | None:
        """Of every model; one without a tokenizer is taken to have the base's."""
        found: list[Tokens | None] = []
        for model in self.models:
            try:
                found.append(model.tokens)
            except ValueError as error:
                self.findings.error(str(error))
                return None
        first = found[base]
        if first is None:
            self.findings.error(f"{self.models[base].label}: no tokenizer.json, which arranging vocabularies needs")
            return None
        for model, tokens in zip(self.models, found):
            if tokens is None:
                self.findings.warn(f"{model.label}: no tokenizer.json; taken to be the one of {first.folder}")
        return [tokens or first for tokens in found]

    def _build(self, rule: TokenizerRule, inputs: Inputs) -> None:
        assert self._tokens is not None
        others: list[tuple[Tokens, int]] = []
        source: int | None = self._base
        if rule.source == "union":
            others = [(tokens, model.rows) for model, tokens in zip(self.models, self._tokens)]
        elif rule.source != "base":
            source = inputs.known(rule.source)
        if source is not None:
            donor, keep = self._tokens[source], self.models[source].rows
            self._source, self.donor = source, donor.folder
        else:
            outside = self._outside(rule.source, inputs)
            if outside is None:
                return
            donor, keep, self._source, self.donor = outside, 0, -1, outside.folder
        padded = rule.vocab_size == "keep"
        self.vocabulary = build_vocabulary(
            donor, others, list(rule.tokens), keep_rows=keep if padded else 0, multiple=rule.pad_to_multiple_of
        )
        if source is not None and donor.end > keep:
            self.findings.warn(
                f"{donor.folder}: the tokenizer has ids up to {donor.end - 1}, the embedding {keep} rows; "
                "tokens beyond get rows as tokens that the model lacks"
            )
        self._rules = self._resolve_rules(rule, inputs)

    def _outside(self, written: str, inputs: Inputs) -> Tokens | None:
        """The tokenizer of a folder that is not merged."""
        folders = [root / written for root in (inputs.folder, Path.cwd()) if root is not None]
        folder = next((folder.resolve() for folder in folders if folder.is_dir()), None)
        try:
            found = read_tokens(folder) if folder else None
        except ValueError as error:
            self.findings.error(str(error))
            return None
        if found is None:
            self.findings.error(f"tokenizer_source: {folder or written} is no folder with a tokenizer.json")
        return found

    def _resolve_rules(self, rule: TokenizerRule, inputs: Inputs) -> dict[str, ResolvedRule]:
        assert self._tokens is not None
        found = {}
        for token, written in rule.tokens.items():
            source, where = written.source, f"tokenizer.tokens.{token}"
            if source is None:
                continue
            if isinstance(source, Zero):
                found[token] = ResolvedRule(None, written.force)
                continue
            path = source.model if isinstance(source, TokenOfModel) else source
            model = inputs.known(path)
            if model is None:
                self.findings.error(f"{where}: {path} is not one of the merged models")
                continue
            wanted = token if isinstance(source, str) else source.token
            row = source.token_id if isinstance(source, TokenOfModel) and wanted is None else None
            if wanted is not None:
                row = self._tokens[model].ids.get(wanted)
            if row is None or row >= self.models[model].rows:
                what = f"no token {wanted!r}" if wanted is not None else f"no row {row}"
                self.findings.error(f"{where}: {self.models[model].label} has {what}")
                continue
            found[token] = ResolvedRule((model, row), written.force)
        return found

    def arrange(self, name: str, stack: Stack, names: Mapping[int, str]) -> dict[int, RowMap] | None:
        """Row maps of an output tensor's models, or None where every model's tensor is taken as it is.

        Args:
            name: of the output tensor.
            names: by model, of its tensor.
        """
        if self.vocabulary is None or self._tokens is None:
            return None
        rows = {model: self._rows(model, tensor) for model, tensor in names.items()}
        own = {model: own_rows(self.vocabulary, self._tokens[model], rows[model]) for model in names}
        donor = self._source if self._source >= 0 else None
        padded = set(names) | ({donor} if donor is not None else set())
        all_names = {model: names.get(model, name) for model in padded}
        all_names |= {
            model: names.get(model, name) for model, _ in filter(None, (r.source for r in self._rules.values()))
        }
        for model in [model for model in all_names if not self._has(model, all_names[model])]:
            if model in padded and model not in names:
                padded.discard(model)
                donor = None
            else:
                self.findings.error(f"a rule of tokenizer.tokens needs it in {self.models[model].label}", name)
                return None
        padding = {
            model: padding_rows(self.vocabulary, self._tokens[model], self._rows(model, all_names[model]))
            for model in padded
        }
        maps = row_maps(self.vocabulary, own, stack.configured_base, self._rules, padding, donor)
        if all(is_identity(row_map, model, rows[model]) for model, row_map in maps.items()):
            return None
        for model, row_map in maps.items():
            used = [number for number in all_names if (row_map.models == number).any()]
            used += [number for mean in row_map.means for number, _ in mean if number not in used]
            tensors = {number: all_names[number] for number in dict.fromkeys([model, *used])}
            shape = self._shape(model, names[model])
            dtype = self._dtype(row_map, tensors)
            entry = ArrangedTensor(tensors, row_map, (self.vocabulary.rows, *shape[1:]), dtype)
            self.arranged.setdefault(model, {})[name] = entry
        return maps

    def _dtype(self, row_map: RowMap, tensors: Mapping[int, str]) -> torch.dtype:
        """That of the rows, where they all have one and nothing is computed; else that of means."""
        dtypes = [self._reader(model).dtype(name) for model, name in tensors.items()]
        if len(set(dtypes)) == 1 and not ((row_map.models == MEAN) | (row_map.models == PAD)).any():
            return dtypes[0]
        if self.compute is not None:
            return self.compute
        widest = dtypes[0]
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        return widest

    def _reader(self, model: int):  # type: ignore[no-untyped-def]
        return self.models[model].reader

    def _has(self, model: int, name: str) -> bool:
        return self.models[model].reader is not None and name in self._reader(model)

    def _shape(self, model: int, name: str) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._reader(model).shape(name)
        return shape

    def _rows(self, model: int, name: str) -> int:
        return self._shape(model, name)[0]

    def counts(self, name: str, models: Sequence[int]) -> list[tuple[Input, dict[str, int]]]:
        """For a person: of each model, how many rows of a tensor come from where."""
        return [
            (self.models[model], self.arranged[model][name].row_map.counts(model))
            for model in models
            if name in self.arranged.get(model, {})
        ]
