"""Greedy answers to prompts, cut at stop strings, with what is needed to judge them: stop reason, length, prompt hash.

Text in and out on top of steep.engine's `generate`. As in lm-evaluation-harness 0.4.13, prompts are cut from the left
to max_length - max_gen_toks tokens (marked, and in the clean mode without losing the BOS), answers end before the first
stop string, and the text of EOS is one of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..data.files import atomic_write
from ..engine.generate import generate
from ..engine.model import Decoder
from .encoding import Encoder
from .model import load_model

if TYPE_CHECKING:
    from .task import ExactMatch, Filter

MAX_GEN_TOKS = 256  # the harness' default


@dataclass(frozen=True)
class Answer:
    """One generated answer.

    text: without special tokens, ends before the first stop string. stop_reason: "stop_token", "stop_string", "length"
    or "context". num_tokens: generated ones, the stop included. truncated: tokens cut from the prompt's left.
    prompt_sha256: of the prompt's token ids as little-endian u32.
    """

    text: str
    stop_reason: str
    num_tokens: int
    truncated: int
    prompt_sha256: str


def generate_until(
    decoder: Decoder,
    encoder: Encoder,
    prompts: Sequence[str | list[int]],
    until: Sequence[str] = (),
    max_gen_toks: int = MAX_GEN_TOKS,
    *,
    stop_ids: Sequence[int] | None = None,
    max_sequences: int = 32,
) -> list[Answer]:
    """Greedy continuation of each prompt up to the first of `until`, a stop token or `max_gen_toks` tokens.

    Args:
        prompts: texts, encoded by the encoder, or token ids as they are (`Encoder.chat`).
        stop_ids: tokens that end an answer; default: the tokenizer's EOS and the model configuration's EOS ids.

    Raises:
        ValueError: max_gen_toks leaves no room for a prompt, an empty stop string, or an empty prompt.
    """
    room = encoder.max_length - max_gen_toks
    if room < 1:
        raise ValueError(
            f"max_gen_toks: {max_gen_toks} leaves no room for a prompt in max_length {encoder.max_length}"
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
    fitted = [encoder.prompt(prompt, room) for prompt in prompts]  # (token ids, tokens cut)
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
            prompt_sha256=hashlib.sha256(np.array(ids, dtype="<u4").tobytes()).hexdigest(),
        )
        for generation, (ids, truncated) in zip(generations, fitted)
    ]


def generate_file(model: str | Path, prompts: str | Path, out: str | Path, *, max_new_tokens: int = 256) -> None:
    """Answer the prompts of a jsonl file: `prompt` (plain text) or `messages` (a chat, through the model's template).

    Publishes a jsonl file with the fields of each line and of its `Answer`, in the same order.

    Raises:
        ValueError: a line that is not such an object; named by file and line, before the model is loaded.
    """
    lines = []
    for number, line in enumerate(Path(prompts).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{prompts}: line {number} is not JSON ({error})") from None
        if not isinstance(fields, dict) or ("prompt" in fields) == ("messages" in fields):
            raise ValueError(f"{prompts}: line {number}: an object with either `prompt` or `messages` is needed")
        lines.append(fields)
    decoder, tokenizer, stop_ids = load_model(model)
    encoder = Encoder(tokenizer, decoder.config.max_position_embeddings)
    requests = [encoder.chat(fields["messages"]) if "messages" in fields else fields["prompt"] for fields in lines]
    answers = generate_until(decoder, encoder, requests, max_gen_toks=max_new_tokens, stop_ids=stop_ids)
    rows = [{**fields, **asdict(answer)} for fields, answer in zip(lines, answers)]
    atomic_write(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the stop strings: cut at each of them in turn."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text



def extract(text: str, steps: Filter) -> str:
    """What a filter of the task reads as the answer: regex steps in turn, `fallback` where nothing matches.

    Of several matches the one at `group_select` counts (-1: the last), of several groups in it the first non-empty one.
    """
    for step in steps.filter:
        if step.function == "take_first":  # of several answers to one prompt; there is one here
            continue
        matches = re.findall(step.regex_pattern, text)
        if not matches:
            text = step.fallback
            continue
        match = matches[step.group_select]
        if isinstance(match, tuple):
            match = next((group for group in match if group), step.fallback)
        text = match.strip()
    return text


def exact_match(answer: str, target: str, metric: ExactMatch) -> bool:
    """Equality after removing what the metric says to ignore, in the harness' order: patterns, case, punctuation."""
    for pattern in metric.regexes_to_ignore:
        answer, target = re.sub(pattern, "", answer), re.sub(pattern, "", target)
    if metric.ignore_case:
        answer, target = answer.lower(), target.lower()
    if metric.ignore_punctuation:
        table = str.maketrans("", "", string.punctuation)
        answer, target = answer.translate(table), target.translate(table)
    return answer == target
