"""Tokens in, fp32 log-probabilities out: the one place where evaluation runs a model forward.

Requests (context, continuation) become a prefix tree: what several requests share (few-shot prefix -> question ->
choices) runs through the decoder once, its keys and values stay in a KVCache while the branches below it run, packed
without padding. Only rows that predict a continuation token go through the vocabulary projection, in chunks; requests
that need the same row (the letters of one question) share it. Touches steep.engine's Decoder and KVCache.

Results come in request order and do not depend on it: the tree and its batches are built from the sorted requests. They
do depend on which requests are scored together through the order of floating-point sums inside matrix products: see
`Scorer`. Log-probabilities are fp32 whatever the model's dtype, the sum over a continuation is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..engine.cache import KVCache
from .encoding import Request

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..engine.model import Decoder

MIN_SHARED_TOKENS = 16  # a common prefix that saves fewer tokens is not worth a pass of its own


class Score(NamedTuple):
    """Sum of log p(continuation tokens), natural logarithm, and whether each of them was the model's first choice."""

    logprob: float
    is_greedy: bool


@dataclass(eq=False)
class Node:
    """The tokens [start, end) of one input sequence, run once after those of its ancestors."""

    tokens: np.ndarray  # i64, the whole sequence from its first token; only [start, end) runs here
    start: int
    end: int
    children: list[Node] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)  # of each span of wanted rows: positions in the sequence,
    targets: list[np.ndarray] = field(default_factory=list)  # the tokens they are to predict,
    requests: list[np.ndarray] = field(default_factory=list)  # and the requests they belong to; i64 all


class Scorer:
    """A decoder with its tokenizer, ready to score.

    Args:
        decoder: in eval mode, on its device.
        max_length: longest model input in tokens.
        batch_tokens: bound on cached + new tokens in one forward pass (one longer sequence runs alone). Keys and
            values of at most this many tokens are held per level of the tree; few-shot multiple choice has 2 or 3.
        row_chunk: rows of the vocabulary projection at a time; memory 4 * row_chunk * vocab_size bytes.
        share_prefixes: False runs every distinct input on its own, for tests and for measuring what sharing gains.

    The same requests give the same bits. Scored in other company they agree to fp32 rounding: over 70 continuations of
    few-shot MMLU on SmolLM2-135M (fp32, CPU), shared and unshared scoring differed by at most 2.8e-5 nats.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        max_length: int | None = None,
        batch_tokens: int = 8192,
        *,
        row_chunk: int = 256,
        share_prefixes: bool = True,
    ) -> None:
        vocab_size = decoder.head_weight.shape[0]
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}")
        limit = decoder.config.max_position_embeddings
        self.max_length = limit if max_length is None else max_length
        if not 1 <= self.max_length <= limit:
            raise ValueError(f"max_length: {max_length} given; allowed: 1 to max_position_embeddings {limit}")
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.row_chunk = row_chunk
        self.share_prefixes = share_prefixes
        self.vocab_size = vocab_size

    @torch.inference_mode()
    def loglikelihood(
        self, requests: Sequence[Request], progress: Callable[[int, int], None] | None = None
    ) -> list[Score]:
        """Score requests, each a `Request` or a plain (context ids, continuation ids): log p(continuation | context).

        Args:
            progress: called with (tokens done, tokens in all) after each forward pass.

        Raises:
            ValueError: an empty context or continuation, an input longer than max_length, an id outside the vocabulary.
            FloatingPointError: the model returned log-probabilities that are not finite.
        """
        for number, request in enumerate(requests):
            self._check(number, request[0], request[1])
        roots = prefix_tree(requests, self.share_prefixes)
        total = tree_tokens(roots)
        logprob = np.zeros(len(requests))
        greedy = np.ones(len(requests), dtype=bool)
        done = 0
        # Each entry: a cache and the nodes that continue its sequences, as (sequence in the cache, node).
        stack: list[tuple[KVCache | None, list[tuple[int, Node]]]] = []
        if roots:
            stack.append((None, [(0, root) for root in roots]))
        while stack:
            parent_cache, waiting = stack.pop()
            batch, rest = self._take(waiting)
            if rest:
                stack.append((parent_cache, rest))
            hidden_TD, cache = self._forward(parent_cache, batch)
            self._score_rows(hidden_TD, [node for _, node in batch], logprob, greedy)
            below = [(i, child) for i, (_, node) in enumerate(batch) for child in node.children]
            if below:
                stack.append((cache, below))
            done += len(hidden_TD)
            if progress is not None:
                progress(done, total)
        if not np.isfinite(logprob).all():
            bad = int((~np.isfinite(logprob)).sum())
            raise FloatingPointError(f"{bad} of {len(requests)} log-likelihoods are not finite: the model is broken")
        return [Score(float(p), bool(g)) for p, g in zip(logprob, greedy)]

    def _check(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        if not context or not continuation:
            raise ValueError(
                f"request {number}: {len(context)} context and {len(continuation)} continuation tokens; "
                "at least one of each is needed"
            )
        length = len(context) + len(continuation) - 1
        if length > self.max_length:
            raise ValueError(f"request {number}: an input of {length} tokens exceeds max_length {self.max_length}")
        highest = max(max(context), max(continuation))
        if highest >= self.vocab_size or min(min(context), min(continuation)) < 0:
            raise ValueError(f"request {number}: token {highest} is outside the vocabulary of {self.vocab_size}")

    def _take(self, waiting: list[tuple[int, Node]]) -> tuple[list[tuple[int, Node]], list[tuple[int, Node]]]:
        """The longest head of the list whose sequences, cached prefixes included, fit batch_tokens; and the rest."""
        used, count = 0, 0
        for _, node in waiting:
            used += node.end
            if count and used > self.batch_tokens:
                break
            count += 1
        return waiting[:count], waiting[count:]

    def _forward(
        self, parent_cache: KVCache | None, batch: list[tuple[int, Node]]
    ) -> tuple[torch.Tensor, KVCache | None]:
        """Hidden states [T, D] of the batch's own tokens, and the cache of its sequences where one will be needed."""
        device = self.decoder.head_weight.device
        lengths = [node.end - node.start for _, node in batch]
        tokens = torch.from_numpy(np.concatenate([node.tokens[node.start : node.end] for _, node in batch])).to(device)
        if parent_cache is None and not any(node.children for _, node in batch):
            positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]).to(device)
            cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths])).to(device, torch.int32)
            return self.decoder(tokens, positions, cu_seqlens, max(lengths)), None
        if parent_cache is None:
            cache = KVCache(self.decoder.config.num_hidden_layers, device)
            cache.branch([None] * len(batch), lengths)
        else:
            cache = parent_cache.fork()
            cache.branch([sequence for sequence, _ in batch], lengths)
        return self.decoder(tokens, cache.positions, cache.cu_seqlens, cache.max_seqlen, cache), cache

    def _score_rows(
        self, hidden_TD: torch.Tensor, nodes: list[Node], logprob: np.ndarray, greedy: np.ndarray
    ) -> None:
        """Add the log-probabilities of the rows that requests want of these nodes to `logprob`, and to `greedy`."""
        offsets = np.cumsum([0] + [node.end - node.start for node in nodes])
        wanted = [o + rows - node.start for o, node in zip(offsets, nodes) for rows in node.rows]
        if not wanted:
            return
        rows, row_of_pair = np.unique(np.concatenate(wanted), return_inverse=True)
        targets = np.concatenate([t for node in nodes for t in node.targets])
        requests = np.concatenate([r for node in nodes for r in node.requests])
        order = np.argsort(row_of_pair, kind="stable")
        row_of_pair, targets, requests = row_of_pair[order], targets[order], requests[order]
        device = hidden_TD.device
        for start in range(0, len(rows), self.row_chunk):
            chunk = rows[start : start + self.row_chunk]
            first, last = np.searchsorted(row_of_pair, [start, start + len(chunk)])
            pair_row = torch.from_numpy(row_of_pair[first:last] - start).to(device)
            pair_target = torch.from_numpy(targets[first:last]).to(device)
            logits_RV = self.decoder.logits(hidden_TD[torch.from_numpy(chunk).to(device)])
            top, best = logits_RV.max(dim=-1)
            picked = logits_RV[pair_row, pair_target]
            # In place, so there is no second [R, V]; and unbiased: torch's fp32 log_softmax on a CPU was off by -7e-6
            # per token over a vocabulary of 49,152, which adds up over a document.
            logsumexp = logits_RV.sub_(top[:, None]).exp_().sum(dim=-1).log_().add_(top)
            pair_logprob = (picked - logsumexp[pair_row]).double().cpu().numpy()
            pair_greedy = (best[pair_row] == pair_target).cpu().numpy()
            np.add.at(logprob, requests[first:last], pair_logprob)
            np.logical_and.at(greedy, requests[first:last], pair_greedy)


def prefix_tree(requests: Sequence[Request], share: bool = True) -> list[Node]:
    """The roots of the tree of all inputs (context + continuation without its last token), in sorted order.

    An input that is the beginning of another one needs no node of its own: its rows are rows of the longer one. Without
    `share` every distinct input is a root.
    """
    members: dict[bytes, list[int]] = {}  # input -> the requests that can be read off it
    for number, request in enumerate(requests):
        # Big-endian, so that the order of the bytes is the order of the tokens.
        key = np.array([*request[0], *request[1][:-1]], dtype=">u4").tobytes()
        members.setdefault(key, []).append(number)
    keys = sorted(members)
    if share:
        kept: list[bytes] = []
        for key in reversed(keys):
            if kept and kept[-1].startswith(key):
                members[kept[-1]] += members.pop(key)
            else:
                kept.append(key)
        keys = kept[::-1]
    leaves = [np.frombuffer(key, dtype=">u4").astype(np.int64) for key in keys]
    shared = [0, *(common_prefix(a, b) if share else 0 for a, b in zip(leaves, leaves[1:]))]  # with the leaf before

    def add_node(low: int, high: int, start: int, end: int, siblings: list[Node]) -> Node:
        node = Node(leaves[low], start, end)
        siblings.append(node)
        for key in keys[low:high]:
            for number in members[key]:
                add_rows(node, number, requests[number])
        return node

    roots: list[Node] = []
    # Each entry: leaves [low, high), which agree up to their token `start`, and the list that their nodes go into.
    stack = [(0, len(leaves), 0, roots)] if leaves else []
    while stack:
        low, high, start, siblings = stack.pop()
        if high - low == 1:
            add_node(low, high, start, len(leaves[low]), siblings)
            continue
        depth = min(shared[low + 1 : high])
        cuts = [low, *(i for i in range(low + 1, high) if shared[i] == depth), high]
        if (depth - start) * (len(cuts) - 2) >= MIN_SHARED_TOKENS:
            siblings, start = add_node(low, high, start, depth, siblings).children, depth
        stack += [(a, b, start, siblings) for a, b in zip(cuts[-2::-1], cuts[:0:-1])]
    return roots


def add_rows(node: Node, number: int, request: Request) -> None:
    """Note in a node those of its rows that predict continuation tokens of a request."""
    context, continuation = request[0], request[1]
    first = len(context) - 1  # this row predicts the first continuation token
    low, high = max(first, node.start), min(first + len(continuation), node.end)
    if low < high:
        node.rows.append(np.arange(low, high))
        node.targets.append(np.array(continuation[low - first : high - first], dtype=np.int64))
        node.requests.append(np.full(high - low, number))


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two token arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def tree_tokens(roots: Sequence[Node]) -> int:
    """Tokens that a tree runs through the decoder."""
    total, stack = 0, list(roots)
    while stack:
        node = stack.pop()
        total += node.end - node.start
        stack += node.children
    return total
