"""Where a tensor stands in a model, by its name: in which layer, in which part, before or after the layers.

Names, not model classes: `model.layers.3.mlp.experts.5.w1.weight` is in layer 3 of the list `model.layers`. Touches no
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .config import Parameters

_LAYER = re.compile(r"^(?P<layers>(?:.+?\.)?(?:layers|layer|h|blocks|block))\.(?P<index>\d+)\.(?P<rest>.+)$")
_BEFORE = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|patch_conv|ln_pre|conv1)(\.|$)")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$|^output\.weight$")
_HEAD_BIAS = re.compile(r"(^|\.)lm_head\.bias$")
# mergekit's names of parts, and how the names of their tensors begin where that is another word.
_PARTS = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "encoder": ("encoder",),
    "decoder": ("decoder",),
}
_MAIN_PARTS = ("default", "text_decoder")  # own what no other part does


def split_layer(name: str) -> tuple[str, int, str] | None:
    """(the list of layers, the layer, the rest of the name), or None outside the layers."""
    match = _LAYER.match(name)
    return (match["layers"], int(match["index"]), match["rest"]) if match else None


def layer_index(name: str) -> int | None:
    """model.layers.3.mlp.experts.5.w1.weight -> 3."""
    found = split_layer(name)
    return found[1] if found else None


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """{list of layers: one more than the highest index}."""
    counts: dict[str, int] = {}
    for name in names:
        if found := split_layer(name):
            counts[found[0]] = max(counts.get(found[0], 0), found[1] + 1)
    return counts


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers goes with the first slice, as embeddings do, not with the last."""
    return bool(_BEFORE.search(name)) and not is_head(name)


def is_embedding(name: str) -> bool:
    return bool(_EMBEDDING.search(name))


def is_head(name: str) -> bool:
    return bool(_HEAD.search(name))


def has_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor stand for tokens."""
    return is_embedding(name) or is_head(name) or bool(_HEAD_BIAS.search(name))


def part_of(name: str, parts: Sequence[str]) -> str | None:
    """Which of the parts that `modules` names owns a tensor; None: none of them."""
    words = name.split(".")[:3]
    for part in parts:
        if part not in _MAIN_PARTS and any(word in words for word in _PARTS.get(part, (part,))):
            return part
    return next((part for part in parts if part in _MAIN_PARTS), None)


@dataclass(frozen=True)
class Stack:
    """Consecutive layers of the result that are merged from one set of sources: a slice, or a whole part.

    where: the key in the YAML. models: numbers of the sources. base: position in `models` of the method's base.
    configured_base: number of the `base_model` that holds here, if it is a source, whether the method reads it or not.
    first, count: layers of the result; count None: every layer stays where it is. begins: each source's first layer.
    shared_scopes, model_scopes: where parameters are looked for, the first that has one counts; the latter per source.
    """

    where: str
    models: tuple[int, ...]
    base: int | None
    configured_base: int | None
    first: int
    count: int | None
    begins: tuple[int, ...]
    shared_scopes: tuple[Parameters, ...]
    model_scopes: tuple[tuple[Parameters, ...], ...]


def depth(position: int, count: int) -> float:
    """t of gradients: 0 at the first layer, 1 at the last; 1 for a single layer, as in mergekit."""
    return position / (count - 1) if count > 1 else 1.0
