"""Text pairs -> token ids for scoring, in two modes. Touches a tokenizer (steep.data's) and nothing else.

`clean` (the default) does what the numbers claim to mean:
- at most one BOS, and literal special strings in the text stay text;
- the continuation is everything after the longest common token prefix of tok(context) and tok(context + continuation),
  so no character of it is ever left unscored. Where a token straddles the border, the last characters of the
  context are scored too - for all choices of an item alike, so that they stay comparable;
- a prompt that is too long loses tokens after its BOS, never the BOS.

`lmeval` reproduces lm-evaluation-harness 0.4.13 (its `hf` backend) with its faults: the continuation is tok(context +
continuation)[len(tok(context)):], which drops characters of it when a token straddles the border; rolling
log-likelihoods get a second BOS; left truncation loses the BOS; special strings in the text become special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ..data.tokenizer import Tokenizer

Mode = Literal["clean", "lmeval"]


class Request(NamedTuple):
    """What a Scorer scores: the log-probability of `continuation` after `context` (both non-empty token ids)."""

    context: list[int]
    continuation: list[int]
    truncated: int = 0  # tokens removed from the context's left to fit max_length


class Encoder:
    """Encodes prompts for one tokenizer in one mode.

    Args:
        max_length: longest model input in tokens; a request's context + continuation may hold one token more, because
            the last token is only predicted.
        add_bos: None follows the tokenizer's own default, True and False override it.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, mode: Mode = "clean", add_bos: bool | None = None
    ) -> None:
        if mode not in ("clean", "lmeval"):
            raise ValueError(f"mode: {mode!r} is unknown; allowed: 'clean', 'lmeval'")
        prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if prefix is None:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token, so an empty context cannot be encoded")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.mode = mode
        self.prefix_id: int = prefix  # stands in for an empty context
        self.add_bos = (tokenizer.adds_bos if add_bos is None else add_bos) and tokenizer.bos_id is not None

    def prompt(self, prompt: str | list[int], room: int) -> tuple[list[int], int]:
        """A text, or tokens as they are, cut from the left to `room` tokens; and how many tokens were cut."""
        if isinstance(prompt, list):
            ids = prompt
        elif self.mode == "lmeval":
            ids = self._lmeval_encode(prompt)
        else:
            ids = self._bos() + self.tokenizer.encode(prompt)
        excess = max(0, len(ids) - room)
        return self._cut_left(ids, excess), excess

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A conversation through the model's chat template, up to where the assistant's answer begins."""
        return self.tokenizer.encode_with_special(self.tokenizer.render_chat(messages, add_generation_prompt=True))

    def rolling(self, text: str) -> list[int]:
        """The tokens of a document to be predicted in rolling windows, whose first context is `prefix_id`.

        In the lmeval mode a BOS-adding tokenizer puts BOS in front here as well: it is then predicted from itself.
        """
        return self._lmeval_encode(text) if self.mode == "lmeval" else self.tokenizer.encode(text)

    def pair(self, context: str, continuation: str) -> Request:
        """One context with one continuation."""
        return self.choices(context, [continuation])[0]

    def choices(self, context: str, continuations: Sequence[str]) -> list[Request]:
        """One context with several continuations, fitted to max_length.

        Raises:
            ValueError: a continuation is empty, has no tokens, or alone exceeds max_length.
        """
        if any(not continuation for continuation in continuations):
            raise ValueError(f"empty continuation after the context {context[-80:]!r}")
        encode = self._lmeval_choices if self.mode == "lmeval" else self._clean_choices
        return [self._fit(*pair) for pair in encode(context, continuations)]

    def _clean_choices(self, context: str, continuations: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        context_ids, *whole = self.tokenizer.encode_batch([context, *(context + c for c in continuations)])
        shared = min(common_prefix(context_ids, ids) for ids in whole)
        head = self._bos() + whole[0][:shared]
        head = head or [self.prefix_id]
        return [(head, ids[shared:]) for ids in whole]

    def _lmeval_choices(self, context: str, continuations: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        if not context:
            pairs = []
            for continuation in continuations:
                ids = self.tokenizer.encode_with_special(continuation)
                pairs.append((ids[:1], ids[1:]) if ids[:1] == [self.prefix_id] else ([self.prefix_id], ids))
            return pairs
        head = context.rstrip()
        tail = context[len(head) :]  # trailing whitespace moves to the continuation
        head_ids = self._lmeval_encode(head)
        return [(head_ids, self._lmeval_encode(head + tail + c)[len(head_ids) :]) for c in continuations]

    def _lmeval_encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_with_special(text)
        starts_with_prefix = text.startswith(self.tokenizer.decode([self.prefix_id], skip_special=False))
        return ids if starts_with_prefix else self._bos() + ids

    def _bos(self) -> list[int]:
        return [self.prefix_id] if self.add_bos else []

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        if not continuation:
            raise ValueError(
                f"a continuation has no tokens of its own after {self.tokenizer.decode(context[-20:])!r} in the "
                f"{self.mode} mode"
            )
        if len(continuation) > self.max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens exceeds max_length {self.max_length}")
        excess = max(0, len(context) + len(continuation) - (self.max_length + 1))
        return Request(self._cut_left(context, excess), continuation, excess)

    def _cut_left(self, ids: list[int], excess: int) -> list[int]:
        """Without the first `excess` tokens; the clean mode keeps a BOS and drops the tokens after it instead."""
        if excess and self.mode == "clean" and ids[0] == self.tokenizer.bos_id:
            return ids[:1] + ids[excess + 1 :]
        return ids[excess:]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
