"""Counter-based random bits: Philox4x32-10, a pure function of (seed, stream, index).

    bits(seed, stream, index) = word[index % 4] of Philox4x32-10(counter = (index // 4, stream), key = seed)

with 64-bit seed, stream and index; 32 random bits per index. Nothing is drawn from a state, so recomputation, any
sharding and any order give the same numbers: whoever needs noise numbers its elements globally and passes that index.
Cost: one evaluation serves four neighbouring indices, about 25 integer instructions each. Source: Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"; the same numbers as Random123 and cuRAND. May touch: torch, triton.
"""

from __future__ import annotations

import torch

from ._triton import kernel, tl

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox_words(seed: int, stream: int, counter: torch.Tensor) -> list[torch.Tensor]:
    """The four words, each int64 in [0, 2^32), of every counter (int64, any shape); seed and stream modulo 2^64."""
    c0, c1 = counter & _WORD, counter >> 32
    c2, c3 = (torch.full_like(counter, word & _WORD) for word in (stream, stream >> 32))
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        # 32 x 32 -> 64 bits. What c1 and c3 hold above 32 bits, and the sign that int64 gives a product, never count.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = b >> 32
        c0 ^= c1
        c0 ^= k0
        c0 &= _WORD
        c2 = a >> 32
        c2 ^= c3
        c2 ^= k1
        c2 &= _WORD
        c1, c3 = b, a
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return [c0, c1 & _WORD, c2, c3 & _WORD]


def philox_bits(seed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [count] in [0, 2^32): the bits of indices start ... start + count - 1."""
    first = start // 4
    counter = torch.arange(first, (start + count + 3) // 4, device=device)
    words = torch.stack(philox_words(seed, stream, counter), 1).view(-1)
    return words[start - 4 * first :][:count]


@kernel
def philox_block(seed, stream, start, BLOCK: tl.constexpr):
    """uint32 [BLOCK]: the bits of indices start ... start + BLOCK - 1; start int64 and a multiple of 4, seed and stream
    int64 or narrower scalars, BLOCK at least 4."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    lo, hi = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    wide = tl.zeros((BLOCK // 4,), tl.int64) + stream
    w0, w1, w2, w3 = tl.philox(seed, lo, hi, (wide & 0xFFFFFFFF).to(tl.uint32), (wide >> 32).to(tl.uint32))
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
