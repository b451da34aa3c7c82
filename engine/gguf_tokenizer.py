"""The tokenizer that a GGUF file's metadata describes, as Hugging Face files. Touches no files itself.

GGUF stores a vocabulary, merges or scores, token types, and the name of the rule by which text is cut up before merging
(`tokenizer.ggml.pre`); the rules themselves live in llama.cpp (`llama_vocab::impl::load`), and here in `PRE_TOKENIZERS`
as the models' own tokenizer.json files have them. A rule that is not known is refused: near misses give other ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

# llama.cpp's token types
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_TYPES = "tokenizer.ggml.token_type"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut up. `split`: a regular expression for the pieces; None: GPT-2's own, inside ByteLevel.

    `digits`: each digit is cut off first. `ignore_merges`: a piece that is a token becomes it without merging.
    `adds_bos`: what llama.cpp assumes where the file does not say.
    """

    split: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_WORD = r"[^\r\n\p{L}\p{N}]?"
_SPACE = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = PreTokenizer(
    _CONTRACTION + _WORD + r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACE, ignore_merges=True, adds_bos=True
)
_QWEN2 = PreTokenizer(_CONTRACTION + _WORD + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACE, nfc=True)
_TEKKEN = PreTokenizer(
    f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACE,
    ignore_merges=True,
    adds_bos=True,
)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> dict[str, str]:
    """{file name: content} of tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        metadata: all keys of the GGUF file.
        source: what to call the file in messages.

    Raises:
        ValueError: naming the key whose value is missing, damaged, or not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{source}: has no tokenizer (tokenizer.ggml.tokens is missing)")
    types = metadata.get(_TYPES) or [NORMAL] * len(tokens)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(f"{source}: {len(tokens)} tokens, {len(set(tokens))} of them different, {len(types)} types")
    special = special_ids(metadata, source)
    # Padding of the embedding that llama.cpp gives a name ("[PAD151665]"); no text has these ids.
    vocabulary = {token: id for id, token in enumerate(tokens) if types[id] != UNUSED}
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, vocabulary, source)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(metadata, vocabulary, types, special, source)
    else:
        raise ValueError(f"{source}: tokenizer.ggml.model is {kind!r}; supported: gpt2 (byte-level BPE), llama (SPM)")

    for type, is_special in ((CONTROL, True), (USER_DEFINED, False)):
        # added in the order of ids, each to the id it already has in the vocabulary
        added = [token for id, token in enumerate(tokens) if types[id] == type]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=is_special) for token in added])
    adds = {
        "bos": bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos" in special,
        "eos": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos" in special,
    }
    if any(adds.values()):
        tokenizer.post_processor = _template({role: tokens[special[role]] for role in adds if adds[role]}, tokenizer)

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds["bos"],
        "add_eos_token": adds["eos"],
    }
    special_tokens = {f"{role}_token": tokens[id] for role, id in special.items()}
    if (template := _chat_template(metadata)) is not None:
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config | special_tokens, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(special_tokens, indent=2, ensure_ascii=False) + "\n",
    }


def special_ids(metadata: Mapping[str, Any], source: str) -> dict[str, int]:
    """Ids of "bos", "eos", "unk" and "pad", as far as the file states them."""
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
    found = {}
    for role, key in keys.items():
        id = metadata.get(f"tokenizer.ggml.{key}")
        if id is None:
            continue
        if not 0 <= id < len(metadata["tokenizer.ggml.tokens"]):
            raise ValueError(f"{source}: tokenizer.ggml.{key} is {id}, which is no token")
        found[role] = int(id)
    return found


def _byte_level(
    metadata: Mapping[str, Any], vocabulary: dict[str, int], source: str
) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level BPE, and whether such a vocabulary adds BOS by default."""
    name = metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"{source}: tokenizer.ggml.pre is {name!r}; supported: {', '.join(PRE_TOKENIZERS)}")
    rule = PRE_TOKENIZERS[name]
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{source}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
    tokenizer = tokenizers.Tokenizer(model)
    if rule.nfc:
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None)
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    if rule.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.split), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level]) if steps else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any],
    vocabulary: dict[str, int],
    types: Sequence[int],
    special: Mapping[str, int],
    source: str,
) -> tuple[tokenizers.Tokenizer, bool]:
    """A sentencepiece BPE vocabulary (Llama 2, Mistral 7B): pieces with scores, bytes for what they cannot spell.

    sentencepiece merges the neighbours whose joint piece has the best score; so each way to cut a piece into two pieces
    is a merge, in the order of the scores.
    """
    for key, allowed in (("remove_extra_whitespaces", False), ("precompiled_charsmap", None)):
        if metadata.get(f"tokenizer.ggml.{key}", allowed) not in (allowed, None, [], b""):
            raise ValueError(f"{source}: tokenizer.ggml.{key} is set; sentencepiece normalisation is not supported")
    scores = metadata.get("tokenizer.ggml.scores") or ()
    if len(scores) != len(types):
        raise ValueError(f"{source}: tokenizer.ggml.scores has {len(scores)} entries for {len(types)} tokens")
    pieces = {token: id for token, id in vocabulary.items() if types[id] == NORMAL}
    merges = []
    for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece])):
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                merges.append((piece[:cut], piece[cut:]))
    unknown = next((token for token, id in vocabulary.items() if types[id] == UNKNOWN), None)
    has_bytes = BYTE in types
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, "bos" in special


def _template(added: Mapping[str, str], tokenizer: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    """BOS before and EOS after a text, where the model wants them."""
    before, after = ([added[role]] if role in added else [] for role in ("bos", "eos"))
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(set(added.values()))],
    )


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The template, or Hugging Face's list of named ones if there are several."""
    default = metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    if not named:
        return default
    templates = ({"default": default} if default is not None else {}) | named
    return [{"name": name, "template": template} for name, template in templates.items()]
