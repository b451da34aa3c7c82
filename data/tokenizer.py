"""Tokenizers of model folders: `tokenizer.json` (Hugging Face tokenizers) or `tokenizer.model` (sentencepiece).

Both are read through the library that defines them; no ids are computed here. May touch the files of one model folder,
read only. Two ways to encode, never mixed up: `encode` for text that somebody wrote (a literal "</s>" in it is
characters, not a token) and `encode_with_special` for text that a chat template rendered.

Special tokens come from `tokenizer_config.json`, then `special_tokens_map.json`, then `generation_config.json` and
`config.json`; the chat template from `chat_template.jinja`, else from `tokenizer_config.json`. These are the layouts
that transformers 4 and 5 write.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .chat_template import render_chat_template
from .files import read_json, sha256_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class _Backend(Protocol):
    """What `Tokenizer` needs of a library. Ids in, ids out; no BOS or EOS is ever added."""

    name: str
    vocab_size: int
    special_ids: frozenset[int]
    bos_id: int | None
    eos_id: int | None

    @property
    def adds_bos(self) -> bool: ...
    @property
    def fingerprint(self) -> str: ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_with_special(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool) -> str: ...
    def token(self, id: int) -> str | None: ...
    def token_id(self, token: str) -> int | None: ...


class Tokenizer:
    """A model's tokenizer with its special tokens and chat template. Made by `load_tokenizer`.

    Attributes:
        vocab_size: highest id + 1, added tokens included.
        bos_id, eos_id: ids of the begin- and end-of-text tokens, None if the model has none.
        adds_bos: whether the tokenizer's own default puts BOS before a text.
        special_ids: ids of control tokens, which never come from plain text.
        fingerprint: SHA-256 of all that decides which ids a text gets; equal for differently formatted copies.
        chat_template: the Jinja source, or None.
        special_tokens: {"bos_token": "<s>", ...} as chat templates see them.
        library: name and version of the library that encodes.
    """

    def __init__(self, folder: Path, backend: _Backend, settings: _Settings) -> None:
        self.folder = folder
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        self.bos_id = settings.find_id("bos", backend)
        self.eos_id = settings.find_id("eos", backend)
        self.adds_bos = self.bos_id is not None and backend.adds_bos
        self.fingerprint = backend.fingerprint
        self.chat_template = settings.chat_template
        self.special_tokens = settings.special_tokens
        for name, id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if id is not None and name not in self.special_tokens:
                self.special_tokens[name] = backend.token(id) or ""
        self.library = backend.name
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: special-token strings in it stay text, no BOS or EOS is added."""
        return self._backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, which is faster."""
        return self._backend.encode_batch(texts)

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of text in which special-token strings are those tokens, such as a rendered chat. Adds no BOS or EOS."""
        return self._backend.encode_with_special(text)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. Ids beyond the vocabulary (rows that pad an embedding) have no text and are left out."""
        return self._backend.decode([int(id) for id in ids if 0 <= id < self.vocab_size], skip_special)

    def token(self, id: int) -> str:
        """The token's own string, as the vocabulary spells it.

        Raises:
            ValueError: no such id.
        """
        token = self._backend.token(int(id)) if 0 <= id < self.vocab_size else None
        if token is None:
            raise ValueError(f"{self.folder}: no token has id {id}; the vocabulary has {self.vocab_size} ids")
        return token

    def token_id(self, token: str) -> int:
        """The id of a token given by its string.

        Raises:
            ValueError: no such token.
        """
        id = self._backend.token_id(token)
        if id is None:
            raise ValueError(f"{self.folder}: the tokenizer has no token {token!r}")
        return id

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model's template writes it; encode it with `encode_with_special`.

        Raises:
            ValueError: the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.folder}: the model has no chat template")
        return render_chat_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            **variables,
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder; `tokenizer.json` is preferred, as transformers does.

    Raises:
        FileNotFoundError: neither tokenizer file is there.
        ValueError: a file that its library refuses, or JSON that does not parse, named.
    """
    folder = Path(folder)
    settings = _Settings(folder)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer(folder, _HuggingFaceBackend(folder / "tokenizer.json"), settings)
    if (folder / "tokenizer.model").is_file():
        return Tokenizer(folder, _SentencePieceBackend(folder / "tokenizer.model", settings), settings)
    raise FileNotFoundError(f"{folder}: no tokenizer; looked for {' and '.join(TOKENIZER_FILES)}")


class _HuggingFaceBackend:
    """A `tokenizer.json`, with the file's truncation and padding switched off: neither may touch a corpus."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        self.name = f"tokenizers {tokenizers.__version__}"
        source = path.read_text(encoding="utf-8")
        self._plain = self._load(source)
        self._plain.encode_special_tokens = True
        self._source = source
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.bos_id: int | None = None  # a tokenizer.json does not say which tokens these are
        self.eos_id: int | None = None

    def _load(self, source: str) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{self.path}: not a tokenizer.json that tokenizers can read ({error})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def _with_special(self) -> Any:
        return self._load(self._source)

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the post-processor puts a special token before a text. `add_bos_token` in the configuration has no
        say beside a tokenizer.json: transformers 5 ignores it too."""
        ids = self._plain.encode("a").ids
        return len(ids) > 1 and ids[0] in self.special_ids

    @functools.cached_property
    def fingerprint(self) -> str:
        return sha256_json(_meaning(json.loads(self._source)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # "fast" leaves out the offsets into the text, which nobody here asks for.
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_special(self, text: str) -> list[int]:
        return self._with_special.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self._plain.decode(ids, skip_special_tokens=skip_special)

    def token(self, id: int) -> str | None:
        return self._plain.id_to_token(id)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)


def _meaning(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer.json that decide ids, spelt one way: libraries differ in defaults and in merges."""
    model = {key: value for key, value in tokenizer.get("model", {}).items() if value not in (None, False)}
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    added = [[token["id"], token["content"], token.get("special")] for token in tokenizer.get("added_tokens") or []]
    return {
        "model": model,
        "normalizer": tokenizer.get("normalizer"),
        "pre_tokenizer": tokenizer.get("pre_tokenizer"),
        "added_tokens": sorted(added, key=lambda token: token[0]),
    }


class _SentencePieceBackend:
    """A `tokenizer.model`. Each stretch of text between special tokens is encoded on its own, as Mistral does."""

    def __init__(self, path: Path, settings: _Settings) -> None:
        import sentencepiece

        self.name = f"sentencepiece {sentencepiece.__version__}"
        data = path.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except Exception as error:  # the library raises RuntimeError and others
            raise ValueError(f"{path}: not a model that sentencepiece can read ({error})") from None
        processor = self._processor
        size = processor.vocab_size()
        self._added = {token: id for token, id in settings.added_tokens.items() if id >= size}
        self._added_tokens = {id: token for token, id in self._added.items()}
        self.vocab_size = max([size - 1, *self._added_tokens]) + 1
        controls = {id for id in range(size) if processor.is_control(id)}
        self.special_ids = frozenset(controls | set(self._added_tokens))
        self._special = {**{processor.id_to_piece(id): id for id in controls}, **self._added}
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else None
        self.eos_id = processor.eos_id() if processor.eos_id() >= 0 else None
        self.adds_bos = settings.config.get("add_bos_token", True) is not False
        identity = {"model": hashlib.sha256(data).hexdigest(), "added_tokens": sorted(self._added_tokens.items())}
        self.fingerprint = sha256_json(identity)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._processor.encode(text) for text in texts]

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        # Longest first, so that of two tokens that begin alike the longer one wins. With no token it matches nothing.
        longest_first = sorted(self._special, key=len, reverse=True)
        return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")

    def encode_with_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._processor.encode(part))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        parts: list[str] = []
        stretch: list[int] = []
        for id in ids:
            if id not in self.special_ids:
                stretch.append(id)
            elif not skip_special:
                parts += [self._processor.decode(stretch), self.token(id) or ""]
                stretch = []
        return "".join([*parts, self._processor.decode(stretch)])

    def token(self, id: int) -> str | None:
        if id < self._processor.vocab_size():
            return self._processor.id_to_piece(id)
        return self._added_tokens.get(id)

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        id = self._processor.piece_to_id(token)
        return id if self._processor.id_to_piece(id) == token else None


class _Settings:
    """What the JSON files beside a tokenizer say: special tokens, added tokens, chat template."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_optional(folder / "tokenizer_config.json")
        self.special_tokens: dict[str, Any] = {}
        for source in (_read_optional(folder / "special_tokens_map.json"), self.config):
            for name, value in source.items():
                if name.endswith("_token") and _content(value) is not None:
                    self.special_tokens[name] = _content(value)
        self.chat_template = self._find_chat_template()

    def find_id(self, kind: str, backend: _Backend) -> int | None:
        """The id of the "bos" or "eos" token: by its string, else by the model's configuration, else the library's."""
        token = self.special_tokens.get(f"{kind}_token")
        if token is not None:
            id = backend.token_id(token)
            if id is None:
                raise ValueError(
                    f"{self.folder / 'tokenizer_config.json'}: {kind}_token {token!r} is not in the tokenizer"
                )
            return id
        for name in ("generation_config.json", "config.json"):
            value = _read_optional(self.folder / name).get(f"{kind}_token_id")
            if isinstance(value, list) and value:
                value = value[0]
            if isinstance(value, int) and 0 <= value < backend.vocab_size:
                return value
        return backend.bos_id if kind == "bos" else backend.eos_id

    @functools.cached_property
    def added_tokens(self) -> dict[str, int]:
        """Tokens that Hugging Face files add to a sentencepiece model."""
        added = dict(_read_optional(self.folder / "added_tokens.json"))
        for id, token in self.config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(id)
        return added

    def _find_chat_template(self) -> str | None:
        file = self.folder / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named ones: the default is meant
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template


def _read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a model folder may lack."""
    return read_json(path) if path.is_file() else {}


def _content(value: Any) -> str | None:
    """A special token is written as its string or as an object with its content."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
