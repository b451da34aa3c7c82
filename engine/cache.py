"""Keys and values of sequences already read, so that they can be continued: by one token in generation, by several
alternatives of one prompt in scoring. Packed like the decoder's input: the sequences of a layer lie end to end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Empty at first. Before each pass of the decoder, `branch` says which sequences it reads; the pass does the rest:

        cache = KVCache(decoder.config.num_hidden_layers, device)
        cache.branch([None, None], [7, 5])       # two new sequences of 7 and 5 tokens
        decoder(tokens_12, cache.positions, cache.cu_seqlens, cache.max_seqlen, cache)
        cache.branch([0, 0, 1], [2, 3, 1])       # two continuations of the first, one of the second
        decoder(tokens_6, cache.positions, cache.cu_seqlens, cache.max_seqlen, cache)

    For the next pass: `positions` i32 [T], `cu_seqlens` i32 [N+1] and `max_seqlen` of the new tokens, `cu_seqlens_k`
    i32 [N+1] and `max_seqlen_k` of cached and new tokens together; `lengths` as a list, also on the CPU.
    Not differentiable: meant for `torch.inference_mode`.
    """

    def __init__(self, num_layers: int, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lengths: list[int] = []
        self.keys: list[Tensor | None] = [None] * num_layers  # [C, K, H] each
        self.values: list[Tensor | None] = [None] * num_layers

    def fork(self) -> KVCache:
        """A second cache that holds the same tensors: `branch` on either leaves the other as it is. Copies nothing."""
        twin = copy.copy(self)
        twin.keys, twin.values = list(self.keys), list(self.values)
        return twin

    def branch(self, parents: Sequence[int | None], lengths: Sequence[int]) -> None:
        """Sequence i of the next pass is cached sequence `parents[i]` (None: nothing) and `lengths[i]` new tokens.

        A parent may have many children, each with its own copy of the prefix; a cached sequence that is no parent is
        dropped; length 0 keeps one as it is. ValueError for a parent that is not cached, or no new tokens at all.
        """
        if len(parents) != len(lengths) or not any(lengths) or min(lengths) < 0:
            raise ValueError(f"{len(parents)} parents, lengths {list(lengths)}; allowed: one each, >= 0, not all 0")
        for parent in parents:
            if parent is not None and not 0 <= parent < len(self.lengths):
                raise ValueError(f"parent {parent} of {len(self.lengths)} cached sequences")
        assert all(keys is None or len(keys) == sum(self.lengths) for keys in self.keys), "a pass left layers behind"

        starts = np.cumsum([0, *self.lengths])
        prefixes = np.array([0 if parent is None else self.lengths[parent] for parent in parents])
        news = np.array(lengths)
        totals = prefixes + news
        in_sequence = _ramps(totals)  # place of every token of the next pass in its own sequence
        is_new = in_sequence >= np.repeat(prefixes, totals)
        first_row = np.array([0 if parent is None else starts[parent] for parent in parents])
        # row of the old buffer that each row of the new one continues; new tokens point at row 0 and are overwritten
        self._source = self._tensor(np.where(is_new, 0, np.repeat(first_row, totals) + in_sequence), torch.int64)
        self._new_rows = self._tensor(np.flatnonzero(is_new), torch.int64)
        self.positions = self._tensor(in_sequence[is_new], torch.int32)
        self.cu_seqlens = self._tensor(np.cumsum([0, *news]), torch.int32)
        self.cu_seqlens_k = self._tensor(np.cumsum([0, *totals]), torch.int32)
        self.max_seqlen, self.max_seqlen_k = int(news.max()), int(totals.max())
        self.lengths = totals.tolist()

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values [T, K, H] of one layer in; return those of all tokens [C, K, H]."""
        self.keys[layer] = keys = self._merge(self.keys[layer], keys)
        self.values[layer] = values = self._merge(self.values[layer], values)
        return keys, values

    def _merge(self, old: Tensor | None, new: Tensor) -> Tensor:
        if len(new) == len(self._source):  # nothing cached is continued; a view would keep the whole qkv buffer alive
            return new.contiguous()
        assert old is not None
        return old.index_select(0, self._source).index_copy_(0, self._new_rows, new)

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(self.device, dtype)


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """0 .. n-1 for each length n, end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
