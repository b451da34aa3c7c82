"""Random bits of a merge: a pure function of (seed, tensor name, model, element), on kernels/philox.py.

The mask of a task vector is the same for any piece size, thread, device, shard layout and order of models or tensors,
and a further model does not change those of the others. Touches no files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

WORDS = 1 << 32


@dataclass(frozen=True)
class Noise:
    """The random bits of one task vector: 32 for each of its elements.

    key, stream: of Philox, 64 bits each.
    """

    key: int
    stream: int

    @classmethod
    def of(cls, seed: int, name: str, model: str) -> Noise:
        """key and stream from a hash: no two tensors or models share bits."""
        digest = hashlib.blake2b(json.dumps([seed, name, model]).encode(), digest_size=16).digest()
        return cls(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))

    def below(self, lo: int, thresholds: int | Tensor, count: int, device: torch.device | str = "cpu") -> Tensor:
        """float32 [count]: 1 with probability threshold / 2^32, else 0, for the elements from `lo` on.

        Args:
            thresholds: in [0, 2^32], one for all or int64 [count].
        """
        from ..kernels.philox import philox_bits  # seconds of imports that merges without noise can do without

        words = philox_bits(self.key, self.stream, lo, count, device)
        return torch.lt(words, thresholds, out=torch.empty(count, device=device))


def threshold(probability: float) -> int:
    """The number t in [0, 2^32] for which t / 2^32 is nearest to a probability."""
    return round(probability * WORDS)
