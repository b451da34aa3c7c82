"""Greedy generation with a KV cache: many prompts of different lengths in one packed pass, finished ones replaced by
waiting ones. Tokens in, tokens out; text and templates are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..data.files import read_json
from .cache import KVCache
from .config import ModelConfig
from .model import Decoder


@dataclass
class Generation:
    """What one prompt was continued with. `tokens` includes the stop token, or the tokens that completed a stop string.

    stop_reason: "stop_token", "stop_string", "length" (max_new_tokens) or "context" (no position left).
    """

    tokens: list[int] = field(default_factory=list)
    stop_reason: str = ""


def stop_ids_of(folder: str | Path) -> tuple[int, ...]:
    """The ids at which a model folder says that text ends: eos_token_id of `generation_config.json`, else of
    `config.json`. Chat models often name more of them in the former (the end of a turn beside the end of a text)."""
    path = Path(folder) / "generation_config.json"
    if path.is_file():
        eos = read_json(path).get("eos_token_id")
        if eos is not None:
            return tuple(eos) if isinstance(eos, list) else (eos,)
    return ModelConfig.from_folder(folder).eos_token_ids


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    *,
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    context_length: int | None = None,
    max_sequences: int = 32,
) -> list[Generation]:
    """Continue every prompt by its most likely tokens, until one of `stop_ids`, a text that contains one of
    `stop_strings` (looked for in `decode(new tokens)`), `max_new_tokens`, or a total of `context_length` tokens
    (default: max_position_embeddings). `max_sequences` are read at a time. Returns one Generation per prompt, in order.

    ValueError for an empty prompt, one longer than the context, or stop strings without `decode`.
    """
    limit = decoder.config.max_position_embeddings
    if context_length is not None and not 0 < context_length <= limit:
        raise ValueError(f"context_length is {context_length}; allowed: 1 to max_position_embeddings = {limit}")
    limit = context_length or limit
    if max_new_tokens < 1 or max_sequences < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, max_sequences is {max_sequences}; allowed: 1 and more")
    if stop_strings and (decode is None or "" in stop_strings):
        raise ValueError(f"stop_strings {list(stop_strings)} need `decode`, and must not contain the empty string")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; allowed: 1 to {limit}")

    device = decoder.head_weight.device
    stop = frozenset(stop_ids)
    results = [Generation() for _ in prompts]
    cache = KVCache(decoder.config.num_hidden_layers, device)
    for result, prompt in zip(results, prompts):
        if len(prompt) == limit:
            result.stop_reason = "context"
    waiting = [i for i in reversed(range(len(prompts))) if not results[i].stop_reason]
    running: list[int] = []  # prompts in the order of the cache
    parents: list[int | None] = []
    while running or waiting:
        while waiting and len(running) < max_sequences:
            running.append(waiting.pop())
            parents.append(None)
        unread = [
            list(prompts[i]) if parent is None else results[i].tokens[-1:] for i, parent in zip(running, parents)
        ]
        cache.branch(parents, [len(tokens) for tokens in unread])
        tokens_T = torch.tensor([token for tokens in unread for token in tokens], device=device)
        hidden_TD = decoder(tokens_T, cache.positions, cache.cu_seqlens, cache.max_seqlen, cache)
        last_R = cache.cu_seqlens[1:] - 1
        next_tokens = decoder.logits(hidden_TD[last_R]).argmax(-1).tolist()

        for i, token in zip(running, next_tokens):
            result = results[i]
            result.tokens.append(token)
            if token in stop:
                result.stop_reason = "stop_token"
            elif decode is not None and stop_strings and any(s in decode(result.tokens) for s in stop_strings):
                result.stop_reason = "stop_string"
            elif len(result.tokens) == max_new_tokens:
                result.stop_reason = "length"
            elif len(prompts[i]) + len(result.tokens) == limit:
                result.stop_reason = "context"
        parents = [place for place, i in enumerate(running) if not results[i].stop_reason]
        running = [i for i in running if not results[i].stop_reason]
    return results
