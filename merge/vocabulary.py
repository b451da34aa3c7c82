"""Vocabularies: which tokens the result has, and where each model's row for each of them comes from.

A token that a model lacks gets, in that model's embedding and head, the base's row if the base has the token, else the
row of the only model that has it, else the mean over those that have it, else zeros; a rule of `tokenizer.tokens` goes
before that. Then the rows are merged as any tensor. This is mergekit's arrangement, with two differences: rows that pad
the donor's embedding beyond its tokens are kept (`vocab_size: keep`), and ids beyond a model's rows are tokens that the
model lacks. Reads tokenizer.json and tokenizer_config.json; knows rows only by number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import read_json
from .arranged import MEAN, PAD, ZERO, RowMap

# Files that hold a vocabulary too and would not know tokens added to tokenizer.json.
OTHER_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tekken.json")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


@dataclass(frozen=True)
class Tokens:
    """The vocabulary of a folder's tokenizer.json: ids by token, and the entries of those added to the model's own."""

    folder: Path
    ids: dict[str, int]
    added: dict[str, dict[str, Any]]

    @property
    def end(self) -> int:
        """One more than the highest id."""
        return max(self.ids.values(), default=-1) + 1


def read_tokens(folder: Path) -> Tokens | None:
    """None if the folder has no tokenizer.json.

    Raises:
        ValueError: it has one that is not as the tokenizers library writes it.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    written = read_json(path)
    try:
        vocabulary = written["model"]["vocab"]
        if isinstance(vocabulary, list):  # unigram models list [token, score] by id
            vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
        added = {entry["content"]: dict(entry) for entry in written.get("added_tokens") or ()}
        ids = dict(vocabulary) | {token: entry["id"] for token, entry in added.items()}
        if not all(isinstance(index, int) and index >= 0 for index in ids.values()):
            raise TypeError("ids must be whole numbers from 0 on")
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: no vocabulary that can be read ({error!r})") from None
    return Tokens(folder, ids, added)


@dataclass(frozen=True)
class OutputVocabulary:
    """The tokens of the result.

    ids: of all tokens, in the order of ids.
    added: entries of tokenizer.json for tokens that the donor does not have.
    padded_to: rows that are wanted: at least so many ("keep" of a donor's padded embedding), or a multiple.
    """

    donor: Tokens
    ids: dict[str, int]
    added: tuple[dict[str, Any], ...]
    keep_rows: int = 0
    multiple: int | None = None

    @property
    def tokens_end(self) -> int:
        return max(self.ids.values(), default=-1) + 1

    @property
    def rows(self) -> int:
        wanted = max(self.tokens_end, self.keep_rows)
        return -(-wanted // self.multiple) * self.multiple if self.multiple else wanted

    def tokenizer_files(self) -> dict[str, str]:
        """Content of the files that must say something else than the donor's; none if no token was added."""
        if not self.added:
            return {}
        folder = self.donor.folder
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer["added_tokens"] = [*(tokenizer.get("added_tokens") or ()), *self.added]
        files = {"tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=2)}
        if (folder / "tokenizer_config.json").is_file():
            config = read_json(folder / "tokenizer_config.json")
            if "added_tokens_decoder" in config:
                for entry in self.added:
                    without_id = {key: value for key, value in entry.items() if key != "id"}
                    config["added_tokens_decoder"][str(entry["id"])] = without_id
                files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        return files


def build_vocabulary(
    donor: Tokens,
    others: Sequence[tuple[Tokens, int]],
    more: Sequence[str],
    *,
    keep_rows: int = 0,
    multiple: int | None = None,
) -> OutputVocabulary:
    """The donor's tokens with their ids, then those of the other tokenizers that it lacks, then `more`.

    Ordinary tokens come first, then the added ones with their settings, in the order of the models and of their ids. A
    token that was ordinary in its model is added as text to be found before any other, as transformers does it: the
    donor's merges do not make it.

    Args:
        others: tokenizers, and the rows of the models they belong to: ids beyond have no row and do not count.
        more: further tokens, of `tokenizer.tokens`.
    """
    ordinary: dict[str, dict[str, Any]] = {}
    special: dict[str, dict[str, Any]] = {}
    for tokens, rows in others:
        for token, index in sorted(tokens.ids.items(), key=lambda item: item[1]):
            if token in donor.ids or index >= rows:
                continue
            if token in tokens.added:
                special.setdefault(token, tokens.added[token])
            else:
                ordinary.setdefault(token, _PLAIN)
    entries = {token: entry for token, entry in ordinary.items() if token not in special} | special
    entries |= {token: _PLAIN for token in more if token not in donor.ids and token not in entries}
    added = tuple(
        {"id": index, "content": token} | {key: value for key, value in entry.items() if key not in ("id", "content")}
        for index, (token, entry) in enumerate(entries.items(), donor.end)
    )
    ids = dict(sorted(donor.ids.items(), key=lambda item: item[1]))
    ids |= {str(entry["content"]): index for index, entry in enumerate(added, donor.end)}
    return OutputVocabulary(donor, ids, added, 0 if multiple else keep_rows, multiple)


@dataclass(frozen=True)
class ResolvedRule:
    """Of one token: (model, row) whose row it takes, None for zeros; in every model, or in those that lack it."""

    source: tuple[int, int] | None
    force: bool


def own_rows(vocabulary: OutputVocabulary, tokens: Tokens, rows: int) -> np.ndarray:
    """int64 [rows of the result]: the row that a model of `rows` rows has for each token; -1: none, or no token."""
    found = np.full(vocabulary.rows, -1, np.int64)
    for token, index in vocabulary.ids.items():
        row = tokens.ids.get(token, -1)
        if row < rows:
            found[index] = row
    return found


def row_maps(
    vocabulary: OutputVocabulary,
    own: Mapping[int, np.ndarray],
    base: int | None,
    rules: Mapping[str, ResolvedRule],
    padding: Mapping[int, np.ndarray],
    donor: int | None,
) -> dict[int, RowMap]:
    """For each model of one output tensor, where its rows come from.

    Args:
        own: by model, what `own_rows` says.
        base: the base model, if it is one of them.
        padding: by model, bool [rows of the result]: rows of its tensor that belong to no token of its tokenizer.
        donor: the model whose padding models with shorter tensors take.
    """
    count = vocabulary.rows
    models = list(own)
    table = np.stack([own[model] for model in models])  # [models, rows]
    present = table >= 0
    is_token = np.zeros(count, bool)
    is_token[list(vocabulary.ids.values())] = True

    first = present.argmax(axis=0)  # the only one, where there is one
    default_model = np.asarray(models)[first]
    default_row = table[first, np.arange(count)]
    if base is not None:
        has = own[base] >= 0
        default_model[has], default_row[has] = base, own[base][has]
    in_none = ~present.any(axis=0)
    default_model[in_none], default_row[in_none] = ZERO, 0
    averaged = is_token & (present.sum(axis=0) > 1) & ~present.all(axis=0)
    if base is not None:
        averaged &= own[base] < 0
    means: list[tuple[tuple[int, int], ...]] = []
    for index in np.flatnonzero(averaged).tolist():
        default_model[index], default_row[index] = MEAN, len(means)
        means.append(tuple((model, int(own[model][index])) for model in models if own[model][index] >= 0))

    forced = np.zeros(count, bool)
    for token, rule in rules.items():
        index = vocabulary.ids[token]
        default_model[index], default_row[index] = rule.source or (ZERO, 0)
        forced[index] = rule.force

    found = {}
    for model in models:
        uses_own = (own[model] >= 0) & ~forced
        sources = np.where(uses_own, model, default_model)
        rows = np.where(uses_own, own[model], default_row)
        beyond = ~is_token
        if vocabulary.multiple:
            sources[beyond], rows[beyond] = PAD, 0
        else:
            here = beyond & padding[model]
            there = beyond & ~here & (padding[donor] if donor is not None else False)
            sources[beyond], rows[beyond] = ZERO, 0
            sources[here], rows[here] = model, np.flatnonzero(here)
            if donor is not None:
                sources[there], rows[there] = donor, np.flatnonzero(there)
        found[model] = RowMap(sources.astype(np.int64), rows.astype(np.int64), tuple(means))
    return found


def padding_rows(vocabulary: OutputVocabulary, tokens: Tokens, rows: int) -> np.ndarray:
    """bool [rows of the result]: rows that a model of `rows` rows has and that none of its tokens uses."""
    found = np.arange(vocabulary.rows) < rows
    taken = [index for index in tokens.ids.values() if index < vocabulary.rows]
    found[taken] = False
    return found


def is_identity(row_map: RowMap, model: int, rows: int) -> bool:
    """Whether a model's tensor of `rows` rows is taken as it is."""
    return (
        len(row_map.models) == rows
        and bool((row_map.models == model).all())
        and bool((row_map.rows == np.arange(rows)).all())
    )
