"""Greedy answers to prompts, cut at stop strings, with what is needed to judge them: stop reason, length, prompt hash.

Text in and out on top of steep.engine's `generate`. Cutting follows lm-evaluation-harness 0.4.13; so do, in the `lmeval`
mode, the stop tokens' text and the truncation of long prompts from the left to max_length - max_gen_toks. The `clean`
mode keeps the BOS of a truncated prompt. Both count and mark what was cut.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.generate import generate
from ..engine.model import Decoder
from .encoding import Encoder

MAX_GEN_TOKS = 256  # the harness' default


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    text: without special tokens, ends before the first stop string. stop_reason: "stop_token", "stop_string", "length"
    or "context". num_tokens: generated ones, the stop included. truncated: tokens cut from the prompt's left.
    """

    text: str
    stop_reason: str
    num_tokens: int
    truncated: int
    prompt_sha256: str


def generate_until(
    decoder: Decoder,
    encoder: Encoder,
    prompts: Sequence[str],
    until: Sequence[str] = (),
    max_gen_toks: int = MAX_GEN_TOKS,
    *,
    stop_ids: Sequence[int] | None = None,
    max_sequences: int = 32,
) -> list[Answer]:
    """Greedy continuation of each prompt up to the first of `until`, a stop token or `max_gen_toks` tokens.

    Args:
        stop_ids: tokens that end an answer; default: the tokenizer's EOS and the model configuration's EOS ids.

    Raises:
        ValueError: max_gen_toks leaves no room for a prompt, an empty stop string, or an empty prompt.
    """
    room = encoder.max_length - max_gen_toks
    if room < 1:
        raise ValueError(
            f"max_gen_toks: {max_gen_toks} leaves no room for a prompt; allowed: less than max_length {encoder.max_length}"
        )
    if any(not stop for stop in until):
        raise ValueError("until: an empty stop string; allowed: strings of at least one character")
    tokenizer = encoder.tokenizer
    if stop_ids is None:
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        stop_ids = tuple({*own, *decoder.config.eos_token_ids})
    stops = list(until)
    if tokenizer.eos_id is not None:
        stops.append(tokenizer.decode([tokenizer.eos_id], skip_special=False))
    fitted = [encoder.prompt(prompt, room) for prompt in prompts]
    generations = generate(
        decoder,
        [ids for ids, _ in fitted],
        max_gen_toks,
        stop_ids,
        stop_strings=stops,
        decode=tokenizer.decode,
        context_length=encoder.max_length,
        max_sequences=max_sequences,
    )
    return [
        Answer(
            text=cut_at_stops(tokenizer.decode(generation.tokens), stops),
            stop_reason=generation.stop_reason,
            num_tokens=len(generation.tokens),
            truncated=truncated,
            prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest(),
        )
        for prompt, generation, (_, truncated) in zip(prompts, generations, fitted)
    ]


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the stop strings: cut at each of them in turn."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text

